"""Converts a checkpoint to another format.

vidssl convert SRC DST [--to native|hf|torch|onnx] [--video FRAMES] [key=value ...]

SRC: a public checkpoint (V-JEPA, V-JEPA 2 and 2.1, VideoMAE and V2, MAE-ST, MAE, I-JEPA, a Hugging Face
folder of videomae, vjepa2, ijepa or vit_mae, a ViT of timm) or a run folder. DST: a new folder. --video: an
image encoder becomes the start of a video encoder. key=value: facts that the file does not contain (heads=16
predictor_heads=12 frames=16 height=224 width=224 positions=rope eps=1e-6).

--to native: our files. hf: a folder for transformers (videomae, vjepa2, ijepa), with a model card that says
how the encoder was trained and what its probes gave: --license, --dataset and --probe fill it. torch, onnx:
the encoder as a program that runs without vidssl, with a batch of any size (encoder.pt2, or encoder.onnx of
opset 18), and encoder.json, which says what it takes.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidssl.config import merge
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import (
    LEFTOVER,
    LOCK_FILE,
    atomic_write_text,
    check_writable,
    claim_folder,
    remove_leftovers,
)
from vidssl.core.launch import check_one_process
from vidssl.pretrained.sources import check_source

if TYPE_CHECKING:
    from vidssl.pretrained.infer_config import Checkpoint


def is_of_killed_convert(path: Path) -> bool:
    """Whether a file may be what a killed call has left."""
    return path.name == LOCK_FILE or LEFTOVER.fullmatch(path.name) is not None


def parse_conversion(argv: list[str]) -> argparse.Namespace:
    """Raises UserError for what can be known to be wrong before a checkpoint is read."""
    parser = argparse.ArgumentParser(
        prog="vidssl convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src")
    parser.add_argument("dst", type=Path)
    parser.add_argument("--to", choices=("native", "hf", "torch", "onnx"), default="native")
    parser.add_argument("--video", type=int, metavar="FRAMES")
    card = parser.add_argument_group("the model card of --to hf")
    card.add_argument("--license", metavar="ID", help="as the hub names it: apache-2.0, cc-by-nc-4.0, ...")
    card.add_argument("--dataset", action="append", default=[], metavar="NAME", help="on the hub")
    card.add_argument(
        "--probe",
        action="append",
        default=[],
        type=Path,
        help="probe.json or its folder; default: all of this encoder below SRC",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    a = parser.parse_args(argv)
    if bad := [item for item in a.overrides if "=" not in item]:
        parser.error(f"'{bad[0]}' is not key=value")
    if a.to != "hf" and (unused := [f"--{k}" for k in ("license", "dataset", "probe") if getattr(a, k)]):
        parser.error(f"{unused[0]} is for the model card of --to hf")
    if a.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", a.license):
        parser.error(f"--license {a.license}: give its name on the hub, such as apache-2.0")
    for path in a.probe:
        if not path.exists():
            raise UserError(f"--probe {path}: no such file; give a probe.json, or its folder")
    if a.dst.exists() and not (a.dst.is_dir() and all(map(is_of_killed_convert, a.dst.iterdir()))):
        raise UserError(f"{a.dst}: is there already; give a new folder")
    check_source(a.src)
    check_writable(a.dst)
    return a


def main(argv: list[str]) -> None:
    check_one_process(argv)
    a = parse_conversion(argv)
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.pretrained.export_program import check_program_packages, save_program
    from vidssl.pretrained.files import save_native
    from vidssl.pretrained.load import inflate_to_video, read_checkpoint_file

    if a.to in ("torch", "onnx"):
        check_program_packages(a.to)
    with claim_folder(a.dst, "convert"):
        # this program alone writes into a new folder
        remove_leftovers(a.dst, 0)
        checkpoint, metadata = read_checkpoint_file(a.src, **merge(a.overrides)[0])
        if a.video:
            checkpoint = inflate_to_video(checkpoint, a.video, tubelet=2)
        if a.to == "hf":
            write_hf_folder(a, checkpoint, metadata)
        elif a.to == "native":
            save_native(a.dst, checkpoint, {**metadata, "source": checkpoint.format})
            facts = ", ".join(f"{k} {v}" for k, v in checkpoint.model.items())
            print(f"{a.dst}: {checkpoint.format}, {facts}")
        else:
            about = save_program(a.dst, checkpoint, a.to, a.src)
            shapes = [about[part]["shape"] for part in ("input", "output")]
            text = " -> ".join(f"f32 [{', '.join(map(str, shape))}]" for shape in shapes)
            difference = f"differs from PyTorch by at most {about['difference_from_pytorch']:.1e}"
            print(f"{a.dst / about['file']}: {text}; {difference}")
    if checkpoint.unused:
        print(f"not needed: {', '.join(checkpoint.unused)}")


def write_hf_folder(a: argparse.Namespace, checkpoint: "Checkpoint", metadata: dict[str, Any]) -> None:
    """Writes a folder for transformers with its model card. metadata: header of the checkpoint."""
    from vidssl.evaluation.model_card import CardFacts, make_card, read_probes
    from vidssl.pretrained.export_hf import save_hf
    from vidssl.pretrained.public import load_json

    probes = read_probes(Path(a.src), a.probe, checkpoint)
    architecture = save_hf(a.dst, checkpoint)
    hf_config = load_json(a.dst / "config.json")
    facts = CardFacts(a.dst.name, hf_config, checkpoint, metadata, probes, a.license, a.dataset)
    atomic_write_text(a.dst / "README.md", make_card(facts))
    print(f"{a.dst}: transformers.{architecture}.from_pretrained('{a.dst}')")
    print(f"{a.dst / 'README.md'}: the model card, with {len(probes)} probes")
    if not a.license:
        print("its licence is not set: give --license, or set it there before you give the folder away")


if __name__ == "__main__":
    run_cli(main)

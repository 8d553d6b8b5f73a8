"""Converts a checkpoint to another format.

vidssl convert SRC DST --to native|hf [--video FRAMES] [key=value ...]

SRC: a public checkpoint (V-JEPA, V-JEPA 2 and 2.1, VideoMAE and V2, MAE-ST, MAE, I-JEPA, a Hugging Face
folder of videomae, vjepa2, ijepa or vit_mae, a ViT of timm) or a run folder. DST: a new folder. --video: an
image encoder becomes the start of a video encoder. key=value: facts that the file does not contain (heads=16
predictor_heads=12 frames=16 height=224 width=224 positions=rope eps=1e-6).
"""

import argparse
from pathlib import Path

from vidssl.config import merge
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import LEFTOVER, LOCK_FILE, check_writable, claim_folder, remove_leftovers
from vidssl.pretrained.sources import check_source


def is_of_killed_convert(path: Path) -> bool:
    """Whether a file may be what a killed call has left."""
    return path.name == LOCK_FILE or LEFTOVER.fullmatch(path.name) is not None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src")
    parser.add_argument("dst", type=Path)
    parser.add_argument("--to", choices=("native", "hf"), default="native")
    parser.add_argument("--video", type=int, metavar="FRAMES")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    a = parser.parse_args(argv)
    if bad := [item for item in a.overrides if "=" not in item]:
        parser.error(f"'{bad[0]}' is not key=value")
    if a.dst.exists() and not (a.dst.is_dir() and all(map(is_of_killed_convert, a.dst.iterdir()))):
        raise UserError(f"{a.dst}: is there already; give a new folder")
    check_source(a.src)
    check_writable(a.dst)
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.pretrained.export_hf import save_hf
    from vidssl.pretrained.files import save_native
    from vidssl.pretrained.load import inflate_to_video, read_checkpoint_file

    with claim_folder(a.dst, "convert"):
        # this program alone writes into a new folder
        remove_leftovers(a.dst, 0)
        checkpoint, metadata = read_checkpoint_file(a.src, **merge(a.overrides)[0])
        if a.video:
            checkpoint = inflate_to_video(checkpoint, a.video, tubelet=2)
        if a.to == "hf":
            print(f"{a.dst}: transformers.{save_hf(a.dst, checkpoint)}.from_pretrained('{a.dst}')")
        else:
            save_native(a.dst, checkpoint, {**metadata, "source": checkpoint.format})
            facts = ", ".join(f"{k} {v}" for k, v in checkpoint.model.items())
            print(f"{a.dst}: {checkpoint.format}, {facts}")
    if checkpoint.unused:
        print(f"not needed: {', '.join(checkpoint.unused)}")


if __name__ == "__main__":
    run_cli(main)

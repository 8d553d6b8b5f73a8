"""Adapts a checkpoint to one's own videos, and says with intervals what that was worth.

vidssl adapt --from CHECKPOINT --videos DIR --out RUN [--labels NAME ...] [--minutes N] [--control SHARDS]
             [--probe linear|attentive] [--dry-run] [key=value ...]

CHECKPOINT: a run folder or file of vidssl, or a published one (V-JEPA, VideoMAE, MAE-ST, I-JEPA, MAE, a ViT
of timm, a Hugging Face folder). DIR: a folder of videos, which is packed first, or packed shards (or a folder
with train and test). The corpus is looked at, and clip, rate, size, objective and budget are proposed, a
reason a line; key=value gives any key of `vidssl train` another value (run.steps=1000 optim.lr=1e-4), a key
without a section a fact that a published file does not contain (heads=16; see vidssl convert --help).

The run is an ordinary one: RUN/adapt.yaml, which `vidssl train` reads. It ends when its held-out error, on
videos that are not trained on, has not fallen for five measurements; the encoder with the lowest error is
RUN/adapted/encoder_best.safetensors. Where there are labels, frozen probes compare it with the checkpoint
before, with a run from scratch of as many steps, and with an untrained encoder; --control does so on another
labelled data set: what was forgotten. RUN/table.md has the table. The same command goes on where it was cut
off.
"""

import argparse
import sys
from pathlib import Path

from vidssl.adaptation.request import Request, split_settings
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_no_shards, check_writable
from vidssl.core.launch import check_one_process
from vidssl.data.schema import check_local_folders
from vidssl.pretrained.sources import check_source


def parse_request(argv: list[str]) -> tuple[Request, bool]:
    """The request, and whether only the proposal is wanted. Raises UserError for what can be known without
    torch."""
    parser = argparse.ArgumentParser(
        prog="vidssl adapt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="CHECKPOINT")
    add("--videos", required=True, metavar="DIR")
    add("--out", required=True, metavar="RUN", help="a folder; the same command continues it")
    add("--labels", nargs="+", default=[], metavar="NAME", help="label sets to probe; default: all")
    add("--minutes", type=float, help="limit of everything; steps are measured first")
    add("--control", metavar="SHARDS", help="folder with packed, labelled train and test")
    add("--probe", choices=("linear", "attentive"), default="linear", help="default: linear")
    add("--dry-run", action="store_true", help="print the proposal and end")
    add("settings", nargs="*", metavar="key=value")
    a = parser.parse_intermixed_args(argv)
    # after --labels come names until the first key=value
    names = [item for item in a.labels if "=" not in item]
    settings, facts = split_settings([item for item in a.labels if "=" in item] + a.settings)
    check_source(a.source, "--from")
    check_local_folders("--videos", [a.videos])
    check_writable(Path(a.out))
    check_no_shards(Path(a.out), "--out")
    if Path(a.out).resolve().is_relative_to(Path(a.videos).resolve()):
        raise UserError(f"--out {a.out}: lies inside {a.videos}; choose a folder outside it")
    if a.minutes is not None and a.minutes <= 0:
        raise UserError(f"--minutes {a.minutes:g}: give a number above 0")
    if a.control:
        for part in ("train", "test"):
            if not (Path(a.control) / part / "index.json").is_file():
                raise UserError(
                    f"--control {a.control}: no packed {part} in it; give a folder with labelled train and "
                    "test, as vidssl pack --test-fraction writes it"
                )
    request = Request(a.source, a.videos, a.out, tuple(names), a.minutes, a.control, a.probe, settings, facts)
    return request, a.dry_run


def main(argv: list[str]) -> None:
    check_one_process(argv)
    request, dry_run = parse_request(argv)
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.adaptation.flow import adapt

    if not adapt(request, dry_run):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)

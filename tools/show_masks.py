"""Draws masks on a clip: the context of each method, and its targets.

python tools/show_masks.py RUN [RUN ...] OUT.png      RUN: folders written by vidssl/train.py
python tools/show_masks.py --kinds OUT.png            every kind of mask with its defaults, on a random clip
"""

import argparse
from pathlib import Path

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="show_masks", description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument(
        "--kinds", action="store_true", help="every kind of mask with its defaults, on a random clip"
    )
    a = p.parse_args(argv)
    if bool(a.runs) == a.kinds:
        p.error("give either runs or --kinds")
    for run in a.runs:
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run}: no run folder: it has no config.yaml; give the run.out of a training")
    if a.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{a.out}: give a file name that ends in .png, .pdf or .svg")
    check_writable(a.out.parent)
    # Importing torch takes seconds: mistakes are answered before.
    from mask_pictures import show_kinds, show_runs

    make_folder(a.out.parent)
    if a.kinds:
        show_kinds(a.out)
    else:
        show_runs(a.runs, a.out)


if __name__ == "__main__":
    run_cli(main)

"""Draws masks on a clip: the context of each method, and its targets.

vidssl show masks RUN [RUN ...] OUT.png      RUN: folders written by vidssl/train.py
vidssl show masks --kinds OUT.png            every kind of mask with its defaults, on a random clip
vidssl show masks --method NAME [--clip VIDEO] OUT.png
                                             a file of configs/method: masks, scores, corrupted input
"""

import argparse
from difflib import get_close_matches
from pathlib import Path

from vidssl.config import SHIPPED
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_run_folder, check_writable, make_folder
from vidssl.pictures.formats import check_picture_name

METHODS = SHIPPED / "method"


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="vidssl show masks", description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="*", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument(
        "--kinds", action="store_true", help="every kind of mask with its defaults, on a random clip"
    )
    p.add_argument("--clips", type=int, default=1, metavar="N", help="of the data of RUN; default: 1")
    p.add_argument("--method", help="a file of configs/method, by its name")
    p.add_argument("--clip", type=Path, help="a video for --method; default: a rendered one")
    a = p.parse_args(argv)
    if bool(a.runs) + a.kinds + bool(a.method) != 1:
        p.error("give either runs, --kinds or --method")
    if a.clips < 1:
        raise UserError(f"--clips {a.clips}: give a number above 0")
    if a.clip and not a.method:
        p.error("--clip goes with --method")
    method = METHODS / f"{a.method}.yaml"
    if a.method and not method.is_file():
        near = get_close_matches(a.method, [path.stem for path in METHODS.glob("*.yaml")], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--method {a.method}: no such file in configs/method{hint}")
    if a.clip and not a.clip.is_file():
        raise UserError(f"--clip {a.clip}: no such file")
    for run in a.runs:
        check_run_folder(run)
    if a.out.suffix not in (".pdf", ".svg"):
        check_picture_name(a.out)
    check_writable(a.out.parent)
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.pictures.masks import show_kinds, show_method, show_runs

    make_folder(a.out.parent)
    if a.kinds:
        show_kinds(a.out)
    elif a.method:
        show_method(method, a.clip, a.out)
    else:
        show_runs(a.runs, a.out, a.clips)


if __name__ == "__main__":
    run_cli(main)

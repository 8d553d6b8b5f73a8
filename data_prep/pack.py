"""Packs a corpus into shards: `vidssl pack SRC OUT`.

A plan, made before any file is packed, holds everything that decides the bytes: which file goes to which data
set and shard, and how it is encoded. Each shard is written under a temporary name and renamed, so a run that
was killed resumes where it stopped. The result depends neither on that nor on the number of workers or the
engine.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_prep.filters import NEAR_PREFIX, Filters
from data_prep.recipe import add_encoding_options, check_rate_option, make_recipe
from data_prep.sources import SOURCES, FolderOptions, read_source
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import LOCK_FILE, check_writable, claim_folder
from vidssl.core.launch import check_one_process
from vidssl.core.log import logger

# Prefixes of file names in OUT before it has a plan.json
WRITTEN_BEFORE_PLAN = ("plan.json.", NEAR_PREFIX, LOCK_FILE)


def check_out_is_free(out: Path) -> None:
    """Raises UserError unless OUT is new, empty, or the folder of a pack."""
    if os.path.exists(out / "plan.json") or not os.path.exists(out):
        return
    if not out.is_dir() or any(not p.name.startswith(WRITTEN_BEFORE_PLAN) for p in out.iterdir()):
        raise UserError(f"{out}: holds something else already; choose a new folder")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidssl pack",
        description="Pack a folder of videos or images into shards with an index.",
    )
    add = parser.add_argument
    add("src", type=Path, help="FOLDER/<class>/<file>, a folder with labels.csv, or the files of a data set")
    add("out", type=Path, help="a new folder, or the folder of an interrupted pack")
    add("--source", default="folder", metavar="KIND", help=f"source format: {', '.join(SOURCES)}")
    add(
        "--annotations",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="annotation files of the source",
    )
    add_folder_options(parser)
    add("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes of the local engine")
    add("--engine", choices=("local", "ray"), default="local", help="ray: a Ray cluster, one task per shard")
    add(
        "--samples-per-shard",
        type=int,
        default=0,
        help="maximum; default: a 16th of the samples, within 8 to 1000",
    )
    add("--test-fraction", type=float, default=0.0, help="split by group; every class stays in train")
    add("--seed", type=int, default=0, help="seed of the shuffle and of the split")
    add(
        "--timeout", type=float, default=120.0, help="seconds without progress until a file counts as hanging"
    )
    add(
        "--decoder",
        choices=("auto", "pyav"),
        default="auto",
        help="auto: PyAV, and decord where it alone decodes a file right",
    )
    add_encoding_options(parser)
    add_filter_options(parser)
    return parser


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "layout: answers to what folders and lists do not say themselves (docs/data.md)"
    ).add_argument
    splits = "folders or lists called train, val, test are splits (folders) or not (none); default: auto"
    add("--splits", choices=("auto", "folders", "none"), default="auto", help=splits)
    rate = "folders of numbered images are videos of this many frames per second"
    add("--frame-rate", metavar="RATE", help=rate)
    add("--frames", choices=("images",), help="numbered images are images, not the frames of a video")
    thumbnails = "images beside the video that they show; default: leave-out"
    add("--thumbnails", choices=("leave-out", "keep"), default="leave-out", help=thumbnails)


def add_filter_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "filters; rejected.jsonl lists what is dropped, with the measured value"
    )
    add = group.add_argument
    add("--min-seconds", type=float, default=0.0, metavar="SECONDS", help="minimum duration of a clip")
    add("--min-side", type=int, default=0, metavar="PIXELS", help="minimum short side of the source")
    luma: dict[str, Any] = {"type": float, "nargs": "?", "default": 0.0, "metavar": "LUMA"}
    add("--drop-dark", const=16.0, help="drop clips with a mean luma under this (16)", **luma)
    static = "drop clips with a mean luma change from one of 16 frames to the next under this (0.5)"
    add("--drop-static", const=0.5, help=static, **luma)
    duplicates = "keep the first of files with the same bytes; near: also of those with the same pictures"
    add("--drop-duplicates", nargs="?", const="bytes", choices=("bytes", "near"), help=duplicates)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments, with a Recipe (or None) as `recipe` and Filters as `filters`."""
    args = make_parser().parse_args(argv)
    if args.workers < 1 or args.samples_per_shard < 0 or not 0 <= args.test_fraction < 1 or args.timeout <= 0:
        raise UserError(
            "--workers and --timeout must be positive, --samples-per-shard >= 0, --test-fraction in [0,1)"
        )
    if args.frame_rate is not None:
        check_rate_option("--frame-rate", args.frame_rate)
        if args.frames:
            raise UserError("--frame-rate or --frames images, not both")
    args.folder_options = FolderOptions(args.splits, args.thumbnails, args.frames, args.frame_rate)
    args.recipe = make_recipe(args)
    args.filters = Filters(args.min_seconds, args.min_side, args.drop_dark, args.drop_static)
    if min(args.filters) < 0:
        raise UserError("--min-seconds, --min-side, --drop-dark and --drop-static must be >= 0")
    return args


def main(argv: list[str]) -> None:
    check_one_process(argv)
    args = parse_arguments(argv)
    if args.out.resolve().is_relative_to(args.src.resolve()):
        raise UserError(f"{args.out}: lies inside {args.src}; choose a folder outside the source")
    if args.decoder == "auto" and not find_spec("decord"):
        logger.warning("decord is not installed: files are measured with PyAV alone (--decoder pyav)")
        args.decoder = "pyav"
    check_writable(args.out)
    check_out_is_free(args.out)
    with claim_folder(args.out, "pack"):
        source = read_source(args.src, args.source, args.annotations, args.folder_options)
        # Importing PyAV, and torch through webdataset, takes seconds: mistakes are answered before.
        from data_prep.packing import pack_source

        pack_source(source, args)


if __name__ == "__main__":
    run_cli(main)

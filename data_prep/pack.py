"""Packs a corpus into shards: `python -m data_prep.pack SRC OUT`.

A plan, made before any file is packed, holds everything that decides the bytes: which file goes to which data
set and shard, and how it is encoded. Each shard is written under a temporary name and renamed, so a run that
was killed resumes where it stopped. The result depends neither on that nor on the number of workers or the
engine.
"""

import argparse
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep import engine
from data_prep.encode import Recipe
from data_prep.filters import Filters
from data_prep.index import read_lines, write_lines
from data_prep.plan import NEAR_PREFIX, Plan, make_plan
from data_prep.report import write_dataset_report
from data_prep.sources import SOURCES, FolderOptions, SourceListing, read_source
from data_prep.summary import (
    Tally,
    left_out_lines,
    make_summary,
    read_rejections,
    summary_lines,
    write_summary,
)
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import LOCK_FILE, check_writable, claim_folder, make_folder
from vidssl.core.log import logger
from vidssl.data.format import dumps, dumps_index, read_index, shard_entry

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
# Prefixes of file names in OUT before it has a plan.json
WRITTEN_BEFORE_PLAN = ("plan.json.", NEAR_PREFIX, LOCK_FILE)


def check_out_is_free(out: Path) -> None:
    """Raises UserError unless OUT is new, empty, or the folder of a pack."""
    if os.path.exists(out / "plan.json") or not os.path.exists(out):
        return
    if not out.is_dir() or any(not p.name.startswith(WRITTEN_BEFORE_PLAN) for p in out.iterdir()):
        raise UserError(f"{out}: holds something else already; choose a new folder")


def open_out(out: Path, plan: Plan) -> bool:
    """Makes OUT with its plan.json, or checks that it has the same plan. Returns whether all data sets are
    finished."""
    plan_file = out / "plan.json"
    if os.path.exists(plan_file):
        try:
            stored = json.loads(plan_file.read_text(encoding="utf-8")).get("plan")
        except (ValueError, AttributeError):
            stored = None
        if stored != plan.digest:
            raise UserError(
                f"{out}: holds a pack of other files or with other options; choose another folder"
            )
        return all((folder / "index.json").exists() for folder in plan.datasets)
    make_folder(out)
    write_lines(plan_file, [dumps({"version": 1, "plan": plan.digest, "options": plan.options})])
    return False


def write_shards(plan: Plan, args: argparse.Namespace) -> None:
    """Writes every shard that is not finished."""
    total = sum(len(shard.items) for shard in plan.shards())
    with tqdm(desc="pack", unit=" files", total=total) as bar:
        engine.make(plan, args.engine, args.workers, args.timeout, bar.update)


def write_indexes(plan: Plan) -> None:
    """Writes rejected.jsonl and, last, index.json of every data set."""
    for folder, shards in plan.datasets.items():
        rejected = list(plan.rejected.get(folder, []))
        for shard in shards:
            rejected += [json.loads(line) for line in read_lines(shard.rejections)]
        rejected.sort(key=lambda record: (record["path"], record.get("start", 0.0), record.get("end", 0.0)))
        write_lines(folder / "rejected.jsonl", map(dumps, rejected))
        samples = {shard.tar: len(read_lines(shard.tar.with_suffix(".jsonl"))) for shard in shards}
        entries = [shard_entry(tar, n) for tar, n in samples.items() if n]
        made_by = {**plan.options, "plan": plan.digest, "bytes_in": plan.bytes_in[folder]}
        write_lines(folder / "index.json", [dumps_index(plan.classes, entries, len(rejected), made_by)])


def clean_up(plan: Plan) -> None:
    """Writes the reports and removes the files that only a resumed run needs. Also run if all is finished
    already."""
    for folder, shards in plan.datasets.items():
        if not (folder / "report.json").exists():
            write_dataset_report(folder)
        for file in [shard.rejections for shard in shards] + list(folder.glob("*.tmp")):
            file.unlink(missing_ok=True)


def summarise(plan: Plan, source: SourceListing) -> None:
    """Writes summary.json of each data set, and prints what the source and each data set hold."""
    ignored = Tally()
    ignored.merge(source.ignored)
    print(f"{plan.source}: {len(source.items)} items in {len(plan.datasets)} data sets")
    for note in source.notes:
        print(f"  {note}")
    print(*left_out_lines(ignored.entries()), sep="\n", end="\n" if ignored else "")
    for folder in plan.datasets:
        index = read_index(folder)
        left_out = read_rejections(folder)
        shards = [(folder / entry["name"]).with_suffix(".jsonl") for entry in index["shards"]]
        records = (json.loads(line) for shard in shards for line in read_lines(shard))
        summary = make_summary(records, index["classes"], left_out)
        write_summary(folder, {**summary, "notes": list(source.notes), "ignored": ignored.entries()})
        megabytes = sum(entry["bytes"] for entry in index["shards"]) / 1e6
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
        rejected = (
            f"{left_out.total()} rejected ({counts}): see rejected.jsonl" if counts else "none rejected"
        )
        shards_line = f"{index['samples']} samples in {len(shards)} shards, {megabytes:.1f} MB"
        print(f"{folder}: {shards_line}; {rejected}")
        print(*summary_lines(summary), sep="\n")


def check_not_empty(plan: Plan, out: Path) -> None:
    """Raises UserError if no data set has a sample; warns of each that has none."""
    empty = [folder for folder in plan.datasets if not read_index(folder)["samples"]]
    for folder in empty if len(empty) < len(plan.datasets) else ():
        logger.warning(f"{folder}: holds no sample: {_causes([folder], plan)}")
    if len(empty) == len(plan.datasets):
        raise UserError(f"{plan.source}: no sample is left: {_causes(empty, plan)}; see {out}/rejected.jsonl")


def _causes(folders: list[Path], plan: Plan) -> str:
    """Says which filters dropped how many files or clips, and what else was left out."""
    reasons = Tally()
    for folder in folders:
        reasons.merge(read_rejections(folder))
    options = filter_options(plan)
    return ", ".join(
        f"{options[reason]} drops {n} ({reason})" if reason in options else f"{n} {reason}"
        for reason, n in reasons.most_common()
    )


def filter_options(plan: Plan) -> dict[str, str]:
    """Returns the reason of a rejection -> the option with its value, of the filters."""
    filters = plan.filters
    return {
        "too_short": f"--min-seconds {filters.min_seconds:g}",
        "too_small": f"--min-side {filters.min_side}",
        "too_dark": f"--drop-dark {filters.dark:g}",
        "static": f"--drop-static {filters.static:g}",
        "duplicate": f"--drop-duplicates {plan.options['drop_duplicates']}",
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.pack",
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
        help="auto: decord for files that it decodes right",
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


def add_encoding_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "re-encoding (on if any of these is given; else files keep their bytes)"
    ).add_argument
    add("--short-side", type=int, metavar="PIXELS", help="maximum short side; never enlarged")
    rates = "frames per second, such as 8 or 30000/1001; default: each file's own times"
    add("--fps", metavar="RATE", help=rates)
    add("--keyframe-every", type=int, metavar="FRAMES", help="distance of key frames; default 8")
    add("--crf", type=int, help="x264 quality: 1 (best) to 51; default 23")
    add("--preset", choices=PRESETS, help="x264 preset: slower ones write fewer bytes; default medium")
    add("--window", type=float, metavar="SECONDS", help="cut into clips of this length")
    add(
        "--hop",
        type=float,
        metavar="SECONDS",
        help="from one window's start to the next; default: no overlap",
    )
    add("--scenes", action="store_true", default=None, help="cut at abrupt changes of the picture")


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


def check_rate_option(option: str, rate: str) -> None:
    """Raises UserError unless `rate` is a number of frames per second."""
    try:
        if not 0 < Fraction(rate) <= 1000:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{option} {rate}: expected a rate such as 8, 12.5 or 30000/1001") from None


def make_recipe(args: argparse.Namespace) -> Recipe | None:
    """Returns the recipe of the re-encoding options; None if there are none, so that files keep their
    bytes."""
    given = {name: getattr(args, name) for name in Recipe._fields if getattr(args, name) is not None}
    recipe = Recipe(**given)
    if (recipe.short_side is not None and recipe.short_side < 2) or recipe.keyframe_every < 1:
        raise UserError("--short-side must be at least 2 pixels, --keyframe-every at least 1 frame")
    if not 1 <= recipe.crf <= 51:
        raise UserError(f"--crf {recipe.crf}: expected 1 to 51")
    if recipe.fps is not None:
        check_rate_option("--fps", recipe.fps)
    is_short = any(seconds is not None and seconds < 0.01 for seconds in (recipe.window, recipe.hop))
    if is_short or (recipe.hop and not recipe.window):
        raise UserError("--window and --hop must be at least 0.01 s, and --hop needs --window")
    if recipe.window and recipe.scenes:
        raise UserError("--window or --scenes, not both")
    return recipe if given else None


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.out.resolve().is_relative_to(args.src.resolve()):
        raise UserError(f"{args.out}: lies inside {args.src}; choose a folder outside the source")
    check_writable(args.out)
    check_out_is_free(args.out)
    with claim_folder(args.out, "pack"):
        pack_source(args)


def pack_source(args: argparse.Namespace) -> None:
    """Packs the source into OUT, or continues that."""
    source = read_source(args.src, args.source, args.annotations, args.folder_options)
    plan = make_plan(source, args.src, args.out, args)
    if open_out(args.out, plan):
        print(f"{args.out}: already complete")
    else:
        write_shards(plan, args)
        write_indexes(plan)
    clean_up(plan)
    summarise(plan, source)
    check_not_empty(plan, args.out)


if __name__ == "__main__":
    run_cli(main)

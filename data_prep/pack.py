"""Corpus -> shards: `python -m data_prep.pack SRC OUT`.

Everything that decides the bytes is in a plan, made before any file is packed: which file goes to which data set
and shard, and what is done with it. Shards are then made one after the other, each written beside and renamed into
place, so a run that was killed goes on where it stopped, and the result depends neither on that nor on the number of
workers or on the engine.
"""

import argparse
import json
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from data_prep import engine
from data_prep.encode import Recipe
from data_prep.filters import Filters
from data_prep.index import read_lines, write_lines
from data_prep.plan import NEAR_PREFIX, Plan, make_plan
from data_prep.report import write_report
from data_prep.sources import SOURCES, read_source
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder
from vidssl.data.format import dumps, dumps_index, read_index, shard_entry

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
FIRST = ("plan.json.tmp", NEAR_PREFIX)  # what is written before plan.json


def check_free(out: Path) -> None:
    """OUT is new, or that of a pack."""
    if os.path.exists(out / "plan.json") or not os.path.exists(out):
        return
    if not out.is_dir() or any(not p.name.startswith(FIRST) for p in out.iterdir()):
        raise UserError(f"{out}: holds something else already; choose a new folder")


def open_out(out: Path, plan: Plan) -> bool:
    """Make OUT, or find this very plan in it; whether all its data sets are finished."""
    file = out / "plan.json"
    if os.path.exists(file):
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("plan")
        except (ValueError, AttributeError):
            found = None
        if found != plan.digest:
            raise UserError(
                f"{out}: holds a pack of other files or with other options; choose another folder"
            )
        return all((folder / "index.json").exists() for folder in plan.datasets)
    make_folder(out)
    write_lines(file, [dumps({"version": 1, "plan": plan.digest, "options": plan.options})])
    return False


def pack(plan: Plan, args: argparse.Namespace) -> None:
    """Make every shard that is not there yet."""
    with tqdm(desc="pack", unit=" files", total=sum(len(s.items) for s in plan.shards())) as bar:
        engine.make(plan, args.engine, args.workers, args.timeout, bar.update)


def finish(plan: Plan) -> None:
    """rejected.jsonl and, last, index.json of every data set."""
    for folder, shards in plan.datasets.items():
        rejected = list(plan.rejected.get(folder, []))
        for shard in shards:
            rejected += [json.loads(line) for line in read_lines(shard.rejections)]
        rejected.sort(key=lambda r: (r["path"], r.get("start", 0.0), r.get("end", 0.0)))
        write_lines(folder / "rejected.jsonl", map(dumps, rejected))
        full = [(s.tar, len(read_lines(s.tar.with_suffix(".jsonl")))) for s in shards]
        entries = [shard_entry(tar, n) for tar, n in full if n]
        made_by = {**plan.options, "plan": plan.digest, "bytes_in": plan.bytes_in[folder]}
        write_lines(folder / "index.json", [dumps_index(plan.classes, entries, len(rejected), made_by)])


def clean(plan: Plan) -> None:
    """The report; and away with what only a resumed run needs. Done last; again by a run that finds all finished."""
    for folder, shards in plan.datasets.items():
        if not (folder / "report.json").exists():
            write_report(folder)
        for left in [s.rejections for s in shards] + list(folder.glob("shard-*.tmp")):
            left.unlink(missing_ok=True)


def summarise(plan: Plan) -> None:
    """A line for each data set."""
    for folder in plan.datasets:
        index = read_index(folder)
        reasons = Counter(json.loads(line)["reason"] for line in read_lines(folder / "rejected.jsonl"))
        size = sum(s["bytes"] for s in index["shards"])
        print(
            f"{folder}: {index['samples']} samples in {len(index['shards'])} shards, {size / 1e6:.1f} MB",
            end="",
        )
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        print(f"; {sum(reasons.values())} rejected ({why}): see rejected.jsonl" if why else "; none rejected")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.pack",
        description="Pack a folder of videos or images into shards with an index.",
    )
    add = parser.add_argument
    add("src", type=Path, help="FOLDER/<class>/<file>, a folder with labels.csv, or the files of a data set")
    add("out", type=Path, help="a new folder (or that of a pack that was interrupted)")
    add("--source", default="folder", metavar="KIND", help=f"whose annotations: {', '.join(SOURCES)}")
    add("--annotations", type=Path, nargs="+", default=[], metavar="FILE", help="its annotation files")
    add("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes of the local engine")
    add("--engine", choices=("local", "ray"), default="local", help="ray: a Ray cluster, one task a shard")
    add("--samples-per-shard", type=int, default=0, help="default: for at least 16 shards, 8 to 1000")
    add("--test-fraction", type=float, default=0.0, help="divide into train and test by group")
    add("--seed", type=int, default=0, help="of the shuffle and of the division")
    add(
        "--timeout", type=float, default=120.0, help="seconds without progress until a file counts as hanging"
    )
    add("--decoder", choices=("auto", "pyav"), default="auto", help="auto: decord where it proves right")
    coding = parser.add_argument_group("re-encoding (any of these turns it on; else files keep their bytes)")
    add = coding.add_argument
    add("--short-side", type=int, metavar="PIXELS", help="at most; never enlarged")
    add(
        "--fps",
        metavar="RATE",
        help="frames a second, such as 8 or 30000/1001; default: each file's own times",
    )
    add("--keyframe-every", type=int, metavar="FRAMES", help="default 8")
    add("--crf", type=int, help="quality of x264: 1 (best) to 51, default 23")
    add("--preset", choices=PRESETS, help="of x264: bytes against time, default medium")
    add("--window", type=float, metavar="SECONDS", help="cut into clips of this length")
    add(
        "--hop",
        type=float,
        metavar="SECONDS",
        help="from the start of a window to the next; default: no overlap",
    )
    add("--scenes", action="store_true", default=None, help="cut where the picture changes at once")
    dropping = parser.add_argument_group("filters; each drop is in rejected.jsonl with its measured value")
    add = dropping.add_argument
    add("--min-seconds", type=float, default=0.0)
    add("--min-side", type=int, default=0, metavar="PIXELS", help="of the source's short side")
    add(
        "--drop-dark",
        type=float,
        nargs="?",
        const=16.0,
        default=0.0,
        metavar="LUMA",
        help="mean under this (16)",
    )
    add("--drop-static", type=float, nargs="?", const=0.5, default=0.0, metavar="LUMA",
        help="mean change from one of 16 frames to the next under this (0.5)")  # fmt: skip
    add("--drop-duplicates", nargs="?", const="bytes", choices=("bytes", "near"),
        help="of files with the same bytes keep the first; near: with the same pictures, too")  # fmt: skip
    args = parser.parse_args(argv)
    if args.workers < 1 or args.samples_per_shard < 0 or not 0 <= args.test_fraction < 1 or args.timeout <= 0:
        raise UserError(
            "--workers and --timeout must be positive, --samples-per-shard >= 0, --test-fraction in [0,1)"
        )
    args.recipe = _recipe(args)
    args.filters = Filters(args.min_seconds, args.min_side, args.drop_dark, args.drop_static)
    if min(args.filters) < 0:
        raise UserError("--min-seconds, --min-side, --drop-dark and --drop-static must be >= 0")
    return args


def _recipe(args: argparse.Namespace) -> Recipe | None:
    """None: files keep their bytes."""
    given = {name: getattr(args, name) for name in Recipe._fields if getattr(args, name) is not None}
    recipe = Recipe(**given)
    if (recipe.short_side is not None and recipe.short_side < 2) or recipe.keyframe_every < 1:
        raise UserError("--short-side must be at least 2 pixels, --keyframe-every at least 1 frame")
    if not 1 <= recipe.crf <= 51:
        raise UserError(f"--crf {recipe.crf}: expected 1 to 51")
    try:
        if recipe.fps is not None and not 0 < Fraction(recipe.fps) <= 1000:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--fps {recipe.fps}: expected a rate such as 8, 12.5 or 30000/1001") from None
    if min([1.0, *(t for t in (recipe.window, recipe.hop) if t is not None)]) < 0.01 or (
        recipe.hop and not recipe.window
    ):
        raise UserError("--window and --hop must be at least 0.01 s, and --hop needs --window")
    if recipe.window and recipe.scenes:
        raise UserError("--window or --scenes, not both")
    return recipe if given else None


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if args.out.resolve().is_relative_to(args.src.resolve()):
        raise UserError(f"{args.out}: lies inside {args.src}; choose a folder outside the source")
    check_writable(args.out)
    check_free(args.out)
    source = read_source(args.src, args.source, args.annotations)
    plan = make_plan(source, args.src, args.out, args)
    if source.ignored:
        print(f"ignored {sum(source.ignored.values())} files by extension: "
              + ", ".join(f"{n} {ext}" for ext, n in source.ignored.most_common()))  # fmt: skip
    if source.rejected:
        print(f"{args.src}: {len(source.rejected)} files are missing, of unknown kind or not named in UTF-8")
    if open_out(args.out, plan):
        print(f"{args.out}: is finished already")
    else:
        pack(plan, args)
        finish(plan)
    clean(plan)
    summarise(plan)
    if not any(read_index(folder)["samples"] for folder in plan.datasets):
        raise UserError(f"{args.src}: no file in it can be decoded; see {args.out}/rejected.jsonl")


if __name__ == "__main__":
    run_cli(main)

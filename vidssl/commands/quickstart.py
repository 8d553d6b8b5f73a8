"""Runs the whole pipeline in minutes: videos, shards, two pre-trained encoders, probes, a table, a report.

vidssl quickstart                a small corpus is rendered
vidssl quickstart FOLDER         on your videos: FOLDER/<class>/<file>, or FOLDER/labels.csv

Writes report.html, summary.json, masks.png, curves.png and accuracy.png into runs/quickstart
(runs/quickstart_FOLDER) of the current folder. Every step is a command of its own (vidssl synthetic, pack,
train, probe, report), whose output is in OUT/logs, and is skipped if its result exists: the same command goes
on where it was cut off.
"""

import argparse
import contextlib
import os
import shlex
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources import SourceListing, read_source
from vidssl.config import load_config
from vidssl.core.cpus import available_cpus
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, claim_folder
from vidssl.core.launch import check_one_process
from vidssl.core.log import logger
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.quickstart.programs import (
    METHODS,
    Quickstart,
    probe_file,
    quick_training,
    quickstart_jobs,
    training_files,
)
from vidssl.quickstart.progress import TrainingProgress
from vidssl.quickstart.results import add_times, result_table, summary, write_results_json
from vidssl.training.schema import TrainConfig
from vidssl.zoo.jobs import PYTHON, run_jobs
from vidssl.zoo.programs import check_finished

MASKED_CLIPS = 3  # in masks.png
TRAIN = 3000
TEST = 800
LABELLED = 1200


def parse_quickstart(argv: list[str]) -> Quickstart:
    lines = (__doc__ or "").split("\n")
    p = argparse.ArgumentParser(
        prog="vidssl quickstart",
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folder", nargs="?", type=Path, help="your videos; none: a corpus is rendered")
    p.add_argument("--out", type=Path, help="default: runs/quickstart, or runs/quickstart_NAME for a folder")
    p.add_argument("--train", type=int, default=TRAIN, help=f"videos rendered for training ({TRAIN})")
    p.add_argument("--test", type=int, default=TEST, help=f"videos rendered for testing ({TEST})")
    p.add_argument("--labelled", type=int, default=LABELLED, help=f"of those for training ({LABELLED})")
    setting: dict[str, Any] = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    p.add_argument("--set", help="override for both trainings", **setting)
    p.add_argument("--probe", help="override for the probes", **setting)
    a = p.parse_args(argv)
    if a.folder is not None and not a.folder.is_dir():
        raise UserError(f"{a.folder}: no such folder")
    for option, default in (("train", TRAIN), ("test", TEST), ("labelled", LABELLED)):
        number = getattr(a, option)
        if a.folder is not None and number != default:
            raise UserError(f"--{option}: is of rendered videos; {a.folder} is taken whole")
        if number < 1:
            raise UserError(f"--{option} {number}: must be 1 or more")
    name = f"quickstart_{a.folder.resolve().name}" if a.folder else "quickstart"
    out = (a.out or Path("runs") / name).absolute()
    videos = a.folder.absolute() if a.folder else None
    check_writable(out)
    if videos and out.resolve().is_relative_to(videos.resolve()):
        raise UserError(f"--out {out}: lies inside {a.folder}; choose a folder outside it")
    quick = Quickstart(out, videos, a.train, a.test, a.labelled, a.set, a.probe)
    check_settings(quick)
    return quick


def check_settings(quick: Quickstart) -> None:
    """Raises UserError for a setting that a program would refuse, or after which another would not find what
    it reads."""
    there = "/"  # in place of folders that are made later
    for method in METHODS:
        with under_option(f"--set: {method}"):
            given = [f"run.out={quick.run(method)}", f"data.train={there}"]
            files = training_files(quick, method)
            load_config([*files, *given, *quick.settings], TrainConfig).check_before_work()
            # of other lengths than those that are given
            cfg = load_config(quick_training(quick, method, 1).command[len(PYTHON) + 1 :], TrainConfig)
            if cfg.run.out != str(quick.run(method)):
                raise UserError("run.out: is decided by --out")
            if not cfg.run.snapshots:
                raise UserError("run.snapshots: the snapshots are probed; leave it out")
    with under_option("--probe"):
        out = str(quick.probe("x"))
        given = [f"encoder={there}", f"out={out}", f"data.train={there}", f"data.test={there}"]
        probe = load_config([probe_file(quick), *given, *quick.probe_settings], ProbeConfig)
        probe.check_before_work()
        if (probe.encoder, probe.out) != (there, out):
            raise UserError("encoder and out: each probe has its own; leave them out")


@contextlib.contextmanager
def under_option(option: str) -> Iterator[None]:
    """Names the option before what is wrong."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{option}: {e}") from None


def main(argv: list[str]) -> None:
    check_one_process(argv)
    quick = parse_quickstart(argv)
    began_s = time.monotonic()
    with claim_folder(quick.out, "quickstart"):
        label = prepare_data(quick)
        has_news = run_programs(quick, label)
        show_results(quick, has_news)
    minutes = (time.monotonic() - began_s) / 60
    print(f"\nin {minutes:.1f} minutes\n{next_steps(quick)}")


def prepare_data(quick: Quickstart) -> str:
    """Renders the videos if there are none, and packs them. Returns the first label set."""
    from data_prep import pack
    from data_prep.synthetic import make_corpus

    began_s = time.monotonic()
    took_s = {}
    if quick.videos is None and not (quick.source / "labels.csv").exists():
        workers = available_cpus()
        make_corpus(quick.source, quick.train, quick.test, quick.labelled, workers=workers)
        took_s["render"] = time.monotonic() - began_s
    found = read_source(quick.source)
    test = test_split(found, quick.source)
    label = common_label(found, test, quick.source)
    check_rendered(quick, found)
    parts = [quick.shards(name) for name in ("train", test)]
    is_packed = all((folder / "index.json").exists() for folder in parts)
    began_s = time.monotonic()
    split = [] if any(item.split for item in found.items) else ["--test-fraction", "0.3"]
    # What was rendered a moment ago need not be compared with a second decoder
    decoder = [] if quick.videos else ["--decoder", "pyav"]
    # Also where the shards are there: they may be of other files
    pack.main([str(quick.source), str(quick.out / "shards"), *split, *decoder])
    if not is_packed:
        took_s["pack"] = time.monotonic() - began_s
    for folder in parts:
        if not (folder / "index.json").exists():
            raise UserError(f"{quick.source}: no file of {folder.name} could be packed; see {folder.parent}")
    add_times(quick.out / "times.json", took_s)
    return label


def check_rendered(quick: Quickstart, found: SourceListing) -> None:
    """Raises UserError if an earlier call has rendered other numbers of videos."""
    if quick.videos is not None:
        return
    train = [item for item in found.items if item.split == "train"]
    labelled = sum(bool(item.labels) for item in train)
    for option, given, there in (
        ("--train", quick.train, len(train)),
        ("--test", quick.test, len(found.items) - len(train)),
        ("--labelled", min(quick.labelled, quick.train), labelled),
    ):
        if given != there:
            raise UserError(
                f"{option} {given}: {quick.source} was rendered with {there}; give the same, or another --out"
            )


def test_split(found: SourceListing, source: Path) -> str:
    """The split that probes are tested on: test, or val where there is none. Raises UserError if the source
    names its splits, but has nothing to train or test on."""
    splits = {item.split for item in found.items if item.split}
    if not splits or {"train", "test"} <= splits:
        return "test"
    if not {"train", "val"} <= splits:
        raise UserError(
            f"{source}: its splits are {', '.join(sorted(splits))}; expected train and test (or val), "
            "or none: a part is held out then"
        )
    logger.info(f"{source}: there is no test, so the probes are tested on val")
    return "val"


def common_label(found: SourceListing, test: str, source: Path) -> str:
    """The first label set of which train and test share a class. Raises UserError if there is none."""
    if not found.label_sets:
        raise UserError(
            f"{source}: no labels, so nothing to probe; expected FOLDER/<class>/<file>, or labels.csv"
        )
    classes: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for item in found.items:
        for name, label in item.labels.items():
            classes[name, item.split].add(label)
    train, tested = ("train", test) if any(item.split for item in found.items) else (None, None)
    for name in found.label_sets:
        if classes[name, train] & classes[name, tested]:
            return name
    both = [name for name in found.label_sets if classes[name, train] and classes[name, tested]]
    if both:
        raise UserError(
            f"{source}: no class of '{both[0]}' is in both train and {test}, so nothing to probe; train has "
            f"{min(classes[both[0], train])!r}, {test} has {min(classes[both[0], tested])!r}"
        )
    raise UserError(
        f"{source}: no label in both train and {test}, so nothing to probe; there is "
        f"{', '.join(found.label_sets)}"
    )


def run_programs(quick: Quickstart, label: str) -> bool:
    """Trains and probes, and returns whether a probe was still to do. Raises UserError for the first program
    that failed."""
    import torch

    cores = available_cpus()
    # Small models use one core each better than all of them one after the other
    at_once = 1 if torch.cuda.is_available() else min(len(METHODS), cores)
    with TrainingProgress(quick) as progress:
        jobs = quickstart_jobs(quick, label, max(1, cores // at_once))
        check_finished(jobs)
        outcomes = run_jobs(jobs, at_once, look=progress.look)
    done = {name: o.seconds for name, o in outcomes.items() if o.status == "done" and o.seconds}
    add_times(quick.out / "times.json", done)
    for name, outcome in outcomes.items():
        if outcome.status != "done":
            raise UserError(f"{name} failed: {outcome.text}")
    return any(name not in METHODS for name in done)


def show_results(quick: Quickstart, has_news: bool) -> None:
    """Prints the table, and writes the pictures and the report if they are missing or old."""
    began_s = time.monotonic()
    rows = summary(quick)
    write_results_json(quick.out / "summary.json", rows)
    print(f"\n{result_table(rows)}\n")
    page = quick.out / "report.html"
    if page.exists() and not has_news:
        return
    from vidssl.commands import report
    from vidssl.pictures.masks import show_runs
    from vidssl.quickstart.plots import draw_bar_table, draw_curves

    draw_curves(quick)
    draw_bar_table(quick, rows)
    # Both methods draw the same masks
    show_runs([quick.run(METHODS[0])], quick.out / "masks.png", MASKED_CLIPS)
    print(f"wrote {quick.out}/summary.json, masks.png, curves.png, accuracy.png")
    report.main([*(str(quick.run(method)) for method in METHODS), "-o", str(page)])
    add_times(quick.out / "times.json", {"pictures": time.monotonic() - began_s})


def next_steps(quick: Quickstart) -> str:
    encoder = shlex.quote(os.path.relpath(quick.run(METHODS[0])))
    return f"""the report, for any browser: {quick.out / "report.html"}

Next, with your own videos (FOLDER/<class>/<file>, or a folder with labels.csv):
  vidssl quickstart FOLDER                                 the same on them
  vidssl adapt --from {encoder} --videos FOLDER --out runs/adapted
                                                           also from a published checkpoint
  vidssl pack FOLDER runs/shards --test-fraction 0.2       then vidssl train --help"""


if __name__ == "__main__":
    run_cli(main)

"""Packs a source that has been read: plan, shards, indexes, reports."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import engine
from data_prep.index import Contents, read_contents, read_lines, write_lines
from data_prep.plan import Plan, are_numbers, make_plan
from data_prep.report import write_dataset_report
from data_prep.sources import SourceListing
from data_prep.summary import (
    Tally,
    count_rejected,
    left_out_lines,
    make_summary,
    shortened,
    summary_lines,
    write_summary,
)
from vidssl.core.errors import UserError
from vidssl.core.io import make_folder, read_json_rows
from vidssl.core.log import logger
from vidssl.core.progress import Progress
from vidssl.core.suggestions import counted
from vidssl.data.format import dumps, dumps_index, shard_entry
from vidssl.data.metadata import group_in


def pack_source(source: SourceListing, args: argparse.Namespace) -> None:
    """Packs the files of a source into OUT, or continues that."""
    plan = make_plan(source, args.src, args.out, args)
    if open_out(args.out, plan):
        print(f"{args.out}: already complete")
    else:
        write_shards(plan, args)
        write_indexes(plan)
    contents = {folder: read_contents(folder) for folder in plan.datasets}
    clean_up(plan, contents)
    summarise(plan, source, contents)
    check_not_empty(plan, args.out, contents)


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
    unfinished = [shard for shard in plan.shards() if not shard.is_finished()]
    total, left = (sum(len(shard.items) for shard in shards) for shards in (plan.shards(), unfinished))
    with Progress("pack", total, "files", done=total - left) as progress:
        engine.make(plan, unfinished, args.engine, args.workers, args.timeout, progress.update)


def write_indexes(plan: Plan) -> None:
    """Writes rejected.jsonl and, last, index.json of every data set."""
    for folder, shards in plan.datasets.items():
        rejected = list(plan.rejected.get(folder, []))
        for shard in shards:
            rejected += read_json_rows(shard.rejections)
        rejected.sort(key=lambda record: (record["path"], record.get("start", 0.0), record.get("end", 0.0)))
        write_lines(folder / "rejected.jsonl", map(dumps, rejected))
        samples = {shard.tar: len(read_lines(shard.tar.with_suffix(".jsonl"))) for shard in shards}
        entries = [shard_entry(tar, n) for tar, n in samples.items() if n]
        made_by = {**plan.options, "plan": plan.digest, "bytes_in": plan.bytes_in[folder]}
        write_lines(folder / "index.json", [dumps_index(plan.classes, entries, len(rejected), made_by)])


def clean_up(plan: Plan, contents: Mapping[Path, Contents]) -> None:
    """Writes the reports and removes the files that only a resumed run needs. Also run if all is finished
    already."""
    for folder, shards in plan.datasets.items():
        if not (folder / "report.json").exists():
            write_dataset_report(folder, contents[folder])
        for file in [shard.rejections for shard in shards] + list(folder.glob("*.tmp")):
            file.unlink(missing_ok=True)


def summarise(plan: Plan, source: SourceListing, contents: Mapping[Path, Contents]) -> None:
    """Writes summary.json of each data set, and prints what the source and each data set hold."""
    ignored = Tally()
    ignored.merge(source.ignored)
    sets = counted(len(plan.datasets), "data set")
    print(f"{plan.source}: {counted(len(source.items), 'item')} in {sets}")
    for note in source.notes:
        print(f"  {note}")
    print(*left_out_lines(ignored.entries()), sep="\n", end="\n" if ignored else "")
    summaries = {}
    for folder, (index, records, rejections) in contents.items():
        left_out = count_rejected(rejections)
        summary = make_summary(records, index["classes"], left_out)
        write_summary(folder, {**summary, "notes": list(source.notes), "ignored": ignored.entries()})
        megabytes = sum(entry["bytes"] for entry in index["shards"]) / 1e6
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
        rejected = (
            f"{left_out.total()} rejected ({counts}): see rejected.jsonl" if counts else "none rejected"
        )
        shards = counted(len(index["shards"]), "shard")
        shards_line = f"{counted(index['samples'], 'sample')} in {shards}, {megabytes:.1f} MB"
        print(f"{folder}: {shards_line}; {rejected}")
        print(*summary_lines(summary), sep="\n")
        summaries[folder.name] = summary
    groups = {folder.name: [group_in(r["meta"]) for r in found.records] for folder, found in contents.items()}
    for line in (*classes_without_train(summaries), *groups_of_train(groups)):
        logger.warning(line)


def groups_of_train(groups: Mapping[str, Sequence[str | None]]) -> Iterator[str]:
    """Yields a line for each data set beside train with samples of groups that train has, too.

    groups: name of a data set -> group of each sample, or None.
    """
    in_train = set(groups.get("train", ())) - {None}
    for name, found in groups.items():
        shared = [group for group in found if group in in_train]
        if shared and name != "train":
            example = shortened(min(map(str, shared)))
            yield (
                f"{name}: {counted(len(shared), 'sample')} of {counted(len(set(shared)), 'group')} "
                f"(a recording, a person) that train has, too, such as {example}"
            )


def classes_without_train(summaries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields a line for each data set beside train whose samples have classes of which train has no sample.

    summaries: name of a data set -> contents of its summary.json. Numbers that mostly occur once are no
    classes; of joined tags ("a|b") each counts.
    """
    in_train = summaries.get("train", {"classes": {}})["classes"]
    for name, summary in summaries.items():
        for label_set, sizes in summary["classes"].items():
            trained = [class_name for class_name, n in in_train.get(label_set, {}).items() if n]
            tested = {class_name: n for class_name, n in sizes.items() if n}
            if name == "train" or not trained or are_numbers(tested):
                continue
            tags = {tag for class_name in trained for tag in class_name.split("|")}
            unseen = {c: n for c, n in tested.items() if not tags.issuperset(c.split("|"))}
            if unseen:
                first = max(unseen, key=lambda c: unseen[c])
                samples = counted(sum(unseen.values()), "sample")
                classes = counted(len(unseen), "class", "es")
                yield (
                    f"{name}: {samples} of {classes} of {label_set} without a sample in train, such as "
                    f"{shortened(first)}"
                )


def check_not_empty(plan: Plan, out: Path, contents: Mapping[Path, Contents]) -> None:
    """Raises UserError if no data set has a sample; warns of each that has none."""
    empty = {folder: found.rejected for folder, found in contents.items() if not found.records}
    for folder, rejected in empty.items() if len(empty) < len(contents) else ():
        logger.warning(f"{folder}: holds no sample: {_causes(rejected, plan)}")
    if len(empty) == len(contents):
        causes = _causes([record for rejected in empty.values() for record in rejected], plan)
        raise UserError(f"{plan.source}: no sample is left: {causes}; see {out}/rejected.jsonl")


def _causes(rejected: list[dict], plan: Plan) -> str:
    """Says which filters dropped how many files or clips, and what else was left out."""
    reasons = count_rejected(rejected)
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

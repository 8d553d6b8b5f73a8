"""Which file goes to which data set and shard, decided before any is packed: all that decides the bytes."""

import argparse
import hashlib
import math
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import av

from data_prep.dedup import near_files, remembered
from data_prep.encode import Recipe, Span
from data_prep.filters import Filters, find_identical_files
from data_prep.index import class_lists, sample_key
from data_prep.sources import SourceItem, SourceListing
from vidssl.core.errors import UserError
from vidssl.core.splits import GroupSelection, shuffle_key
from vidssl.data.format import dumps

NEAR = "near-"  # how the files begin that remember near duplicates
SHARD_BYTES = 1_000_000_000  # of source files; a shard is closed before it grows beyond that


class ShardPlan(NamedTuple):
    """One shard to be: `tar` is where it will stand. Items of one file follow each other."""

    tar: Path
    items: list[SourceItem]

    @property
    def rejections(self) -> Path:
        return self.tar.with_suffix(".rejected")

    def files(self) -> list[tuple[str, list[SourceItem]]]:
        """Each file with all that is cut from it."""
        return [(path, list(items)) for path, items in groupby(self.items, lambda item: item.path)]

    def is_finished(self) -> bool:
        """The tar is renamed into place last, so it vouches for the files beside it."""
        return self.tar.exists() and self.tar.with_suffix(".jsonl").exists() and self.rejections.exists()


class Plan(NamedTuple):
    """sets: folder of each data set -> its shards. options: all that decides the bytes beside the source.

    recipe: None where the files' own bytes are kept. rejected: known without opening a video (lines of
    rejected.jsonl). bytes_in: of each data set's files.
    """

    source: Path
    sets: dict[Path, list[ShardPlan]]
    classes: dict[str, list[str]]
    first_set: str | None
    rejected: dict[Path, list[dict]]
    bytes_in: dict[Path, int]
    recipe: Recipe | None
    filters: Filters
    options: dict
    digest: str

    def shards(self) -> list[ShardPlan]:
        return [shard for shards in self.sets.values() for shard in shards]


def span_of(item: SourceItem) -> Span:
    return item.start, item.end


def divide(
    items: list[SourceItem], label_set: str | None, fraction: float, seed: int
) -> dict[str, list[SourceItem]]:
    """Splits items into train and test: whole groups (a file without a group is its own), about `fraction` of each
    class to test. A class with two groups or more has at least one in test and one in train. Linear in the number of
    items."""
    group_of = [f"group {item.group}" if item.group else f"file {item.path}" for item in items]
    test = GroupSelection(group_of, [item.labels.get(label_set or "", "") for item in items])
    groups = test.groups_by_class(sorted(test.class_counts, key=lambda group: shuffle_key(seed, group)))
    for label in sorted(groups, key=lambda label: (len(groups[label]), label)):
        wanted = max(1, round(fraction * test.samples[label]))
        for group in groups[label]:
            counts, selected = test.class_counts[group], test.selected_samples[label]
            if selected >= wanted:
                break
            fits = not selected or selected + counts[label] <= wanted
            if group not in test.selected and fits and all(test.remaining_groups[k] > 1 for k in counts):
                test.add(group)
    parts: dict[str, list[SourceItem]] = {"train": [], "test": []}
    for group, item in zip(group_of, items, strict=True):
        parts["test" if group in test.selected else "train"].append(item)
    return {name: sorted(members, key=lambda item: item.place) for name, members in parts.items()}


def make_plan(source: SourceListing, root: Path, out: Path, args: argparse.Namespace) -> Plan:
    """args: those of pack, with `recipe` and `filters` made of them."""
    first = source.sets[0] if source.sets else None
    parts: dict[Path, list[SourceItem]] = defaultdict(list)
    if any(item.split for item in source.items):
        if args.test_fraction:
            raise UserError(f"{root}: names its own splits; leave out --test-fraction")
        for item in source.items:
            parts[out / str(item.split)].append(item)
    elif args.test_fraction:
        parts |= {
            out / k: v for k, v in divide(source.items, first, args.test_fraction, args.seed).items() if v
        }
    else:
        parts[out] = source.items
    names: dict[str, set[str]] = defaultdict(set)
    for item in source.items:
        for label_set, name in item.labels.items():
            names[label_set].add(name)
    keys = {sample_key(item.path, *span_of(item)): span_of(item) for item in source.items}
    if len(keys) < len(source.items):
        raise UserError(
            f"{root}: two paths have the same key, or a file the same segment twice; rename or remove one"
        )
    recipe, cuts = args.recipe, any(span != (None, None) for span in keys.values())
    if cuts and recipe and (recipe.window or recipe.scenes):
        raise UserError(f"{root}: its annotations name segments; leave out --window, --hop and --scenes")
    if cuts and args.drop_duplicates == "near":
        raise UserError(f"{root}: its annotations name segments, and near duplicates are whole files")
    recipe = recipe or (Recipe() if cuts else None)
    sizes = {item.path: (root / item.path).stat().st_size for item in source.items}
    options = _options(args, recipe)
    digest = hashlib.sha256(dumps({"version": 2, **options}).encode())
    for item in source.items:
        digest.update(dumps([*item, sizes[item.path]]).encode())
    digest.update(dumps(source.rejected).encode())
    rejected: dict[Path, list[dict]] = defaultdict(list)
    for (
        path,
        reason,
    ) in source.rejected.items():  # no split was read for them: the first data set keeps the list
        rejected[min(parts)].append({"path": path, "reason": reason, "detail": ""})
    bytes_in = {
        folder: sum(sizes[p] for p in {item.path for item in items}) for folder, items in parts.items()
    }
    if args.drop_duplicates:
        for folder, items in parts.items():
            parts[folder], more = without_duplicates(items, same_bytes(items, root))
            rejected[folder] += more
    if args.drop_duplicates == "near":
        for folder, items in parts.items():
            same = same_pictures(items, root, out / f"{NEAR}{folder.name}.jsonl", args)
            digest.update(dumps(same).encode())
            parts[folder], more = without_duplicates(items, same)
            rejected[folder] += more
    sets = {folder: _cut(folder, parts[folder], sizes, args) for folder in sorted(parts)}
    classes = class_lists(names)
    return Plan(
        root, sets, classes, first, rejected, bytes_in, recipe, args.filters, options, digest.hexdigest()
    )  # fmt: skip


def _options(args: argparse.Namespace, recipe: Recipe | None) -> dict:
    """What decides the bytes and stands in index.json."""
    options = {
        "decoder": args.decoder,
        "samples_per_shard": args.samples_per_shard,
        "seed": args.seed,
        "test_fraction": args.test_fraction,
        "drop_duplicates": args.drop_duplicates,
        "filters": args.filters._asdict(),
    }
    if recipe:  # another encoder writes other bytes
        options |= {
            "encode": recipe._asdict(),
            "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        }
    return options


def same_bytes(items: list[SourceItem], root: Path) -> dict[str, tuple[str, dict]]:
    """Path -> the first by path that holds the same bytes, and what is told of it."""
    same = find_identical_files(root / path for path in sorted({item.path for item in items}))
    named = {str(k.relative_to(root)): str(v.relative_to(root)) for k, v in same.items()}
    return {k: (v, {"detail": f"the same bytes as {v}", "value": 0}) for k, v in named.items()}


def same_pictures(
    items: list[SourceItem], root: Path, file: Path, args: argparse.Namespace
) -> dict[str, tuple[str, dict]]:
    """The same for what shows the same pictures; remembered in `file`."""
    found = remembered(file, root, items, lambda: near_files(root, items, args.workers, args.timeout))
    same = {k: v for k, v in found.items() if "first" in v}
    return {k: (v["first"], {"detail": f"its pictures are in {v['first']}", **v}) for k, v in same.items()}


def without_duplicates(
    items: list[SourceItem], same: dict[str, tuple[str, dict]]
) -> tuple[list[SourceItem], list[dict]]:
    """Of files of one data set that are the same, what is cut from the one that `same` names stays."""
    there = {(item.path, *span_of(item)) for item in items}
    kept, rejected = [], []
    for item in items:
        first, told = same.get(item.path, (None, {}))
        if first is None or (first, *span_of(item)) not in there:
            kept.append(item)
            continue
        line = {"path": item.path, "reason": "duplicate", **told}
        times = {"start": item.start, "end": item.end}
        rejected.append(line | {k: t for k, t in times.items() if t is not None})
    return kept, rejected


def _cut(
    folder: Path, items: list[SourceItem], sizes: dict[str, int], args: argparse.Namespace
) -> list[ShardPlan]:
    """Shuffle files by seed and cut into shards, by count of samples and by bytes; a file is in one shard."""
    most = args.samples_per_shard or max(8, min(1000, math.ceil(len(items) / 16)))
    shards: list[list[SourceItem]] = [[]]
    filled = 0
    by_draw = sorted(items, key=lambda item: (shuffle_key(args.seed, item.path), item.place))
    for path, together in groupby(by_draw, lambda item: item.path):
        group = list(together)
        if shards[-1] and (len(shards[-1]) + len(group) > most or filled + sizes[path] > SHARD_BYTES):
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += sizes[path]
    return [ShardPlan(folder / f"shard-{i:06d}.tar", part) for i, part in enumerate(shards)]

"""The plan of a pack: which file goes to which data set and shard, and all else that decides the bytes of the
shards.

It is made before any file is packed, so the shards depend neither on the order nor on the number of the
workers.
"""

import argparse
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import av

from data_prep.copies import Deduplicated, Duplicate, drop_all_duplicates
from data_prep.filters import Filters
from data_prep.frame_folder import folder_bytes
from data_prep.index import class_lists, sample_key
from data_prep.recipe import Recipe
from data_prep.sources import SourceItem, SourceListing
from data_prep.sources.names import numbered_series
from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.core.splits import shuffle_key, split_by_group
from vidssl.data.format import dumps

MAX_SHARD_BYTES = 1_000_000_000  # of source files; a shard is closed before it exceeds this


class ShardPlan(NamedTuple):
    """A shard to be written to `tar`. Items of one file are consecutive."""

    tar: Path
    items: list[SourceItem]

    @property
    def rejections(self) -> Path:
        """The list of rejected files, until it is merged into rejected.jsonl."""
        return self.tar.with_suffix(".rejected")

    def files(self) -> list[tuple[str, list[SourceItem]]]:
        """Returns each file with its items."""
        return [(path, list(items)) for path, items in groupby(self.items, lambda item: item.path)]

    def is_finished(self) -> bool:
        """Whether the shard is complete. The tar is renamed into place last, after the files beside it."""
        return self.tar.exists() and self.tar.with_suffix(".jsonl").exists() and self.rejections.exists()


class Plan(NamedTuple):
    """Everything that packing does, decided before the first shard is written."""

    source: Path
    datasets: dict[Path, list[ShardPlan]]  # folder of each data set -> its shards
    classes: dict[str, list[str]]  # label set -> class names
    main_label_set: str | None  # the first; "label" and "class" of a sample are of this one
    rejected: dict[Path, list[dict]]  # folder -> records of rejected.jsonl that are known without decoding
    bytes_in: dict[Path, int]  # folder -> bytes of its source files
    recipe: Recipe | None  # None: files keep their bytes
    filters: Filters
    options: dict  # everything beside the source that decides the bytes
    digest: str  # SHA-256 of everything that decides the bytes

    def shards(self) -> list[ShardPlan]:
        return [shard for shards in self.datasets.values() for shard in shards]


def split_train_test(
    items: list[SourceItem], label_sets: list[str], fraction: float, seed: int
) -> dict[str, list[SourceItem]]:
    """Splits items by whole groups, `fraction` of them to test; a file without a group is a group of its own.

    The classes of all label sets are balanced (core/splits.py); of the first alone if all together do not
    allow the fraction.
    """
    group_of = joined_groups(items, {})
    split = split_by_group(group_of, item_classes(items, label_sets), fraction, seed)
    if split.is_far and len(label_sets) > 1:
        first = split_by_group(group_of, item_classes(items, label_sets[:1]), fraction, seed)
        split = split if first.is_far else first
    if split.note:
        logger.warning(f"--test-fraction: in test: {split.note}")
    splits: dict[str, list[SourceItem]] = {"train": [], "test": []}
    for item, is_test in zip(items, split.held_out, strict=True):
        splits["test" if is_test else "train"].append(item)
    return {name: sorted(members, key=lambda item: item.sort_key) for name, members in splits.items()}


def warn_of_divided_series(splits: Mapping[str, list[SourceItem]]) -> None:
    """Says that files without a group, named as numbered parts of one, are in train and in test."""
    split_of = {item.path: name for name, items in splits.items() for item in items if item.group is None}
    divided = [paths for paths in numbered_series(split_of) if len({split_of[path] for path in paths}) > 1]
    if divided:
        one = divided[0][0]
        other = next(path for path in divided[0] if split_of[path] != split_of[one])
        logger.warning(
            f"--test-fraction: {len(divided)} series of numbered files are divided, such as {one} "
            f"({split_of[one]}) and {other} ({split_of[other]}); if these are of one recording, give it as "
            "the group of both in a list"
        )


def joined_groups(items: list[SourceItem], duplicates: Mapping[str, Duplicate]) -> list[str]:
    """The group of each item, or its file. Groups that share a file, or a file and its duplicate, are one."""
    joined: dict[str, str] = {}  # a group or file -> one that it belongs to

    def find(name: str) -> str:
        while name in joined:
            name = joined[name]
        return name

    def join(one: str, other: str) -> None:
        one, other = find(one), find(other)
        if one != other:
            # a group keeps its name, which decides its side
            kept, gone = sorted((one, other), key=lambda name: (name.startswith("file "), name))
            joined[gone] = kept

    for item in items:
        if item.group:
            join(f"group {item.group}", f"file {item.path}")
    for path, duplicate in duplicates.items():
        join(f"file {duplicate.of}", f"file {path}")
    return [find(f"file {item.path}") for item in items]


def shared_groups(
    kept: list[SourceItem], items: list[SourceItem], duplicates: Mapping[str, Duplicate]
) -> dict[str, str]:
    """Returns path -> group, of kept items of different groups that duplicates join: no split divides them.

    items: the dropped ones too, since a group is of the recording that its dropped files show.
    """
    joined = joined_groups(items, duplicates)
    group_of = {item.path: group for item, group in zip(items, joined, strict=True)}
    members: dict[str, set[str]] = defaultdict(set)
    for item in kept:
        members[group_of[item.path]].add(f"group {item.group}" if item.group else f"file {item.path}")
    joins = {group_of[path] for path in duplicates}
    divided = {group for group in joins if len(members[group]) > 1}
    return {path: group.partition(" ")[2] for path, group in group_of.items() if group in divided}


def item_classes(items: list[SourceItem], label_sets: list[str]) -> list[set[tuple[str, str]]]:
    """The classes of each item: (label set, name), and of joined tags ("a|b") each tag. Numbers that mostly
    occur once are no classes."""
    strata: list[set[tuple[str, str]]] = [set() for _ in items]
    for label_set in label_sets:
        names = Counter(item.labels.get(label_set, "") for item in items)
        del names[""]
        if are_numbers(names):
            continue
        for item, classes in zip(items, strata, strict=True):
            if name := item.labels.get(label_set):
                classes.update((label_set, tag) for tag in name.split("|"))
    return strata


def are_numbers(sizes: Mapping[str, int]) -> bool:
    """Whether names, with how often they occur, are numbers that mostly occur once: no classes."""
    return 2 * len(sizes) > sum(sizes.values()) and all(map(_is_number, sizes))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def make_plan(source: SourceListing, root: Path, out: Path, args: argparse.Namespace) -> Plan:
    """args: the arguments of pack, with `recipe` and `filters`. Raises UserError if they contradict the
    source."""
    main_label_set = source.label_sets[0] if source.label_sets else None
    named = named_splits(source, root, out, args)
    recipe = choose_recipe(source.items, root, args)
    sizes = {item.path: item_bytes(root, item) for item in source.items}
    options = bytes_options(args, recipe)
    digest = hashlib.sha256(dumps({"version": 7, **options}).encode())
    for item in source.items:
        digest.update(dumps([*item, sizes[item.path]]).encode())
    digest.update(dumps(source.rejected).encode())
    # Duplicates are dropped before --test-fraction, so that none is on the other side.
    found = drop_all_duplicates(named, root, out, args)
    digest.update(dumps(found.near).encode())
    kept = [item for items in found.kept.values() for item in items]
    groups = shared_groups(kept, source.items, found.duplicates)
    datasets = {
        folder: [item._replace(group=groups.get(item.path, item.group)) for item in items]
        for folder, items in found.kept.items()
    }
    if args.test_fraction:
        splits = split_train_test(datasets[out], source.label_sets, args.test_fraction, args.seed)
        datasets = {out / split: items for split, items in splits.items() if items}
        warn_of_divided_series(splits)
    dropped = dropped_by_dataset(found, datasets)
    rejected = rejected_by_dataset(source, datasets, out)
    read = {folder: {item.path for item in items} for folder, items in datasets.items()}
    for folder, records in dropped.items():
        rejected[folder] += records
        read[folder] |= {record["path"] for record in records}
    bytes_in = {folder: sum(sizes[path] for path in paths) for folder, paths in read.items()}
    return Plan(
        source=root,
        datasets={folder: plan_shards(folder, datasets[folder], sizes, args) for folder in sorted(datasets)},
        classes=class_names(source.items),
        main_label_set=main_label_set,
        rejected=rejected,
        bytes_in=bytes_in,
        recipe=recipe,
        filters=args.filters,
        options=options,
        digest=digest.hexdigest(),
    )


def dropped_by_dataset(
    found: Deduplicated, datasets: Mapping[Path, list[SourceItem]]
) -> dict[Path, list[dict]]:
    """Returns the records of dropped copies by data set: with --test-fraction a copy is of that of the file
    that is kept."""
    folder_of = {item.path: folder for folder, items in datasets.items() for item in items}
    by_dataset: dict[Path, list[dict]] = defaultdict(list)
    for folder, records in found.dropped.items():
        for record in records:
            path = record["path"]
            while path in found.duplicates and path not in folder_of:
                path = found.duplicates[path].of
            listed_in = folder if folder in datasets else folder_of.get(path, min(datasets))
            by_dataset[listed_in].append(record)
    return by_dataset


def rejected_by_dataset(
    source: SourceListing, datasets: Mapping[Path, list[SourceItem]], out: Path
) -> dict[Path, list[dict]]:
    """Returns the records of files that the source refuses, by data set. A file of no known split, or
    of a split without any file, is listed in the first one."""
    by_dataset: dict[Path, list[dict]] = defaultdict(list)
    for path, reason in source.rejected.items():
        folder = out / source.rejected_splits.get(path, "")
        detail = "" if folder in datasets or folder == out else f"of the split {folder.name}"
        by_dataset[folder if folder in datasets else min(datasets)].append(
            {"path": path, "reason": reason, "detail": detail}
        )
    return by_dataset


def item_bytes(root: Path, item: SourceItem) -> int:
    """Returns the size of a file, or of the images of a folder of frames."""
    path = root / item.path
    return path.stat().st_size if item.frame_rate is None else folder_bytes(path)


def named_splits(
    source: SourceListing, root: Path, out: Path, args: argparse.Namespace
) -> dict[Path, list[SourceItem]]:
    """Returns folder -> items: a folder per split that the source names, or `out` itself."""
    if not any(item.split for item in source.items):
        return {out: source.items}
    if args.test_fraction:
        raise UserError(f"{root}: names its own splits; leave out --test-fraction")
    splits: dict[Path, list[SourceItem]] = defaultdict(list)
    for item in source.items:
        splits[out / str(item.split)].append(item)
    return splits


def choose_recipe(items: list[SourceItem], root: Path, args: argparse.Namespace) -> Recipe | None:
    """Returns the recipe of --fps and so on; segments of files are always re-encoded, if need be by the
    defaults."""
    keys = {sample_key(item.path, *item.span) for item in items}
    if len(keys) < len(items):
        raise UserError(
            f"{root}: two paths have the same key, or a file the same segment twice; rename or remove one"
        )
    if any(item.frame_rate is not None for item in items):
        if args.drop_duplicates:
            raise UserError(f"{root}: folders of frames are not compared; leave out --drop-duplicates")
        return args.recipe or Recipe()
    if all(item.span == (None, None) for item in items):
        return args.recipe
    if args.recipe and (args.recipe.window or args.recipe.scenes):
        raise UserError(f"{root}: its annotations name segments; leave out --window, --hop and --scenes")
    if args.drop_duplicates == "near":
        raise UserError(f"{root}: its annotations name segments, and near duplicates are whole files")
    return args.recipe or Recipe()


def bytes_options(args: argparse.Namespace, recipe: Recipe | None) -> dict:
    """Returns the options that decide the bytes, as index.json lists them."""
    options = {
        "decoder": args.decoder,
        "samples_per_shard": args.samples_per_shard,
        "seed": args.seed,
        "test_fraction": args.test_fraction,
        "drop_duplicates": args.drop_duplicates,
        "filters": args.filters._asdict(),
    }
    if recipe:  # another version of the encoder writes other bytes
        options["encode"] = recipe._asdict()
        options["libavcodec"] = ".".join(map(str, av.library_versions["libavcodec"]))
    return options


def class_names(items: list[SourceItem]) -> dict[str, list[str]]:
    """Returns label set -> sorted class names."""
    names: dict[str, set[str]] = defaultdict(set)
    for item in items:
        for label_set, name in item.labels.items():
            names[label_set].add(name)
    return class_lists(names)


def plan_shards(
    folder: Path, items: list[SourceItem], sizes: dict[str, int], args: argparse.Namespace
) -> list[ShardPlan]:
    """Shuffles files by --seed and fills one shard after the other, limited in samples and bytes.

    All items of a file are in one shard. sizes: path -> bytes.
    """
    max_samples = args.samples_per_shard or max(8, min(1000, math.ceil(len(items) / 16)))
    shards: list[list[SourceItem]] = [[]]
    bytes_filled = 0
    shuffled = sorted(items, key=lambda item: (shuffle_key(args.seed, item.path), item.sort_key))
    for path, same_file in groupby(shuffled, lambda item: item.path):
        file_items = list(same_file)
        is_full = len(shards[-1]) + len(file_items) > max_samples
        if shards[-1] and (is_full or bytes_filled + sizes[path] > MAX_SHARD_BYTES):
            shards.append([])
            bytes_filled = 0
        shards[-1] += file_items
        bytes_filled += sizes[path]
    return [ShardPlan(folder / f"shard-{i:06d}.tar", shard) for i, shard in enumerate(shards)]

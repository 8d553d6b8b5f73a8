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

from data_prep.dedup import cached_near_duplicates, find_near_duplicates
from data_prep.filters import NEAR_PREFIX, Filters, find_identical_files
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


class Duplicate(NamedTuple):
    """A file that is dropped because another one is kept."""

    of: str  # path of the file that is kept
    record: dict  # entries of rejected.jsonl


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
        if 2 * len(names) > sum(names.values()) and all(map(is_number, names)):
            continue
        for item, classes in zip(items, strata, strict=True):
            if name := item.labels.get(label_set):
                classes.update((label_set, tag) for tag in name.split("|"))
    return strata


def is_number(text: str) -> bool:
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
    dropped: dict[Path, list[dict]] = defaultdict(list)
    duplicates: dict[str, Duplicate] = {}
    for folder, items in named.items():
        if args.drop_duplicates or args.test_fraction:
            identical = identical_files(items, root)
            duplicates |= identical
        if args.drop_duplicates:
            items, dropped[folder] = drop_duplicates(items, identical)
        if args.drop_duplicates == "near":
            near = near_duplicates(items, root, out / f"{NEAR_PREFIX}{folder.name}.jsonl", args)
            duplicates |= near
            digest.update(dumps(near).encode())
            items, records = drop_duplicates(items, near)
            dropped[folder] += records
        named[folder] = items
    if args.test_fraction:
        note_kept_copies(named[out], identical)
    elif len(named) > 1:
        duplicates |= warn_of_shared_files(named, root)
    kept = [item for items in named.values() for item in items]
    groups = shared_groups(kept, source.items, duplicates)
    datasets = {
        folder: [item._replace(group=groups.get(item.path, item.group)) for item in items]
        for folder, items in named.items()
    }
    if args.test_fraction:
        splits = split_train_test(datasets[out], source.label_sets, args.test_fraction, args.seed)
        datasets = {out / split: items for split, items in splits.items() if items}
        warn_of_divided_series(splits)
    rejected: dict[Path, list[dict]] = defaultdict(list)
    # A file of which no split is known, or of a split without any file, is listed in the first data set.
    for path, reason in source.rejected.items():
        folder = out / source.rejected_splits.get(path, "")
        detail = "" if folder in datasets or folder == out else f"of the split {folder.name}"
        rejected[folder if folder in datasets else min(datasets)].append(
            {"path": path, "reason": reason, "detail": detail}
        )
    read = {folder: {item.path for item in items} for folder, items in datasets.items()}
    folder_of = {path: folder for folder, paths in read.items() for path in paths}
    for folder, records in dropped.items():
        for record in records:
            # With --test-fraction a dropped copy is of the split of the file that is kept
            kept_copy = record["path"]
            while kept_copy in duplicates and kept_copy not in folder_of:
                kept_copy = duplicates[kept_copy].of
            listed_in = folder if folder in datasets else folder_of.get(kept_copy, min(datasets))
            rejected[listed_in].append(record)
            read[listed_in].add(record["path"])
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


def note_kept_copies(items: list[SourceItem], identical: Mapping[str, Duplicate]) -> None:
    """Says that the copies among the items of --test-fraction stay together."""
    copies = {item.path for item in items} & identical.keys()
    if copies:
        logger.info(
            f"{len(copies)} files have the bytes of another one, such as {min(copies)}: they stay together "
            "in train or test; --drop-duplicates keeps one of them"
        )


def warn_of_shared_files(named: Mapping[Path, list[SourceItem]], root: Path) -> dict[str, Duplicate]:
    """Finds the copies among all splits, and warns of files whose bytes are in two of the source's own
    splits, which are left as they are."""
    splits = {item.path: folder.name for folder, items in named.items() for item in items}
    copies = identical_files([item for items in named.values() for item in items], root)
    shared = {path: copy.of for path, copy in copies.items() if splits[path] != splits[copy.of]}
    if shared:
        path, of = min(shared.items())
        logger.warning(
            f"{len(shared)} files have the bytes of one in another split, such as {path} ({splits[path]}) of "
            f"{of} ({splits[of]}): both are kept, since the source names its splits"
        )
    return copies


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


def identical_files(items: list[SourceItem], root: Path) -> dict[str, Duplicate]:
    """Returns path -> the first path, in alphabetical order, with the same bytes; of files, not of folders of
    frames."""
    files = sorted({item.path for item in items if item.frame_rate is None})
    identical = find_identical_files(root / path for path in files)
    paths = {str(file.relative_to(root)): str(first.relative_to(root)) for file, first in identical.items()}
    return {
        path: Duplicate(first, {"detail": f"the same bytes as {first}", "value": 0})
        for path, first in paths.items()
    }


def near_duplicates(
    items: list[SourceItem], root: Path, cache: Path, args: argparse.Namespace
) -> dict[str, Duplicate]:
    """Returns path -> the file that contains its pictures. The result is kept in `cache`."""
    found = cached_near_duplicates(
        cache, root, items, lambda: find_near_duplicates(root, items, args.workers, args.timeout)
    )
    return {
        path: Duplicate(
            record["duplicate_of"], {"detail": f"its pictures are in {record['duplicate_of']}", **record}
        )
        for path, record in found.items()
        if "duplicate_of" in record
    }


def drop_duplicates(
    items: list[SourceItem], duplicates: dict[str, Duplicate]
) -> tuple[list[SourceItem], list[dict]]:
    """Returns the items that are kept and the records of rejected.jsonl of the others.

    An item is dropped if the same segment of the file that it duplicates is an item too.
    """
    segments = {(item.path, *item.span) for item in items}
    kept, rejected = [], []
    for item in items:
        duplicate = duplicates.get(item.path)
        if duplicate is None or (duplicate.of, *item.span) not in segments:
            kept.append(item)
            continue
        times = {"start": item.start, "end": item.end}
        record = {"path": item.path, "reason": "duplicate", **duplicate.record}
        rejected.append(record | {name: t for name, t in times.items() if t is not None})
    return kept, rejected


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

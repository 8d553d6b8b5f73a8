"""Copies among the files of a source: which are dropped, and which are kept and said."""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from data_prep.dedup import cached_near_duplicates, find_near_duplicates
from data_prep.filters import NEAR_PREFIX, find_identical_files
from data_prep.sources import SourceItem
from vidssl.core.log import logger


class Duplicate(NamedTuple):
    """A file that is dropped because another one is kept."""

    of: str  # path of the file that is kept
    record: dict  # entries of rejected.jsonl


class Deduplicated(NamedTuple):
    """What --drop-duplicates leaves of each data set, before --test-fraction."""

    kept: dict[Path, list[SourceItem]]  # folder -> its items
    dropped: dict[Path, list[dict]]  # folder -> records of rejected.jsonl
    duplicates: dict[str, Duplicate]  # path -> the file that it is like, also where both are kept
    near: dict[str, Duplicate]  # those of them that are alike, not equal


def drop_all_duplicates(
    named: Mapping[Path, list[SourceItem]], root: Path, out: Path, args: argparse.Namespace
) -> Deduplicated:
    """Drops what --drop-duplicates asks for from each data set. Copies that are kept are noted for
    --test-fraction, and between the splits of the source."""
    found = Deduplicated(dict(named), defaultdict(list), {}, {})
    for folder, items in named.items():
        if args.drop_duplicates or args.test_fraction:
            identical = identical_files(items, root)
            found.duplicates.update(identical)
        if args.drop_duplicates:
            items, found.dropped[folder] = drop_duplicates(items, identical)
        if args.drop_duplicates == "near":
            near = near_duplicates(items, root, out / f"{NEAR_PREFIX}{folder.name}.jsonl", args)
            found.near.update(near)
            items, records = drop_duplicates(items, near)
            found.dropped[folder] += records
        found.kept[folder] = items
    found.duplicates.update(found.near)
    if args.test_fraction:
        note_kept_copies(found.kept[out], identical)
    elif len(named) > 1:
        found.duplicates.update(warn_of_shared_files(found.kept, root))
    return found


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

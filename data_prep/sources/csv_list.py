"""A csv of one's own: path, label and/or label_NAME columns, and optionally group, split, start and end (seconds)."""

import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    EXTENSIONS,
    ListingBuilder,
    SourceItem,
    SourceListing,
    inside,
    seconds,
    table,
)
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Paths are relative to the source. Without an annotation file: its labels.csv."""
    out, sets = ListingBuilder(repeats=False), dict[str, None]()
    for file in annotations or [root / "labels.csv"]:
        columns: dict[str, str] = {}
        for where, row in table(file, ["path"]):
            columns = columns or _label_columns(file, list(row))
            sets |= dict.fromkeys(columns)
            labels = {name: row[column] for name, column in columns.items() if row[column]}
            times = seconds(where, row.get("start"), row.get("end"))
            path = inside(where, row["path"], root)
            item = SourceItem(path, labels, row.get("group") or None, row.get("split") or None, *times)
            out.add(where, item, check(root, item))
    return out.source(sets)


def check(root: Path, item: SourceItem) -> str | None:
    """Why the item is rejected, without opening its file."""
    if not os.path.isfile(root / item.path):  # nor can it be where the path is too long for one
        return "missing"
    return None if item.ext in EXTENSIONS else "unknown_extension"


def _label_columns(file: Path, columns: Sequence[str]) -> dict[str, str]:
    """Label set -> column."""
    sets: dict[str, str] = {}
    for c in columns:
        if c == "label" or c.startswith("label_"):
            name = c.removeprefix("label_")
            if not name:
                raise UserError(f"{file}:1: column {c!r}: expected a name after `label_`")
            if name in sets:
                raise UserError(
                    f"{file}:1: columns {sets[name]!r} and {c!r} are the same labels; rename one of them"
                )
            sets[name] = c
    if not sets:
        raise UserError(f"{file}:1: no column `label` or `label_NAME` (found: {', '.join(columns)})")
    return sets

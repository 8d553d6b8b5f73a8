"""A csv file of one's own: path, label and/or label_NAME columns, optionally group, split, start and end
(seconds)."""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    FolderOptions,
    ListingBuilder,
    SourceItem,
    SourceListing,
    check_splits_of_lists,
    class_name,
    csv_rows,
    listed_item,
    parse_path,
    parse_span,
    rejection_reason,
    splits_of_lists,
)
from vidssl.core.errors import UserError

COLUMNS = ("path", "group", "split", "start", "end")


def read_csv_list(
    root: Path, annotations: Sequence[Path], options: FolderOptions = FolderOptions()
) -> SourceListing:
    """Paths are relative to the source. Without an annotation file, its labels.csv is read."""
    listing = ListingBuilder(allow_repeats=False)
    notes: list[str] = []
    label_sets: dict[str, None] = {}
    splits = splits_of_lists(annotations or [root / "labels.csv"], options)
    for file in splits:
        columns: dict[str, str] = {}
        for where, row in csv_rows(file, ["path"]):
            if not columns:
                columns = _label_columns(file, list(row))
                notes += unread_columns(file, set(row) - {*columns.values()})
            label_sets |= dict.fromkeys(columns)
            item = SourceItem(
                parse_path(where, row["path"], root),
                {s: name for s, column in columns.items() if (name := class_name(row[column]))},
                row.get("group") or None,
                row.get("split") or splits[file],
                *parse_span(where, row.get("start"), row.get("end")),
            )
            item = listed_item(where, root, item, options)
            listing.add(where, item, rejection_reason(root, item))
    source = listing.build(label_sets, notes=notes, root=root)
    check_splits_of_lists(source.items, splits, options)
    return source


def unread_columns(file: Path, columns: set[str]) -> list[str]:
    """Returns a line about columns that say nothing to pack, if there are any. Raises UserError for one that
    is nearly called as one that does."""
    unread = sorted(columns - {*COLUMNS, ""})
    for name in unread:
        word = re.sub(r"[\W_]", "", name).casefold()
        meant = next((known for known in COLUMNS if word in (known, f"{known}s")), None)
        if meant is not None:
            raise UserError(f"{file}:1: column {name!r}: call it {meant!r}, or leave it out")
    return [f"columns of {file.name} that are not read: {', '.join(unread)}"] if unread else []


def _label_columns(file: Path, columns: Sequence[str]) -> dict[str, str]:
    """Returns label set -> column."""
    label_sets: dict[str, str] = {}
    for column in columns:
        if column == "label" or column.startswith("label_"):
            name = column.removeprefix("label_")
            if not name:
                raise UserError(f"{file}:1: column {column!r}: expected a name after `label_`")
            if name in label_sets:
                raise UserError(
                    f"{file}:1: columns {label_sets[name]!r} and {column!r} are the same labels; "
                    "rename one of them"
                )
            label_sets[name] = column
    if not label_sets:
        raise UserError(f"{file}:1: no column `label` or `label_NAME` (found: {', '.join(columns)})")
    return label_sets

"""A csv file of one's own: path, label and/or label_NAME columns, optionally group, split, start and end
(seconds)."""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    FolderOptions,
    ListingBuilder,
    SourceItem,
    SourceListing,
    check_splits_of_lists,
    csv_rows,
    parse_path,
    parse_span,
    rejection_reason,
    splits_of_lists,
)
from vidssl.core.errors import UserError


def read_csv_list(
    root: Path, annotations: Sequence[Path], options: FolderOptions = FolderOptions()
) -> SourceListing:
    """Paths are relative to the source. Without an annotation file, its labels.csv is read."""
    listing = ListingBuilder(allow_repeats=False)
    label_sets: dict[str, None] = {}
    splits = splits_of_lists(annotations or [root / "labels.csv"], options)
    for file in splits:
        columns: dict[str, str] = {}
        for where, row in csv_rows(file, ["path"]):
            columns = columns or _label_columns(file, list(row))
            label_sets |= dict.fromkeys(columns)
            item = SourceItem(
                parse_path(where, row["path"], root),
                {label_set: row[column] for label_set, column in columns.items() if row[column]},
                row.get("group") or None,
                row.get("split") or splits[file],
                *parse_span(where, row.get("start"), row.get("end")),
            )
            listing.add(where, item, rejection_reason(root, item))
    source = listing.build(label_sets)
    check_splits_of_lists(source.items, splits, options)
    return source


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

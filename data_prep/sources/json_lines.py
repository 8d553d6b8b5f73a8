"""JSON lines: {"path": ..., "label": ... or "labels": {label set: class}, "group", "split", "start", "end"}.

All but path are optional. start and end are seconds; a class may be a name or a whole number.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.sources.common import (
    FolderOptions,
    ListingBuilder,
    SourceItem,
    SourceListing,
    check_splits_of_lists,
    check_unicode,
    class_name,
    listed_item,
    parse_path,
    parse_span,
    rejection_reason,
    require_annotations,
    splits_of_lists,
    text_lines,
)
from vidssl.core.errors import UserError

KEYS = ("path", "label", "labels", "group", "split", "start", "end")


def read_json_lines(
    root: Path, annotations: Sequence[Path], options: FolderOptions = FolderOptions()
) -> SourceListing:
    """Paths are relative to the source."""
    require_annotations(annotations, "jsonl", "files with one object a line")
    listing = ListingBuilder(allow_repeats=False)
    label_sets: dict[str, None] = {}
    splits = splits_of_lists(annotations, options)
    for file in splits:
        for number, line in enumerate(text_lines(file), 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            entry = _parse_entry(where, line)
            labels = _labels(where, entry)
            label_sets |= dict.fromkeys(labels)
            item = SourceItem(
                parse_path(where, entry.get("path"), root),
                labels,
                _name(where, "group", entry.get("group")),
                _name(where, "split", entry.get("split")) or splits[file],
                *parse_span(where, entry.get("start"), entry.get("end")),
            )
            item = listed_item(where, root, item, options)
            listing.add(where, item, rejection_reason(root, item))
    source = listing.build(label_sets, root=root)
    check_splits_of_lists(source.items, splits, options)
    return source


def _parse_entry(where: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON: {e}") from e
    check_unicode(where, entry)
    if not isinstance(entry, dict) or not set(entry) <= set(KEYS):
        expected = f"expected an object with no other keys than {', '.join(KEYS)}"
        raise UserError(f"{where}: {line.strip()[:80]}: {expected}")
    return entry


def _labels(where: str, entry: dict[str, Any]) -> dict[str, str]:
    """Returns label set -> class name."""
    if "label" in entry and "labels" in entry:
        raise UserError(f"{where}: both `label` and `labels`; expected one of them")
    labels = entry.get("labels", {"label": entry.get("label")})
    if not isinstance(labels, dict):
        raise UserError(f"{where}: labels {labels!r}: expected an object, label set -> class")
    named = {str(s): _name(where, f"label {s}", value) for s, value in labels.items()}
    classes = {s: class_name(name) for s, name in named.items() if name is not None}
    return {s: name for s, name in classes.items() if name is not None}


def _name(where: str, key: str, value: Any) -> str | None:
    """Returns a name or a whole number as a string; None if it is absent or blank."""
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise UserError(f"{where}: {key} {value!r}: expected a name or a whole number")
    return None if value is None else str(value).strip() or None

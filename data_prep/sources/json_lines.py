"""JSON lines: {"path": ..., "label": ... or "labels": {set: name}, "group", "split", "start", "end"}.

All but path may be left out. start and end are seconds; a class may be a name or a whole number.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.sources.common import (
    ListingBuilder,
    SourceItem,
    SourceListing,
    inside,
    need,
    seconds,
    text_lines,
)
from data_prep.sources.csv_list import check
from vidssl.core.errors import UserError

KEYS = ("path", "label", "labels", "group", "split", "start", "end")


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Paths are relative to the source."""
    need(annotations, "jsonl", "files with one object a line")
    out, sets = ListingBuilder(repeats=False), dict[str, None]()
    for file in annotations:
        for number, line in enumerate(text_lines(file), 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                entry = json.loads(line)
            except ValueError as e:
                raise UserError(f"{where}: not JSON: {e}") from e
            if not isinstance(entry, dict) or not set(entry) <= set(KEYS):
                raise UserError(
                    f"{where}: {line.strip()[:80]}: expected an object with no other keys than {', '.join(KEYS)}"
                )
            labels = _labels(where, entry)
            sets |= dict.fromkeys(labels)
            group, split = (_name(where, key, entry.get(key)) for key in ("group", "split"))
            times = seconds(where, entry.get("start"), entry.get("end"))
            item = SourceItem(inside(where, entry.get("path"), root), labels, group, split, *times)
            out.add(where, item, check(root, item))
    return out.source(sets)


def _labels(where: str, entry: dict) -> dict[str, str]:
    if "label" in entry and "labels" in entry:
        raise UserError(f"{where}: both `label` and `labels`; expected one of them")
    labels = entry.get("labels", {"label": entry.get("label")})
    if not isinstance(labels, dict):
        raise UserError(f"{where}: labels {labels!r}: expected an object, label set -> class")
    named = {str(s): _name(where, f"label {s}", value) for s, value in labels.items()}
    return {s: name for s, name in named.items() if name is not None}


def _name(where: str, key: str, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise UserError(f"{where}: {key} {value!r}: expected a name or a whole number")
    return str(value).strip() or None if value is not None else None

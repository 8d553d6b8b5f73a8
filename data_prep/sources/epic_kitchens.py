"""EPIC-KITCHENS-100 (arXiv 2006.13256): EPIC_100_train.csv, EPIC_100_validation.csv, EPIC_100_test_timestamps.csv.

Rows are segments of long videos (PXX/videos/PXX_YY.MP4): participant_id, video_id, start_timestamp, stop_timestamp
(HH:MM:SS.ss), verb_class, noun_class. Label sets: verb, noun and action (`VERB,NOUN`). Classes are the owners' numbers,
or their keys where EPIC_100_verb_classes.csv and EPIC_100_noun_classes.csv are given too.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    FileFinder,
    ListingBuilder,
    SourceItem,
    SourceListing,
    need,
    split_of,
    table,
)
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: the participant. Of two narrations of the very same segment the first in the list stands."""
    need(
        annotations,
        "epic_kitchens",
        "EPIC_100_train.csv, EPIC_100_validation.csv, EPIC_100_test_timestamps.csv",
    )
    keys = {part: _keys([f for f in annotations if f"{part}_classes" in f.stem]) for part in ("verb", "noun")}
    files, out, seen = FileFinder(root), ListingBuilder(), set[tuple]()
    same = 0
    for file in annotations:
        if "_classes" in file.stem:
            continue
        split = split_of(file)
        columns = ["participant_id", "video_id", "start_timestamp", "stop_timestamp"]
        for where, row in table(file, columns if split == "test" else [*columns, "verb_class", "noun_class"]):
            start, end = (_seconds(where, row[f"{name}_timestamp"]) for name in ("start", "stop"))
            if end <= start:
                raise UserError(
                    f"{where}: stop_timestamp {row['stop_timestamp']}: expected one after start_timestamp"
                )
            labels = {
                part: _class(where, row[f"{part}_class"], keys[part])
                for part in keys
                if f"{part}_class" in row
            }
            if labels:
                labels["action"] = f"{labels['verb']},{labels['noun']}"
            path = files.find(row["video_id"])
            name = path or f"{row['participant_id']}/videos/{row['video_id']}.MP4"
            item = SourceItem(name, labels, row["participant_id"], split, start, end)
            if item.place in seen:
                same += 1
                continue
            seen.add(item.place)
            out.add(where, item, None if path else "missing")
    ignored = files.left()
    ignored["(second narration of a segment)"] = same
    return out.source(["verb", "noun", "action"], ignored)


def _seconds(where: str, text: str) -> float:
    found = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)", text)
    if not found:
        raise UserError(f"{where}: time {text!r}: expected HH:MM:SS.ss")
    return round(int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]), 6)


def _keys(files: Sequence[Path]) -> dict[str, str] | None:
    """Class number -> key, of a file id,key,instances,category."""
    return {row["id"]: row["key"] for file in files for _, row in table(file, ["id", "key"])} or None


def _class(where: str, number: str, keys: dict[str, str] | None) -> str:
    if not number.isdecimal() or (keys is not None and number not in keys):
        raise UserError(
            f"{where}: class {number!r}: expected a whole number" + (" of the classes file" if keys else "")
        )
    return keys[number] if keys else number

"""EPIC-KITCHENS-100 (arXiv 2006.13256): EPIC_100_train.csv, EPIC_100_validation.csv,
EPIC_100_test_timestamps.csv.

Rows are segments of long videos (PXX/videos/PXX_YY.MP4): participant_id, video_id, start_timestamp,
stop_timestamp (HH:MM:SS.ss), verb_class, noun_class. Label sets: verb, noun and action (`VERB,NOUN`). Class
names are the published numbers, or their keys if EPIC_100_verb_classes.csv and EPIC_100_noun_classes.csv are
given too.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    ListingBuilder,
    SourceItem,
    SourceListing,
    csv_rows,
    require_annotations,
    split_from_name,
)
from data_prep.sources.file_finder import FileFinder
from vidssl.core.errors import UserError

COLUMNS = ["participant_id", "video_id", "start_timestamp", "stop_timestamp"]
CLASS_COLUMNS = {"verb": "verb_class", "noun": "noun_class"}


def read_epic_kitchens(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: the participant. Of two narrations of the very same segment the first in the list counts."""
    names = "EPIC_100_train.csv, EPIC_100_validation.csv, EPIC_100_test_timestamps.csv"
    require_annotations(annotations, "epic_kitchens", names)
    class_keys = {
        label_set: _class_keys([file for file in annotations if f"{label_set}_classes" in file.stem])
        for label_set in CLASS_COLUMNS
    }
    files = FileFinder(root, annotations=annotations)
    listing = ListingBuilder()
    known: set[tuple] = set()
    second_narrations = 0
    for file in annotations:
        if "_classes" in file.stem:
            continue
        split = split_from_name(file)
        for where, row in csv_rows(file, COLUMNS if split == "test" else [*COLUMNS, *CLASS_COLUMNS.values()]):
            labels = {
                label_set: _class_name(where, row[column], class_keys[label_set])
                for label_set, column in CLASS_COLUMNS.items()
                if column in row
            }
            if labels:
                labels["action"] = f"{labels['verb']},{labels['noun']}"
            path = files.find(row["video_id"], split=split)
            name = path or f"{row['participant_id']}/videos/{row['video_id']}.MP4"
            item = SourceItem(name, labels, row["participant_id"], split, *_segment(where, row))
            if item.sort_key in known:
                second_narrations += 1
                continue
            known.add(item.sort_key)
            listing.add(where, item, None if path else "missing")
    ignored = files.ignored_files()
    ignored["(second narration of a segment)"] = second_narrations
    return listing.build(["verb", "noun", "action"], ignored, files.notes)


def _segment(where: str, row: dict[str, str]) -> tuple[float, float]:
    """Returns start and end in seconds."""
    start = _parse_timestamp(where, row["start_timestamp"])
    end = _parse_timestamp(where, row["stop_timestamp"])
    if end <= start:
        stop = row["stop_timestamp"]
        raise UserError(f"{where}: stop_timestamp {stop}: expected one after start_timestamp")
    return start, end


def _parse_timestamp(where: str, text: str) -> float:
    """HH:MM:SS.ss -> seconds."""
    match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)", text)
    if not match:
        raise UserError(f"{where}: time {text!r}: expected HH:MM:SS.ss")
    return round(int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]), 6)


def _class_keys(files: Sequence[Path]) -> dict[str, str] | None:
    """Returns class number -> key, from files with the columns id,key,instances,category; None without
    files."""
    return {row["id"]: row["key"] for file in files for _, row in csv_rows(file, ["id", "key"])} or None


def _class_name(where: str, number: str, keys: dict[str, str] | None) -> str:
    if not number.isdecimal() or (keys is not None and number not in keys):
        expected = "a whole number" + (" of the classes file" if keys else "")
        raise UserError(f"{where}: class {number!r}: expected {expected}")
    return keys[number] if keys else number

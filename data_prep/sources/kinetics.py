"""Kinetics-400, 600 and 700 (arXiv 1705.06950, 1808.01340, 1907.06987): DeepMind's csv files.

label,youtube_id,time_start,time_end,split (400 has is_cc after them; a test list may have no label). Trimmed
files are called ID_SSSSSS_EEEEEE (seconds, six digits), in one folder per split (CVDF) or per class, with
spaces or underscores (the official crawler, OpenMMLab). A file called ID alone is the whole video and is cut
by the times.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    ListingBuilder,
    SourceItem,
    SourceListing,
    csv_rows,
    parse_span,
    require_annotations,
    split_from_name,
)
from data_prep.sources.file_finder import FileFinder
from vidssl.core.errors import UserError
from vidssl.data.split_names import SPLITS

REPLACEMENTS = "replacement_for_corrupted_k400"  # folder of CVDF's, which count before the files of a split


def read_kinetics(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: the YouTube video. The split is a column of the row, or else taken from the file's name."""
    require_annotations(annotations, "kinetics", "train.csv, val.csv or validate.csv, test.csv")
    files = FileFinder(root, annotations=annotations)
    listing = ListingBuilder()
    for file in annotations:
        for where, row in csv_rows(file, ["youtube_id", "time_start", "time_end"]):
            split = SPLITS.get(row["split"].lower()) if "split" in row else split_from_name(file)
            if split is None:
                raise UserError(f"{where}: split {row['split']!r}: expected train, val, validate or test")
            youtube_id = row["youtube_id"]
            start, end = parse_span(where, row["time_start"], row["time_end"])
            if start is None or end is None or not youtube_id:
                raise UserError(
                    f"{where}: expected youtube_id, time_start and time_end (seconds), found {row}"
                )
            labels = {"label": row["label"]} if row.get("label") else {}
            trimmed_name = f"{youtube_id}_{int(start):06d}_{int(end):06d}"
            trimmed = files.find(trimmed_name, REPLACEMENTS, split)
            whole = None if trimmed else files.find(youtube_id, split=split)
            if whole:
                listing.add(where, SourceItem(whole, labels, youtube_id, split, start, end))
            else:
                listing.add_named(where, trimmed_name, trimmed, labels, youtube_id, split)
    return listing.build(["label"], files.ignored_files(), files.notes)

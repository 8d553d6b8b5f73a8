"""Kinetics-400, 600 and 700 (arXiv 1705.06950, 1808.01340, 1907.06987): DeepMind's csv files.

label,youtube_id,time_start,time_end,split (400 has is_cc after them; a test list may have no label). Trimmed files are
named ID_SSSSSS_EEEEEE (seconds, six digits), in one folder a split (CVDF) or a folder a class, with spaces or
underscores (the official crawler, OpenMMLab). A file called ID alone is the whole video and is cut by the times.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    SPLITS,
    FileFinder,
    ListingBuilder,
    SourceItem,
    SourceListing,
    need,
    seconds,
    split_of,
    table,
)
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: the YouTube video. The split is the row's, or that in the file's name where there is no such column."""
    need(annotations, "kinetics", "train.csv, val.csv or validate.csv, test.csv")
    files, out = FileFinder(root), ListingBuilder()
    for file in annotations:
        for where, row in table(file, ["youtube_id", "time_start", "time_end"]):
            split = SPLITS.get(row["split"]) if "split" in row else split_of(file)
            if split is None:
                raise UserError(f"{where}: split {row['split']!r}: expected train, val, validate or test")
            start, end = seconds(where, row["time_start"], row["time_end"])
            if start is None or end is None or not row["youtube_id"]:
                raise UserError(
                    f"{where}: expected youtube_id, time_start and time_end (seconds), found {row}"
                )
            labels = {"label": row["label"]} if row.get("label") else {}
            name = f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}"
            if path := files.find(name):
                out.add(where, SourceItem(path, labels, row["youtube_id"], split))
            elif path := files.find(row["youtube_id"]):
                out.add(where, SourceItem(path, labels, row["youtube_id"], split, start, end))
            else:
                out.add(where, SourceItem(name, labels, row["youtube_id"], split), "missing")
    return out.source(["label"], files.left())

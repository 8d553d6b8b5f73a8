"""Lists of videos without labels, as HowTo100M (arXiv 1906.03327) is given out.

FILE.txt: a path a line, relative to the source. FILE.csv: a column video_id (HowTo100M_v1.csv), and optionally start
and end in seconds; the file of a video is called VIDEO_ID, in any folder.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    FileFinder,
    ListingBuilder,
    SourceItem,
    SourceListing,
    inside,
    need,
    seconds,
    table,
    text_lines,
)
from data_prep.sources.csv_list import check
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: the video."""
    need(annotations, "unlabelled", "a .txt of paths, or a .csv with video_id")
    out, files = ListingBuilder(), None
    for file in annotations:
        if file.suffix == ".csv":
            files = files or FileFinder(root)
            for where, row in table(file, ["video_id"]):
                if not row["video_id"]:
                    raise UserError(f"{where}: no video_id")
                path, times = files.find(row["video_id"]), seconds(where, row.get("start"), row.get("end"))
                item = SourceItem(path or row["video_id"], {}, row["video_id"], None, *times)
                out.add(where, item, None if path else "missing")
        elif file.suffix == ".txt":
            for number, line in enumerate(text_lines(file), 1):
                if line.strip():
                    item = SourceItem(inside(f"{file}:{number}", line, root), {})
                    out.add(f"{file}:{number}", item, check(root, item))
        else:
            raise UserError(f"{file}: expected a .txt of paths or a .csv with video_id")
    return out.source([], files.left() if files else None)

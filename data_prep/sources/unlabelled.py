"""Lists of videos without labels, such as HowTo100M (arXiv 1906.03327).

FILE.txt: one path per line, relative to the source. FILE.csv: a column video_id (HowTo100M_v1.csv), and
optionally start and end in seconds, group and split; the file of a video is called VIDEO_ID, in any folder.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    FolderOptions,
    ListingBuilder,
    SourceItem,
    SourceListing,
    check_splits_of_lists,
    csv_rows,
    listed_item,
    parse_path,
    parse_span,
    rejection_reason,
    require_annotations,
    splits_of_lists,
    text_lines,
)
from data_prep.sources.file_finder import FileFinder
from vidssl.core.errors import UserError

COLUMNS = ("video_id", "group", "split", "start", "end")


def read_unlabelled(
    root: Path, annotations: Sequence[Path], options: FolderOptions = FolderOptions()
) -> SourceListing:
    """Group, if a csv file has no such column: the video."""
    require_annotations(annotations, "unlabelled", "a .txt of paths, or a .csv with video_id")
    listing = ListingBuilder()
    files: FileFinder | None = None
    unread: dict[str, None] = {}
    splits = splits_of_lists(annotations, options)
    for file in splits:
        if file.suffix == ".csv":
            files = files or FileFinder(root, annotations=annotations)
            for where, row in csv_rows(file, ["video_id"]):
                unread |= dict.fromkeys(name for name in row if name not in COLUMNS)
                video_id = row["video_id"]
                if not video_id:
                    raise UserError(f"{where}: no video_id")
                split = row.get("split") or splits[file]
                path = files.find(video_id, split=split)
                span = parse_span(where, row.get("start"), row.get("end"))
                group = row.get("group") or video_id
                item = SourceItem(path or video_id, {}, group, split, *span)
                listing.add(where, item, None if path else "missing")
        elif file.suffix == ".txt":
            for number, line in enumerate(text_lines(file), 1):
                if line.strip():
                    where = f"{file}:{number}"
                    item = SourceItem(parse_path(where, line, root), {}, None, splits[file])
                    item = listed_item(where, root, item, options)
                    listing.add(where, item, rejection_reason(root, item))
        else:
            raise UserError(f"{file}: expected a .txt of paths or a .csv with video_id")
    if files is not None:
        notes = [f"columns that are not read: {', '.join(unread)}"] if unread else []
        source = listing.build([], files.ignored_files(), [*files.notes, *notes])
    else:
        source = listing.build([], root=root)
    check_splits_of_lists(source.items, splits, options)
    return source

"""Corpora as their owners publish them: annotation files and a folder of files -> items. One file a format.

Shards of others need no source: `python -m data_prep.scan DIR` makes their index.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources import (
    csv_list,
    diving48,
    epic_kitchens,
    folder,
    hmdb51,
    imagenet,
    jester,
    json_lines,
    kinetics,
    ssv2,
    ucf101,
    unlabelled,
)
from data_prep.sources.common import EXTENSIONS, SourceItem, SourceListing
from vidssl.core.errors import UserError

__all__ = ["EXTENSIONS", "SOURCES", "SourceItem", "SourceListing", "read_source"]

SOURCES = {  # kind -> (the folder of files, annotation files) -> Source
    "folder": folder.read,
    "imagefolder": folder.read,
    "csv": csv_list.read,
    "jsonl": json_lines.read,
    "unlabelled": unlabelled.read,
    "kinetics": kinetics.read,
    "ssv2": ssv2.read,
    "ucf101": ucf101.read,
    "hmdb51": hmdb51.read,
    "diving48": diving48.read,
    "jester": jester.read,
    "epic_kitchens": epic_kitchens.read,
    "imagenet": imagenet.read,
}


def read_source(root: Path, kind: str = "folder", annotations: Sequence[Path] = ()) -> SourceListing:
    """The items of the files below `root`, said by `annotations` in the format `kind`."""
    if kind == "webdataset":
        raise UserError(f"{root}: shards of others are used as they are: python -m data_prep.scan {root}")
    if kind not in SOURCES:
        raise UserError(f"--source {kind}: expected one of {', '.join(SOURCES)}")
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; expected FOLDER/<class>/<file>, or a folder with labels.csv"
        )
    source = SOURCES[kind](root, annotations)
    if not source.items:
        others = ", ".join(f"{n} {ext}" for ext, n in source.ignored.most_common(5))
        if source.rejected:
            first, rest = next(iter(source.rejected)), len(source.rejected)
            raise UserError(
                f"{root}: none of its {rest} files is there, of a known kind, named in UTF-8 (the first: {first[:80]})"
            )
        raise UserError(f"{root}: no video or image in it" + (f" (other files: {others})" if others else ""))
    return source

"""Jester v1 (Materzynska et al., ICCVW 2019): jester-v1-train.csv, -validation.csv, -test.csv and -labels.csv.

Lines are `ID;CLASS`, in the test list `ID`; labels.csv has a class a line. No header. The owners give each clip as a
folder of 12 fps JPEGs, which is not read: a clip must be a video called ID.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    FileFinder,
    ListingBuilder,
    SourceItem,
    SourceListing,
    need,
    split_of,
    text_lines,
)
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """labels.csv, where given, is what the classes are checked against."""
    need(annotations, "jester", "jester-v1-train.csv, -validation.csv, -test.csv, -labels.csv")
    classes = {
        c.strip()
        for file in annotations
        if file.stem.endswith("labels")
        for c in text_lines(file)
        if c.strip()
    }
    files, out = FileFinder(root), ListingBuilder()
    for file in annotations:
        if file.stem.endswith("labels"):
            continue
        split = split_of(file)
        for number, line in enumerate(text_lines(file), 1):
            where, (name, semicolon, label) = f"{file}:{number}", map(str.strip, line.partition(";"))
            if not line.strip():
                continue
            if not name or bool(label) != bool(semicolon) or not (label or split == "test"):
                raise UserError(
                    f"{where}: {line.strip()!r}: expected ID;CLASS" + (" or ID" if split == "test" else "")
                )
            if label and classes and label not in classes:
                raise UserError(f"{where}: class {label!r}: expected one of the {len(classes)} in the labels")
            path = files.find(name)
            if path is None:
                _no_frames(root, name)
            labels = {"label": label} if label else {}
            out.add(where, SourceItem(path or name, labels, None, split), None if path else "missing")
    return out.source(["label"], files.left())


def _no_frames(root: Path, name: str) -> None:
    for folder in (root / name, root / "20bn-jester-v1" / name):
        if folder.is_dir():
            make = f"ffmpeg -framerate 12 -i {name}/%05d.jpg -crf 18 -pix_fmt yuv420p {name}.mp4"
            raise UserError(
                f"{folder}: a folder of frames; expected a video (make one of each folder: {make})"
            )

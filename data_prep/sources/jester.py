"""Jester v1 (Materzynska et al., ICCVW 2019): jester-v1-train.csv, -validation.csv, -test.csv and
-labels.csv.

Lines are `ID;CLASS`, in the test list `ID`; labels.csv has one class per line. There is no header. Jester is
published as a folder of 12 fps JPEGs per clip, which is not read: a clip must be a video called ID.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    ListingBuilder,
    SourceListing,
    require_annotations,
    split_from_name,
    text_lines,
)
from data_prep.sources.file_finder import FileFinder
from vidssl.core.errors import UserError


def read_jester(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Classes are checked against labels.csv, if it is given."""
    names = "jester-v1-train.csv, -validation.csv, -test.csv, -labels.csv"
    require_annotations(annotations, "jester", names)
    label_files = [file for file in annotations if file.stem.endswith("labels")]
    classes = {line.strip() for file in label_files for line in text_lines(file) if line.strip()}
    files = FileFinder(root, annotations=annotations)
    listing = ListingBuilder()
    for file in annotations:
        if file in label_files:
            continue
        split = split_from_name(file)
        for number, line in enumerate(text_lines(file), 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            name, semicolon, label = map(str.strip, line.partition(";"))
            if not name or bool(label) != bool(semicolon) or not (label or split == "test"):
                expected = "expected ID;CLASS" + (" or ID" if split == "test" else "")
                raise UserError(f"{where}: {line.strip()!r}: {expected}")
            if label and classes and label not in classes:
                raise UserError(f"{where}: class {label!r}: expected one of the {len(classes)} in the labels")
            path = files.find(name, split=split)
            if path is None:
                _check_no_frame_folder(root, name)
            listing.add_named(where, name, path, {"label": label} if label else {}, None, split)
    return listing.build(["label"], files.ignored_files(), files.notes)


def _check_no_frame_folder(root: Path, name: str) -> None:
    for folder in (root / name, root / "20bn-jester-v1" / name):
        if folder.is_dir():
            command = f"ffmpeg -framerate 12 -i {name}/%05d.jpg -crf 18 -pix_fmt yuv420p {name}.mp4"
            raise UserError(
                f"{folder}: a folder of frames; expected a video (make one of each folder: {command})"
            )

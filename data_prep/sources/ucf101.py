"""UCF101 (arXiv 1212.0402): classInd.txt and, of one of the three splits, trainlist01.txt and testlist01.txt.

classInd.txt: `1 ApplyEyeMakeup`. trainlist: `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`; testlist: the
same without the number.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    ListingBuilder,
    SourceListing,
    require_annotations,
    split_from_name,
    split_lines,
)
from data_prep.sources.file_finder import FileFinder
from vidssl.core.errors import UserError


def read_ucf101(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: v_CLASS_gNN, the video from which its clips are cut."""
    require_annotations(annotations, "ucf101", "classInd.txt, trainlist01.txt, testlist01.txt")
    class_files = [file for file in annotations if file.name.lower().startswith("classind")]
    if len(class_files) != 1:
        raise UserError(
            f"--source ucf101: {len(class_files)} classInd.txt among the annotations; expected one"
        )
    classes = _read_classes(class_files[0])
    files = FileFinder(root, annotations=annotations)
    listing = ListingBuilder()
    for file in annotations:
        if file == class_files[0]:
            continue
        split = split_from_name(file)
        form = "CLASS/FILE.avi NUMBER" if split == "train" else "CLASS/FILE.avi"
        for where, words in split_lines(file, form):
            folder, _, name = words[0].rpartition("/")
            match = re.fullmatch(r"(v_.+_g\d+)_c\d+", Path(name).stem)
            if folder.lower() not in classes or not match:
                expected = f"expected CLASS/v_CLASS_gNN_cNN.avi, CLASS being in {class_files[0]}"
                raise UserError(f"{where}: {words[0]}: {expected}")
            number, label = classes[folder.lower()]
            if len(words) > 1 and words[1] != str(number):
                raise UserError(
                    f"{where}: class number {words[1]} of {label}: expected {number}, as in {class_files[0]}"
                )
            path = files.find(Path(name).stem, folder, split)
            listing.add_named(where, words[0], path, {"label": label}, match[1], split)
    return listing.build(["label"], files.ignored_files(), files.notes)


def _read_classes(file: Path) -> dict[str, tuple[int, str]]:
    """Returns lower-case class -> (number, class): the lists and files also spell HandStandPushups."""
    classes: dict[str, tuple[int, str]] = {}
    for where, (number, name) in split_lines(file, "NUMBER CLASS"):
        if not number.isdecimal() or name.lower() in classes:
            raise UserError(
                f"{where}: '{number} {name}': expected a number and a class that was not named before"
            )
        classes[name.lower()] = int(number), name
    return classes

"""UCF101 (arXiv 1212.0402): classInd.txt and, of one of the three splits, trainlist01.txt and testlist01.txt.

classInd.txt: `1 ApplyEyeMakeup`. trainlist: `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`; testlist: the same without
the number.
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
    words,
)
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: v_CLASS_gNN, the video that its clips are cut from."""
    need(annotations, "ucf101", "classInd.txt, trainlist01.txt, testlist01.txt")
    index = [file for file in annotations if file.name.lower().startswith("classind")]
    if len(index) != 1:
        raise UserError(f"--source ucf101: {len(index)} classInd.txt among the annotations; expected one")
    classes: dict[str, tuple[int, str]] = {}  # lower case: the lists and files also spell HandStandPushups
    for where, (number, name) in words(index[0], "NUMBER CLASS"):
        if not number.isdecimal() or name.lower() in classes:
            raise UserError(
                f"{where}: '{number} {name}': expected a number and a class that was not named before"
            )
        classes[name.lower()] = int(number), name
    files, out = FileFinder(root), ListingBuilder()
    for file in annotations:
        if file == index[0]:
            continue
        split = split_of(file)
        for where, parts in words(file, "CLASS/FILE.avi NUMBER" if split == "train" else "CLASS/FILE.avi"):
            folder, _, name = parts[0].rpartition("/")
            found = re.fullmatch(r"(v_.+_g\d+)_c\d+", Path(name).stem)
            if folder.lower() not in classes or not found:
                raise UserError(
                    f"{where}: {parts[0]}: expected CLASS/v_CLASS_gNN_cNN.avi, CLASS being in {index[0]}"
                )
            want, label = classes[folder.lower()]
            if len(parts) > 1 and parts[1] != str(want):
                raise UserError(
                    f"{where}: class number {parts[1]} of {label}: expected {want}, as in {index[0]}"
                )
            path = files.find(Path(name).stem, folder)
            out.add(
                where,
                SourceItem(path or parts[0], {"label": label}, found[1], split),
                None if path else "missing",
            )
    return out.source(["label"], files.left())

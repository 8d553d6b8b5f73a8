"""HMDB51 (Kuehne et al., ICCV 2011): the files CLASS_test_splitN.txt of one of the three splits.

A line is `FILE.avi 1`; 1: train, 2: test, 0: neither.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    ListingBuilder,
    SourceListing,
    require_annotations,
    split_lines,
)
from data_prep.sources.file_finder import FileFinder
from vidssl.core.errors import UserError


def read_hmdb51(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: the film or video from which the clip was taken, which is the file name up to the class."""
    require_annotations(annotations, "hmdb51", "all CLASS_test_split1.txt, or all of another split")
    files = FileFinder(root, annotations=annotations)
    listing = ListingBuilder()
    split_numbers = set()
    unused = 0
    for file in annotations:
        match = re.fullmatch(r"(.+)_test_split([123])", file.stem)
        if not match:
            raise UserError(f"{file}: expected a file called CLASS_test_split1.txt (or 2, or 3)")
        label = match[1]
        split_numbers.add(match[2])
        if len(split_numbers) > 1:
            raise UserError(
                f"{file}: of another split than {annotations[0]}; expected the lists of one split"
            )
        for where, (name, number) in split_lines(file, "FILE.avi NUMBER"):
            if number not in ("0", "1", "2"):
                raise UserError(f"{where}: {number}: expected 0 (neither), 1 (train) or 2 (test)")
            split = {"1": "train", "2": "test"}.get(number)
            path = files.find(Path(name).stem, label, split)
            if split is None:
                unused += path is not None
                continue
            group = name.split(f"_{label}_")[0] if f"_{label}_" in name else None
            listing.add_named(where, f"{label}/{name}", path, {"label": label}, group, split)
    ignored = files.ignored_files()
    ignored["(in neither part of the split)"] = unused
    return listing.build(["label"], ignored, files.notes)

"""HMDB51 (Kuehne et al., ICCV 2011): the files CLASS_test_splitN.txt of one of the three splits.

A line is `FILE.avi 1`, 1 for train, 2 for test, 0 for neither.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import FileFinder, ListingBuilder, SourceItem, SourceListing, need, words
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: what stands before the class in a file's name, the film or video that the clip was taken from."""
    need(annotations, "hmdb51", "all CLASS_test_split1.txt, or all of another split")
    files, out, numbers, unused = FileFinder(root), ListingBuilder(), set(), 0
    for file in annotations:
        named = re.fullmatch(r"(.+)_test_split([123])", file.stem)
        if not named:
            raise UserError(f"{file}: expected a file called CLASS_test_split1.txt (or 2, or 3)")
        label = named[1]
        numbers.add(named[2])
        if len(numbers) > 1:
            raise UserError(
                f"{file}: of another split than {annotations[0]}; expected the lists of one split"
            )
        for where, (name, number) in words(file, "FILE.avi NUMBER"):
            if number not in ("0", "1", "2"):
                raise UserError(f"{where}: {number}: expected 0 (neither), 1 (train) or 2 (test)")
            path = files.find(Path(name).stem, label)
            if number == "0":
                unused += path is not None
                continue
            group = name.split(f"_{label}_")[0] if f"_{label}_" in name else None
            item = SourceItem(
                path or f"{label}/{name}", {"label": label}, group, ("train", "test")[number == "2"]
            )
            out.add(where, item, None if path else "missing")
    ignored = files.left()
    ignored["(in neither part of the split)"] = unused
    return out.source(["label"], ignored)

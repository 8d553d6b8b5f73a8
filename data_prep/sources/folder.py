"""FOLDER/<class>/.../<file>, or FOLDER/train/<class>/... where the first level consists of split names only.

This is torchvision's ImageFolder layout too. A folder with labels.csv is read by that file instead.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources import csv_list
from data_prep.sources.common import EXTENSIONS, SPLITS, SourceItem, SourceListing, walk
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """The class of a file is the first folder level (below the split's)."""
    if annotations:
        raise UserError(f"--source folder reads no annotation file ({annotations[0]}); --source csv does")
    if (root / "labels.csv").is_file():
        return csv_list.read(root, [])
    items: list[SourceItem] = []
    rejected: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    for path in walk(root):
        item = SourceItem(path, {})
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        if path.rpartition("/")[2].startswith(".") or item.ext not in EXTENSIONS:
            ext = SourceItem(shown, {}).ext
            ignored["." + ext if ext else "(no extension)"] += 1
        elif shown != path:
            rejected[shown] = "bad_name"  # not UTF-8: no JSON can hold it
        elif not os.path.isfile(root / path):
            rejected[path] = "missing"  # a link to nowhere
        else:
            items.append(item)
    parts = {item.path: item.path.split("/")[:-1] for item in items}
    tops = {p[0] if p else "" for p in parts.values()}
    has_splits = bool(tops) and tops <= set(SPLITS)
    out = []
    for item in sorted(items, key=lambda item: item.place):
        split = parts[item.path][0] if has_splits else None
        levels = parts[item.path][has_splits:]
        out.append(SourceItem(item.path, {"label": levels[0]} if levels else {}, None, split))
    return SourceListing(out, ["label"] if any(item.labels for item in out) else [], rejected, ignored)

"""FOLDER/<class>/.../<file>, or FOLDER/train/<class>/... if the first level consists of names of splits only.

This is also the layout of torchvision's ImageFolder. If the folder has a labels.csv, that is read instead.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import EXTENSIONS, SPLITS, SourceItem, SourceListing, list_files
from data_prep.sources.csv_list import read_csv_list
from data_prep.summary import Tally
from vidssl.core.errors import UserError


def read_folder(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """The class of a file is the first folder level (below the split's folder)."""
    if annotations:
        raise UserError(f"--source folder reads no annotation file ({annotations[0]}); --source csv does")
    if (root / "labels.csv").is_file():
        return read_csv_list(root, [])
    found: list[SourceItem] = []
    rejected: dict[str, str] = {}
    ignored = Tally()
    for path in list_files(root):
        item = SourceItem(path, {})
        printable = os.fsencode(path).decode("utf-8", "backslashreplace")
        if path.rpartition("/")[2].startswith(".") or item.ext not in EXTENSIONS:
            ext = SourceItem(printable, {}).ext
            ignored.note("." + ext if ext else "(no extension)", path)
        elif printable != path:
            rejected[printable] = "bad_name"  # not UTF-8, so JSON cannot hold it
        elif not os.path.isfile(root / path):
            rejected[path] = "missing"  # a broken link
        else:
            found.append(item)
    folders = {item.path: item.path.split("/")[:-1] for item in found}
    top_folders = {levels[0] if levels else "" for levels in folders.values()}
    has_splits = bool(top_folders) and top_folders <= set(SPLITS)
    items = []
    for item in sorted(found, key=lambda item: item.sort_key):
        split = folders[item.path][0] if has_splits else None
        levels = folders[item.path][has_splits:]
        items.append(SourceItem(item.path, {"label": levels[0]} if levels else {}, None, split))
    label_sets = ["label"] if any(item.labels for item in items) else []
    return SourceListing(items, label_sets, rejected, ignored)

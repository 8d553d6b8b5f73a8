"""Diving48 (Li et al., ECCV 2018), version 2: Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json.

An entry is {"vid_name", "label", "start_frame", "end_frame"}; the files, VID_NAME.mp4, are cut already. The vocabulary
lists the four parts of each dive: the class is these with blanks between, or the number where no vocabulary is given.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    FileFinder,
    ListingBuilder,
    SourceItem,
    SourceListing,
    json_file,
    json_list,
    need,
    split_of,
)
from vidssl.core.errors import UserError


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: the video that the dives are cut from, VID_NAME without its last number."""
    need(
        annotations,
        "diving48",
        "Diving48_V2_train.json, Diving48_V2_test.json, and Diving48_vocab.json for names",
    )
    names: list[str] | None = None
    for file in annotations:
        if "vocab" in file.stem:
            names = [
                " ".join(map(str, parts)) if isinstance(parts, list) else str(parts)
                for parts in json_file(file)
            ]
    files, out = FileFinder(root), ListingBuilder()
    for file in annotations:
        if "vocab" in file.stem:
            continue
        split = split_of(file)
        for where, entry in json_list(file, ["vid_name", "label"]):
            name, label = str(entry["vid_name"]), entry["label"]
            if not isinstance(label, int) or not 0 <= label < (len(names) if names else 48):
                raise UserError(
                    f"{where}: label {label!r}: expected a number from 0 to {(len(names) if names else 48) - 1}"
                )
            path = files.find(name)
            labels = {"label": names[label] if names else str(label)}
            out.add(
                where,
                SourceItem(path or name, labels, name.rpartition("_")[0] or None, split),
                None if path else "missing",
            )
    return out.source(["label"], files.left())

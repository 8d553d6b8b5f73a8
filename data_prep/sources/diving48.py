"""Diving48 (Li et al., ECCV 2018), version 2: Diving48_V2_train.json, Diving48_V2_test.json and
Diving48_vocab.json.

An entry is {"vid_name", "label", "start_frame", "end_frame"}; the files, VID_NAME.mp4, are cut already. The
vocabulary lists the four attributes of each dive: the class name is these with blanks between, or the number
without a vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import (
    ListingBuilder,
    SourceListing,
    json_objects,
    read_json_file,
    require_annotations,
    split_from_name,
)
from data_prep.sources.file_finder import FileFinder
from vidssl.core.errors import UserError

CLASSES = 48


def read_diving48(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Group: the video from which the dives are cut, VID_NAME without its last number."""
    names = "Diving48_V2_train.json, Diving48_V2_test.json, and Diving48_vocab.json for names"
    require_annotations(annotations, "diving48", names)
    vocabulary: list[str] | None = None
    for file in annotations:
        if "vocab" in file.stem:
            listed = read_json_file(file)
            if not isinstance(listed, list):
                raise UserError(f"{file}:1: expected a list with the attributes of each class")
            vocabulary = [
                " ".join(map(str, attributes)) if isinstance(attributes, list) else str(attributes)
                for attributes in listed
            ]
    files = FileFinder(root, annotations=annotations)
    listing = ListingBuilder()
    classes = len(vocabulary) if vocabulary else CLASSES
    for file in annotations:
        if "vocab" in file.stem:
            continue
        split = split_from_name(file)
        for where, entry in json_objects(file, ["vid_name", "label"]):
            name = str(entry["vid_name"])
            label = entry["label"]
            if not isinstance(label, int) or not 0 <= label < classes:
                raise UserError(f"{where}: label {label!r}: expected a number from 0 to {classes - 1}")
            labels = {"label": vocabulary[label] if vocabulary else str(label)}
            group = name.rpartition("_")[0] or None
            listing.add_named(where, name, files.find(name, split=split), labels, group, split)
    return listing.build(["label"], files.ignored_files(), files.notes)

"""Something-Something v2 (arXiv 1706.04261): the published train, validation, test and labels json files.

An entry is {"id", "label", "template", "placeholders"}; its class is the template without square brackets, as
in labels.json. Entries of the test list have an id alone. Videos are ID.webm. The published names of the
annotation files have the prefix something-something-v2- or none.
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


def read_ssv2(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Classes are checked against the labels file, if it is given."""
    require_annotations(annotations, "ssv2", "train.json, validation.json, test.json and labels.json")
    classes: dict | None = None
    for file in annotations:
        if file.stem.endswith("labels"):
            classes = read_json_file(file)
            if not isinstance(classes, dict) or not classes:
                raise UserError(f"{file}:1: expected an object, class -> number")
    files = FileFinder(root, annotations=annotations)
    listing = ListingBuilder()
    for file in annotations:
        if file.stem.endswith("labels"):
            continue
        split = split_from_name(file)
        for where, entry in json_objects(file, ["id"] if split == "test" else ["id", "template"]):
            name = str(entry["id"])
            labels = {}
            if "template" in entry:
                label = str(entry["template"]).replace("[", "").replace("]", "")
                if classes is not None and label not in classes:
                    raise UserError(
                        f"{where}: class {label!r}: expected one of the {len(classes)} in the labels"
                    )
                labels["label"] = label
            listing.add_named(where, name, files.find(name, split=split), labels, None, split)
    return listing.build(["label"], files.ignored_files(), files.notes)

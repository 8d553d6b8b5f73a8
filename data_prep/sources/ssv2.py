"""Something-Something v2 (arXiv 1706.04261): the owners' train, validation, test and labels json files.

An entry is {"id", "label", "template", "placeholders"}; its class is the template without square brackets, which is how
labels.json spells it. Entries of the test list have an id alone. Files are ID.webm. The owners' names have a prefix
something-something-v2- or none.
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
    """The labels file, where given, is what the classes are checked against."""
    need(annotations, "ssv2", "train.json, validation.json, test.json and labels.json")
    classes: dict | None = None
    for file in annotations:
        if file.stem.endswith("labels"):
            classes = json_file(file)
            if not isinstance(classes, dict) or not classes:
                raise UserError(f"{file}:1: expected an object, class -> number")
    files, out = FileFinder(root), ListingBuilder()
    for file in annotations:
        if file.stem.endswith("labels"):
            continue
        split = split_of(file)
        for where, entry in json_list(file, ["id"] if split == "test" else ["id", "template"]):
            name, labels = str(entry["id"]), {}
            if "template" in entry:
                labels["label"] = str(entry["template"]).replace("[", "").replace("]", "")
                if classes is not None and labels["label"] not in classes:
                    raise UserError(
                        f"{where}: class {labels['label']!r}: expected one of the {len(classes)} in the labels"
                    )
            path = files.find(name)
            out.add(where, SourceItem(path or name, labels, None, split), None if path else "missing")
    return out.source(["label"], files.left())

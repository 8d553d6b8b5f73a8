"""Source formats: annotation files as they are published, and a folder of files. One module per format.

WebDataset shards need no source: `vidssl scan DIR` makes their index.
"""

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import EXTENSIONS, FolderOptions, SourceItem, SourceListing
from data_prep.sources.csv_list import read_csv_list
from data_prep.sources.diving48 import read_diving48
from data_prep.sources.epic_kitchens import read_epic_kitchens
from data_prep.sources.folder import read_folder
from data_prep.sources.hmdb51 import read_hmdb51
from data_prep.sources.imagenet import read_imagenet
from data_prep.sources.jester import read_jester
from data_prep.sources.json_lines import read_json_lines
from data_prep.sources.kinetics import read_kinetics
from data_prep.sources.names import media_stem, recording
from data_prep.sources.ssv2 import read_ssv2
from data_prep.sources.ucf101 import read_ucf101
from data_prep.sources.unlabelled import read_unlabelled
from vidssl.core.errors import UserError

__all__ = ["EXTENSIONS", "SOURCES", "FolderOptions", "SourceItem", "SourceListing", "read_source"]

SOURCES = {  # --source -> reader(folder of files, annotation files)
    "folder": read_folder,
    "imagefolder": read_folder,
    "csv": read_csv_list,
    "jsonl": read_json_lines,
    "unlabelled": read_unlabelled,
    "kinetics": read_kinetics,
    "ssv2": read_ssv2,
    "ucf101": read_ucf101,
    "hmdb51": read_hmdb51,
    "diving48": read_diving48,
    "jester": read_jester,
    "epic_kitchens": read_epic_kitchens,
    "imagenet": read_imagenet,
}


OWN_LAYOUTS = ("folder", "imagefolder", "csv", "jsonl", "unlabelled")  # their readers take FolderOptions


def read_source(
    root: Path,
    kind: str = "folder",
    annotations: Sequence[Path] = (),
    options: FolderOptions = FolderOptions(),
) -> SourceListing:
    """Lists the files below `root` by annotations in the format `kind`. Raises UserError if there is no
    file."""
    if kind == "webdataset":
        raise UserError(
            f"{root}: WebDataset shards are used as they are: vidssl scan {shlex.quote(str(root))}"
        )
    if kind not in SOURCES:
        raise UserError(f"--source {kind}: expected one of {', '.join(SOURCES)}")
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; expected FOLDER/<class>/<file>, or a folder with labels.csv"
        )
    if kind == "imagefolder" and options.frame_rate is None:
        options = options._replace(frames="images")
    listing = SOURCES[kind](root, annotations, *([options] if kind in OWN_LAYOUTS else []))
    if listing.items:
        listing = listing._replace(notes=[*listing.notes, *note_alike_classes(listing.items)])
        return group_related(root, listing)
    if listing.rejected:
        first = next(iter(listing.rejected))
        raise UserError(
            f"{root}: none of its {len(listing.rejected)} files is there, of a known kind, named in UTF-8 "
            f"(the first: {first[:80]}){path_hint(root, first)}"
        )
    others = ", ".join(f"{n} {ext}" for ext, n in listing.ignored.most_common(5))
    raise UserError(f"{root}: no video or image in it" + (f" (other files: {others})" if others else ""))


def path_hint(root: Path, path: str) -> str:
    """Says why a listed path may not be found, if it seems to be known."""
    if "\\" in path:
        return "; folders are separated by /, not by \\"
    if any((root / word).is_file() for word in re.split(r"[,;\s]+", path)[:1] if word != path):
        return (
            "; a line holds more than a path: for labels, give --source csv a file with a header (path,label)"
        )
    return ""


def note_alike_classes(items: Sequence[SourceItem]) -> list[str]:
    """Returns a line for each set of classes whose names differ in spelling only."""
    alike: dict[tuple[str, str], set[str]] = defaultdict(set)
    for label_set, name in {pair for item in items for pair in item.labels.items()}:
        alike[label_set, spelling(name)].add(name)
    return [
        f"classes that differ in spelling only: {', '.join(map(repr, sorted(names)))}"
        for _, names in sorted(alike.items())
        if len(names) > 1
    ]


def spelling(name: str) -> str:
    """What the spellings of a name share: case and spaces do not count; 1, 01 and 1.0 are one number."""
    try:
        return f"{float(name):g}"
    except ValueError:
        return "".join(name.casefold().split())


def group_related(root: Path, listing: SourceListing) -> SourceListing:
    """Groups the files of a folder that share a name without extension, clips whose names are those of one
    recording, and paths of one file, unless they have groups."""
    members: dict[tuple, list[str]] = defaultdict(list)
    for path in {item.path: None for item in listing.items if item.group is None}:
        folder, _, name = path.rpartition("/")
        members["name", folder, media_stem(name)].append(path)
        if shared := recording(name):
            members["recording", shared].append(path)
        facts = os.stat(root / path)
        members["file", facts.st_dev, facts.st_ino].append(path)
    group_of: dict[str, str] = {}
    for paths in members.values():
        if len(paths) > 1:
            known = {group_of[path] for path in paths if path in group_of}
            group = min(known, default=media_stem(min(paths)))
            group_of.update({p: group for p, other in group_of.items() if other in known})
            group_of |= dict.fromkeys(paths, group)
    if not group_of:
        return listing
    items = [item._replace(group=item.group or group_of.get(item.path)) for item in listing.items]
    note = f"{len(group_of)} files are grouped by a common name, recording or file, such as {min(group_of)}"
    return listing._replace(items=items, notes=[*listing.notes, note])

"""ImageNet-1k (ILSVRC 2012): train/SYNSET/SYNSET_N.JPEG, and val/ in synset folders or flat, ILSVRC2012_val_N.JPEG.

The class is the WordNet id, n01440764. A flat val needs the development kit's ILSVRC2012_validation_ground_truth.txt (a
class number a line, of image 1, 2, ...) and its meta.mat, or instead of that a text file with the WordNet id of class
number 1, 2, ..., a line each. The split is known from the files' names.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import FileFinder, ListingBuilder, SourceItem, SourceListing, text_lines
from vidssl.core.errors import UserError
from vidssl.data.decoding.base import IMAGE_EXTENSIONS

SYNSET = r"n\d{8}"


def read(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Other images than those of the challenge are left out; --source imagefolder reads any."""
    truth = [file for file in annotations if "ground_truth" in file.stem]
    rest = [file for file in annotations if file not in truth]
    if len(truth) > 1 or len(rest) != len(truth):
        raise UserError(
            "--source imagenet: expected both ILSVRC2012_validation_ground_truth.txt and meta.mat, or none"
        )
    of_val = _ground_truth(truth[0], rest[0]) if truth else {}
    files, out = FileFinder(root, IMAGE_EXTENSIONS), ListingBuilder()
    for name in sorted(files.of):
        found = re.fullmatch(rf"({SYNSET})_\d+|ILSVRC2012_(val|test)_\d{{8}}(?:_({SYNSET}))?", name)
        path = files.find(name) if found else None
        if not found or path is None:
            continue
        split = found[2] or "train"
        above = next((p for p in reversed(path.split("/")[:-1]) if re.fullmatch(SYNSET, p)), None)
        label = found[1] or found[3] or above or of_val.get(name)
        if split == "val" and label is None:
            raise UserError(
                f"{root / path}: in no synset folder; expected --annotations "
                "ILSVRC2012_validation_ground_truth.txt meta.mat"
            )
        out.add(str(root / path), SourceItem(path, {"label": label} if label else {}, None, split))
    for name in of_val:
        if name not in files.of:
            out.add(str(truth[0]), SourceItem(f"{name}.JPEG", {}, None, "val"), "missing")
    return out.source(["label"], files.left())


def _ground_truth(truth: Path, meta: Path) -> dict[str, str]:
    """Image name -> WordNet id."""
    ids = _from_mat(meta) if meta.suffix == ".mat" else text_lines(meta)
    for number, synset in enumerate(ids, 1):
        if not re.fullmatch(SYNSET, synset.strip()):
            raise UserError(f"{meta}:{number}: {synset!r}: expected a WordNet id such as n01440764")
    out = {}
    for number, line in enumerate(text_lines(truth), 1):
        if not line.strip().isdecimal() or not 1 <= int(line) <= len(ids):
            raise UserError(f"{truth}:{number}: {line!r}: expected a class number from 1 to {len(ids)}")
        out[f"ILSVRC2012_val_{number:08d}"] = ids[int(line) - 1].strip()
    return out


def _from_mat(meta: Path) -> list[str]:
    """The WordNet ids of classes 1 to 1000: those synsets of meta.mat that have no children."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as e:
        raise UserError(
            f"{meta}: reading it needs scipy: pip install scipy, or give a text file with a WordNet id a line instead"
        ) from e
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError) as e:
        raise UserError(f"{meta}: not the development kit's meta.mat: {e}") from e
    if sorted(leaves) != list(range(1, len(leaves) + 1)):
        raise UserError(f"{meta}: expected synsets numbered 1, 2, ... that have no children")
    return [leaves[i] for i in sorted(leaves)]

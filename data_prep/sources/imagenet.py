"""ImageNet-1k (ILSVRC 2012): train/SYNSET/SYNSET_N.JPEG, and val/ in synset folders or flat,
ILSVRC2012_val_N.JPEG.

The class name is the WordNet id, such as n01440764. A flat val needs the development kit's
ILSVRC2012_validation_ground_truth.txt (one class number per line, of image 1, 2, ...) and its meta.mat, or
instead of that a text file with the WordNet ids of class number 1, 2, ..., one per line. Splits follow from
the folders, since subsets such as Imagenette have images of train in val/; without such a folder, from the
names of the files.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import ListingBuilder, SourceItem, SourceListing, text_lines
from data_prep.sources.file_finder import FileFinder
from vidssl.core.errors import UserError
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.split_names import parse_split

SYNSET = r"n\d{8}"


def read_imagenet(root: Path, annotations: Sequence[Path]) -> SourceListing:
    """Images that are not named as in the challenge are left out; --source imagefolder reads any."""
    ground_truth = [file for file in annotations if "ground_truth" in file.stem]
    metas = [file for file in annotations if file not in ground_truth]
    if len(ground_truth) > 1 or len(metas) != len(ground_truth):
        raise UserError(
            "--source imagenet: expected both ILSVRC2012_validation_ground_truth.txt and meta.mat, or none"
        )
    val_labels = _val_labels(ground_truth[0], metas[0]) if ground_truth else {}
    files = FileFinder(root, IMAGE_EXTENSIONS, annotations)
    listing = ListingBuilder()
    moved = Counter[str]()
    for name in sorted(files.paths):
        match = re.fullmatch(rf"({SYNSET})_\d+|ILSVRC2012_(val|test)_\d{{8}}(?:_({SYNSET}))?", name)
        path = files.find(name) if match else None
        if not match or path is None:
            continue
        folders = path.split("/")[-2::-1]  # the innermost first
        named = match[2] or "train"
        split = next((found.split for folder in folders if (found := parse_split(folder))), named)
        if split != named:
            moved[f"{named} in a folder of {split}"] += 1
        synset_folder = next((folder for folder in folders if re.fullmatch(SYNSET, folder)), None)
        label = match[1] or match[3] or synset_folder or val_labels.get(name)
        if split == "val" and label is None:
            raise UserError(
                f"{root / path}: in no synset folder; expected --annotations "
                "ILSVRC2012_validation_ground_truth.txt meta.mat"
            )
        labels = {"label": label} if label else {}
        listing.add(str(root / path), SourceItem(path, labels, None, split))
    for name in val_labels:
        if name not in files.paths:
            listing.add(str(ground_truth[0]), SourceItem(f"{name}.JPEG", {}, None, "val"), "missing")
    notes = [f"{n} images are named as {what}: the folder decides" for what, n in sorted(moved.items())]
    return listing.build(["label"], files.ignored_files("(not named as in ImageNet)"), [*files.notes, *notes])


def _val_labels(ground_truth: Path, meta: Path) -> dict[str, str]:
    """Returns name of the image -> WordNet id."""
    synsets = _synsets_of_mat(meta) if meta.suffix == ".mat" else text_lines(meta)
    for number, synset in enumerate(synsets, 1):
        if not re.fullmatch(SYNSET, synset.strip()):
            raise UserError(f"{meta}:{number}: {synset!r}: expected a WordNet id such as n01440764")
    labels = {}
    for number, line in enumerate(text_lines(ground_truth), 1):
        if not line.strip().isdecimal() or not 1 <= int(line) <= len(synsets):
            expected = f"expected a class number from 1 to {len(synsets)}"
            raise UserError(f"{ground_truth}:{number}: {line!r}: {expected}")
        labels[f"ILSVRC2012_val_{number:08d}"] = synsets[int(line) - 1].strip()
    return labels


def _synsets_of_mat(meta: Path) -> list[str]:
    """Returns the WordNet ids of classes 1 to 1000, which are the synsets of meta.mat without children."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as e:
        raise UserError(
            f"{meta}: reading it needs scipy: pip install scipy, "
            "or give a text file with a WordNet id a line instead"
        ) from e
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError) as e:
        raise UserError(f"{meta}: not the development kit's meta.mat: {e}") from e
    if sorted(leaves) != list(range(1, len(leaves) + 1)):
        raise UserError(f"{meta}: expected synsets numbered 1, 2, ... that have no children")
    return [leaves[i] for i in sorted(leaves)]

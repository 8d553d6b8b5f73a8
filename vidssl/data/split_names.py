"""Names of folders, lists and shards that say whose split they are."""

import re
from collections.abc import Iterable
from typing import NamedTuple

SPLITS = {
    **dict.fromkeys(("train", "training", "trn", "tr", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}
# Words beside the one of the split that say nothing about a class
GENERIC = {
    "video", "videos", "clip", "clips", "frame", "frames", "rawframes", "image", "images", "img", "imgs",
    "jpg", "jpgs", "jpeg", "data", "dataset", "set", "split", "list", "part", "raw", "mini", "tiny", "full",
    "files",
}  # fmt: skip
SUFFIX = r"(set|list|data|split|videos|clips|frames|images)?"


class SplitName(NamedTuple):
    """A name with a word for a split, and its other words."""

    split: str  # train, val or test
    others: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether nothing else in the name could be the name of a class."""
        return all(word in GENERIC or any(c.isdigit() for c in word) for word in self.others)


def parse_split(name: str) -> SplitName | None:
    """Returns the split of a name such as Train, videos_val or k400_test_256; None if it names none or
    two."""
    words = [word for word in re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)) if word]
    splits = {}
    for i, word in enumerate(words):
        match = re.fullmatch(rf"({'|'.join(SPLITS)}){SUFFIX}\d*", word.lower())
        if match:
            splits[i] = SPLITS[match[1]]
    if len(set(splits.values())) != 1:
        return None
    others = tuple(word.lower() for i, word in enumerate(words) if i not in splits)
    return SplitName(next(iter(splits.values())), others)


def name_splits(names: Iterable[str]) -> str:
    """Says which splits the names of shards are of, if of several: "train-0 (train), val-0 (val)"; else
    empty."""
    examples: dict[str, str] = {}
    for name in names:
        if (found := parse_split(name)) is not None:
            examples.setdefault(found.split, name)
    named = ", ".join(f"{name} ({split})" for split, name in sorted(examples.items()))
    return named if len(examples) > 1 else ""

"""Filters: which clips are dropped, by thresholds on measured values.

    too_short   the clip is shorter than `min_seconds`
    too_small   the short side of the source, as displayed, is under `min_side` pixels
    too_dark    the mean luma (0 black .. 255 white) of 16 evenly spaced frames is under `dark`
    static      the mean absolute luma difference from each of these frames to the next is under `static`

Luma is averaged over 32x32 blocks, so that noise and compression hardly count. An image (one frame, not a
video) can only be too small. Identical files are found by the plan (`find_identical_files`), before any file
is decoded.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidssl.core.io import file_sha256

FILTER_FRAMES = 16  # frames of a clip that are measured
NEAR_PREFIX = "near-"  # of the names of the files in OUT that keep near duplicates
THUMBNAIL_SIDE = 32  # blocks along each side of a thumbnail


class Rejected(NamedTuple):
    """Why a file, or a clip of it, is not in the shards."""

    reason: str
    detail: str
    value: float | None = None  # the measured value, if a threshold decided
    item: int = 0  # index of the source item among those of the file
    start: float | None = None  # seconds
    end: float | None = None

    def record(self) -> dict:
        """The entries of rejected.jsonl beside the path."""
        optional = {"value": self.value, "start": self.start, "end": self.end}
        present = {name: value for name, value in optional.items() if value is not None}
        return {"reason": self.reason, "detail": self.detail} | present


class Filters(NamedTuple):
    """Thresholds; 0 turns a filter off."""

    min_seconds: float = 0.0
    min_side: int = 0  # pixels
    dark: float = 0.0  # grey levels
    static: float = 0.0  # grey levels

    @property
    def need_thumbnails(self) -> bool:
        """Whether pixels must be measured."""
        return self.dark > 0 or self.static > 0

    def check_size(self, short_side: int) -> Rejected | None:
        """Returns why a source with this short side (pixels) is dropped, or None."""
        if short_side < self.min_side:
            detail = f"short side of {short_side} pixels, under {self.min_side}"
            return Rejected("too_small", detail, short_side)
        return None

    def check_clip(self, seconds: float, thumbnails: Callable[[], Sequence[np.ndarray]]) -> Rejected | None:
        """Returns why a clip is dropped, or None.

        thumbnails: called if pixels must be measured; returns f32 [THUMBNAIL_SIDE,THUMBNAIL_SIDE] for each of
        the frames of `evenly_spaced_indices`.
        """
        if seconds < self.min_seconds:
            return Rejected("too_short", f"{seconds:.3f} s, under {self.min_seconds:g}", round(seconds, 3))
        if not self.need_thumbnails:
            return None
        frames = np.stack(thumbnails() or [np.zeros((THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.float32)])
        luma = float(frames.mean())
        change = float(np.abs(np.diff(frames, axis=0)).mean()) if len(frames) > 1 else 0.0
        if luma < self.dark:
            return Rejected("too_dark", f"mean luma {luma:.2f}, under {self.dark:g}", round(luma, 2))
        if change < self.static:
            detail = f"mean difference {change:.3f}, under {self.static:g}"
            return Rejected("static", detail, round(change, 3))
        return None


NO_FILTERS = Filters()


def evenly_spaced_indices(frames: int) -> np.ndarray:
    """Returns the indices of at most FILTER_FRAMES frames, evenly spaced over `frames`."""
    return np.unique(np.linspace(0, frames - 1, FILTER_FRAMES).round().astype(int))


def find_identical_files(files: Iterable[Path]) -> dict[Path, Path]:
    """Returns file -> the first file before it that has the same bytes. Only files of equal size are read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file in files:
        by_size[file.stat().st_size].append(file)
    identical = {}
    for size, members in by_size.items():
        first_with: dict[str, Path] = {}  # SHA-256 -> file
        for file in members if size and len(members) > 1 else ():
            digest = file_sha256(file)
            if first_with.setdefault(digest, file) != file:
                identical[file] = first_with[digest]
    return identical

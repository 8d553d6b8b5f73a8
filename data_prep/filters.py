"""Which clips are dropped: rules on what was measured, each with its threshold.

    too_short   shown for less than `min_seconds`
    too_small   the short side of the source, as shown, is under `min_side` pixels
    too_dark    the mean luma (0 black .. 255 white) of 16 frames, evenly spread, is under `dark`
    static      the mean absolute luma difference from each of these 16 frames to the next is under `static`

Luma is looked at in 32x32 blocks, so that noise and compression hardly count. A picture (one frame, not a video) can
only be too small. Exact duplicates are found by the plan (`same_files`), before any file is decoded.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange

from vidssl.core.io import file_sha256

LOOKS = 16  # frames of a clip that are looked at
SIDE, SUB = 32, 4  # blocks along each side of a thumbnail; pixels looked at along each side of a block


class Rejected(NamedTuple):
    """Why a file, or the piece of it that its item names by number, is not in the shards. value: what was measured."""

    reason: str
    detail: str
    value: float | None = None
    item: int = 0
    start: float | None = None  # seconds
    end: float | None = None

    def line(self) -> dict:
        """As rejected.jsonl says it."""
        told = {"value": self.value, "start": self.start, "end": self.end}
        return {"reason": self.reason, "detail": self.detail} | {
            k: v for k, v in told.items() if v is not None
        }


class Filters(NamedTuple):
    min_seconds: float = 0.0
    min_side: int = 0  # pixels
    dark: float = 0.0  # grey levels
    static: float = 0.0  # grey levels

    @property
    def look(self) -> bool:
        """Whether frames must be looked at."""
        return self.dark > 0 or self.static > 0

    def check_size(self, side: int) -> Rejected | None:
        """side: the short one of the source, in pixels."""
        if side < self.min_side:
            return Rejected("too_small", f"short side of {side} pixels, under {self.min_side}", side)
        return None

    def check_clip(self, seconds: float, thumbs: Callable[[], Sequence[np.ndarray]]) -> Rejected | None:
        """thumbs: gives f32 [SIDE,SIDE] of each of the LOOKS frames (fewer where there are fewer)."""
        if seconds < self.min_seconds:
            return Rejected("too_short", f"{seconds:.3f} s, under {self.min_seconds:g}", round(seconds, 3))
        if not self.look:
            return None
        seen = np.stack(thumbs() or [np.zeros((SIDE, SIDE), np.float32)])
        luma, change = (
            float(seen.mean()),
            float(np.abs(np.diff(seen, axis=0)).mean()) if len(seen) > 1 else 0.0,
        )
        if luma < self.dark:
            return Rejected("too_dark", f"mean luma {luma:.2f}, under {self.dark:g}", round(luma, 2))
        if change < self.static:
            return Rejected(
                "static", f"mean difference {change:.3f}, under {self.static:g}", round(change, 3)
            )
        return None


NO_FILTERS = Filters()


def sample_indices(frames: int) -> np.ndarray:
    """The indices of the LOOKS frames, evenly spread over `frames`."""
    return np.unique(np.linspace(0, frames - 1, LOOKS).round().astype(int))


def thumbnail(frame: av.VideoFrame) -> np.ndarray:
    """The luma of a frame, f32 [SIDE,SIDE] in 0..255: the mean of 16 pixels of each block."""
    first = frame.format.components[0]
    if frame.format.is_rgb or not frame.format.is_planar or first.bits != 8 or not first.is_luma:
        frame = frame.reformat(format="yuv420p", dst_color_range=ColorRange.MPEG, threads=1)
    plane: Any = frame.planes[0]
    small = _blocks(np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width])
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return small if full else ((small - 16) * np.float32(255 / 219)).clip(0, 255)


def _blocks(pixels: np.ndarray) -> np.ndarray:
    """u8 [H,W,...] -> f32 [SIDE,SIDE,...]."""
    rows, columns = ((np.arange(SIDE * SUB) * n) // (SIDE * SUB) for n in pixels.shape[:2])
    few = pixels[rows][:, columns].astype(np.uint16)
    few = sum(few[k::SUB] for k in range(SUB))
    return sum(few[:, k::SUB] for k in range(SUB)) / np.float32(SUB * SUB)


def same_files(files: Iterable[Path]) -> dict[Path, Path]:
    """File -> the first of those before it that holds the same bytes; only files of one size are read."""
    check_size: dict[int, list[Path]] = defaultdict(list)
    for file in files:
        check_size[file.stat().st_size].append(file)
    same = {}
    for size, members in check_size.items():
        first: dict[str, Path] = {}
        for file in members if size and len(members) > 1 else ():
            digest = file_sha256(file)
            if first.setdefault(digest, file) != file:
                same[file] = first[digest]
    return same

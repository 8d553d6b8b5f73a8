"""The interface of an open video, and the limits beyond which a file is refused."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from vidssl.core.errors import DecodeError

VIDEO_EXTENSIONS = tuple("mp4 avi webm mkv mov m4v mpg mpeg wmv flv 3gp ts mts m2ts ogv asf vob gif".split())  # noqa: SIM905


Decoder = Literal["auto", "decord", "pyav", "torchcodec"]


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp")


# Beyond these a file is damaged or hostile ("too_large", "too_long"), or has to be cut into pieces by pack.
MAX_PIXELS = 8192 * 8192  # of one frame


MAX_FRAMES = 2_000_000  # of one file: 18 hours at 30 a second


MAX_BYTES = 8 << 30  # of one file as stored


MAX_DECODED = 4 << 30  # bytes of the frames that are asked for at once


class Video:
    """An open video. times f64 [n]: seconds since the first frame; size: (height, width) as shown."""

    times: np.ndarray
    size: tuple[int, int]
    decoder: str
    codec: str = ""
    rotation: int = 0  # degrees clockwise, already applied; known after a full decode
    errors: int = 0  # damaged packets passed over so far

    def __len__(self) -> int:
        return len(self.times)

    def get(self, indices: np.ndarray | list[int]) -> np.ndarray:
        """Frames at `indices` ([k], any order, repeats allowed) -> u8 [k,H,W,3]."""
        wanted, back = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if not len(wanted) or wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"frame indices must be in 0..{len(self) - 1} and not empty")
        if len(wanted) * self.size[0] * self.size[1] * 3 > MAX_DECODED:
            raise DecodeError("too_large", f"{len(wanted)} frames of {self.size[1]}x{self.size[0]} pixels")
        out = np.empty((len(wanted), *self.size, 3), np.uint8)
        for i, frame in enumerate(self.each(wanted)):
            out[i] = frame
        return out if len(out) == len(back) and (np.diff(back) == 1).all() else out[back]

    def each(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """The frames u8 [H,W,3] at `wanted`, ascending and unique, one after the other."""
        found = 0
        for frame in self._frames(wanted):
            if frame.shape != (*self.size, 3):
                raise DecodeError("decode_error", f"frame of shape {frame.shape}, expected {(*self.size, 3)}")
            yield frame
            found += 1
        if found < len(wanted):
            raise DecodeError("decode_error", f"frame {wanted[found]} of {len(self)} does not decode")

    def _frames(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """The same, unchecked."""
        raise NotImplementedError


def check_length(frames: int) -> None:
    if frames > MAX_FRAMES:
        raise DecodeError("too_long", f"more than {MAX_FRAMES} frames")


def _line(e: BaseException) -> str:
    """The last non-empty line of a message: FFmpeg's own word, without decord's stack trace."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    told = (line for line in lines if "ERROR" in line or "Check failed" in line)
    return next(told, lines[0] if lines else "failed")[:200]

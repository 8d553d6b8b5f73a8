"""Videos that are no files: frames in memory, and a span of an open video."""

from collections.abc import Iterator

import numpy as np

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import Video

SAME_FRAME_S = 1e-6  # seconds; a frame this little before a span belongs to it


class FramesInMemory(Video):
    """Frames u8 [n, H, W, 3], `rate` a second."""

    decoder = "memory"

    def __init__(self, frames: np.ndarray, rate: float):
        self._frames = frames
        self.times = np.arange(len(frames)) / rate
        self.size = frames.shape[1:3]

    def _decode_frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        yield from self._frames[indices]


class VideoSpan(Video):
    """The frames of an open video from `start` up to `end`, in seconds, as a video of its own. The caller
    closes the whole."""

    def __init__(self, whole: Video, start: float, end: float):
        first, stop = np.searchsorted(whole.times, np.array([start, end]) - SAME_FRAME_S).tolist()
        if first == stop:
            raise DecodeError("no_frames", f"between {start:g} and {end:g} s")
        self._whole = whole
        self._first = first
        self.times = whole.times[first:stop] - whole.times[first]
        self.size = whole.size
        self.decoder = whole.decoder

    def get(self, indices: np.ndarray | list[int]) -> np.ndarray:
        return self._whole.get(np.asarray(indices, dtype=np.int64) + self._first)

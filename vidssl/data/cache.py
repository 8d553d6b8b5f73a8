"""Decoded videos in memory (`data.cache`): each is decoded once, before the first step (cache_fill.py).

They give the clips that the files give: positions, draws and replacements are those of TrainClips. Loader
workers are forks of the process that holds the videos, and share its memory. Of several processes on a host
each holds all of them, since an epoch may show any sample to any process.
"""

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from vidssl.core.errors import DecodeError
from vidssl.data.dataset import SelectFrames
from vidssl.data.shards import Sample


class DecodedVideo(NamedTuple):
    """All frames of a video."""

    frames: Tensor  # u8 [n, H, W, 3]; zeros where a frame does not decode
    times: np.ndarray  # f64 [n], seconds
    missing: dict[int, str]  # number of a frame that does not decode: reason


class VideoCache(Protocol):
    """Where decoded videos are kept; `Sample`s name them."""

    nbytes: int  # of the frames

    def add(self, sample: Sample, video: DecodedVideo | str) -> None:
        """video: the decoded video, or the reason why it does not decode."""
        ...


def cache_key(sample: Sample) -> tuple[int, int]:
    return sample.shard, sample.offset


def present_frames(times: np.ndarray, missing: dict[int, str], select: SelectFrames) -> np.ndarray:
    """Returns the indices i64 that `select` chooses. Raises DecodeError if one of them is missing."""
    indices = select(times)
    if missing:
        reason = next((missing[i] for i in indices.flat if i in missing), None)
        if reason is not None:
            raise DecodeError(reason)
    return indices


class HostCache:
    """Decoded videos in the memory of the process."""

    def __init__(self) -> None:
        self.videos: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, dict[int, str]] | str] = {}
        self.nbytes = 0

    def add(self, sample: Sample, video: DecodedVideo | str) -> None:
        if isinstance(video, DecodedVideo):
            frames = video.frames.numpy()
            # A tensor from a loader worker holds a file descriptor.
            frames = frames.copy() if video.frames.is_shared() else frames
            self.nbytes += frames.nbytes
            self.videos[cache_key(sample)] = frames, video.times, video.missing
        else:
            self.videos[cache_key(sample)] = video

    def read_clips(self, sample: Sample, select: SelectFrames) -> np.ndarray:
        """Returns the selected frames u8 [clips, T, H, W, 3]. Raises DecodeError as decoding them would.
        select: returns i64 [clips, T]."""
        video = self.videos[cache_key(sample)]
        if isinstance(video, str):
            raise DecodeError(video)
        frames, times, missing = video
        return frames[present_frames(times, missing, select)]

"""The draws of a clip along time, and the frames of a video that they choose."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vidssl.data.sampling import sample_indices
from vidssl.data.schema import DataConfig


class Timing(NamedTuple):
    """What a clip has drawn, uniform in 0..1."""

    starts: tuple[float, ...]  # of each window among all that fit
    pace: float = 0.0  # within the range that data.stride or data.fps gives


def draw_timing(clip: DataConfig, rng: np.random.Generator) -> Timing:
    """Draws one number for each window, and a further one only where the stride or the rate is a range."""
    starts = tuple(rng.uniform() for _ in range(clip.windows))
    is_range = isinstance(clip.stride, tuple) or isinstance(clip.fps, tuple)
    return Timing(starts, rng.uniform()) if is_range else Timing(starts)


def choose_frames(times: np.ndarray, clip: DataConfig, timing: Timing, one_frame: bool = False) -> np.ndarray:
    """Returns the frame indices of a clip, i64 [windows * frames], non-decreasing in each window. times: f64
    [n] in seconds.

    one_frame: the clip is made of a single frame, any of the video; i64 [1].
    """
    if one_frame:
        return sample_indices(times, 1, 1, start=timing.starts[0])
    stride, fps = clip.stride, clip.fps
    if isinstance(stride, tuple):
        stride = draw_stride(len(times), clip.frames, stride, timing.pace)
    if isinstance(fps, tuple):
        fps = draw_rate(times[-1], clip.frames, fps, timing.pace)
    windows = [sample_indices(times, clip.frames, stride, fps, s, clip.rule) for s in timing.starts]
    return np.concatenate(windows)


def draw_stride(n: int, frames: int, stride: tuple[int, int], pace: float) -> int:
    """Returns a stride, uniform in the part of a range (ends included) with which a clip of `frames` frames
    fits in n. If none fits it is the largest one that does, at least 1."""
    fitting = max(1, (n - 1) // (frames - 1)) if frames > 1 else stride[1]
    low, high = (min(end, fitting) for end in stride)
    return low + min(high - low, int(pace * (high - low + 1)))


def draw_rate(duration: float, frames: int, fps: tuple[float, float], pace: float) -> float:
    """Returns frames per second, uniform in the part of a range with which a clip of `frames` frames fits in
    a video of `duration` seconds. If none fits it is the lowest one that does."""
    fitting = (frames - 1) / duration if duration > 0 else 0.0
    low, high = (max(end, fitting) for end in fps)
    return low + pace * (high - low)


def middle_rate(stride: Any, fps: Any) -> tuple[int | None, float | None]:
    """The stride and rate of clips in evaluation: the middle of a range, a pair of numbers."""
    if isinstance(stride, Sequence):
        stride = round(sum(stride) / 2)
    if isinstance(fps, Sequence):
        fps = sum(fps) / 2
    return stride, fps

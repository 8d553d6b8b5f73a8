"""Which frames of a video make a clip; `vidssl.data.decoders` reads them."""

import numpy as np

_SAME_TIME = 1e-6  # seconds; a frame must be nearer than this to win over the earlier one


def choose(
    times: np.ndarray, frames: int, stride: int | None = None, fps: float | None = None, start: float = 0.0
) -> np.ndarray:
    """Indices i64 [frames] of a clip, non-decreasing.

    times f64 [n] in seconds; exactly one of stride (in frames) and fps (frames per second, by time stamp: right for a
    variable frame rate). `start` in [0,1] places the window among all that fit: 0 first, 1 last. A video shorter than
    the window repeats its last frame.
    """
    if (stride is None) == (fps is None):
        raise ValueError("give exactly one of stride and fps")
    if not 0 <= start <= 1:
        raise ValueError(f"start {start}: expected 0..1")
    last, steps = len(times) - 1, np.arange(frames)
    if stride is not None:
        room = max(0, last - (frames - 1) * stride)
        return np.minimum(min(room, int(start * (room + 1))) + steps * stride, last).astype(np.int64)
    assert fps is not None
    room = max(0.0, times[-1] - (frames - 1) / fps)
    begin = times[_nearest(times, np.array([start * room]))]  # on a frame: ties between two frames would flicker
    return _nearest(times, begin + steps / fps)


def segment_starts(segments: int) -> list[float]:
    """Evenly spread `start`s for `choose`; the middle if there is one segment."""
    return [0.5] if segments == 1 else np.linspace(0, 1, segments).tolist()


def _nearest(times: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Index of the time nearest to each wanted time [k]; the earlier one of two equally near."""
    right = np.searchsorted(times, want).clip(0, len(times) - 1)
    left = (right - 1).clip(0)
    return np.where(times[right] - want < want - times[left] - _SAME_TIME, right, left).astype(np.int64)

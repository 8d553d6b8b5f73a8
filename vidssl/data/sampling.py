"""Which frames of a video make a clip; `vidssl.data.decoding.pyav` reads them."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Rule = Literal["exact", "vjepa"]

_SAME_TIME = 1e-6  # seconds; a frame must be nearer than this to win over the earlier one
_SAME_RATE = 0.01  # frames a second; time stamps may be rounded to milliseconds


def sample_indices(
    times: np.ndarray,
    frames: int,
    stride: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    rule: Rule = "exact",
) -> np.ndarray:
    """Indices i64 [frames] of a clip, non-decreasing.

    times f64 [n] in seconds; exactly one of stride (in frames) and fps (frames per second). `start` in [0,1] places the
    window among all that fit: 0 first, 1 last. `rule`:
    - "exact" (default): the stride is the stride, and fps goes by the time stamps (right for a variable frame rate). A
      video shorter than the window repeats its last frame.
    - "vjepa": what V-JEPA's loader does, for published runs: see `_reference`.
    """
    if (stride is None) == (fps is None):
        raise ValueError("give exactly one of stride and fps")
    if not 0 <= start <= 1:
        raise ValueError(f"start {start}: expected 0..1")
    if rule == "vjepa":
        return _reference(len(times), frames, stride or _whole_stride(times, fps), start)
    last, steps = len(times) - 1, np.arange(frames)
    if stride is not None:
        room = max(0, last - (frames - 1) * stride)
        return np.minimum(min(room, int(start * (room + 1))) + steps * stride, last).astype(np.int64)
    assert fps is not None
    room = max(0.0, times[-1] - (frames - 1) / fps)
    begin = times[
        _nearest(times, np.array([start * room]))
    ]  # on a frame: ties between two frames would flicker
    return _nearest(times, begin + steps / fps)


def sample_several(times: np.ndarray, starts: Sequence[float], **rule: Any) -> np.ndarray:
    """`choose` for each of several starts -> i64 [len(starts), frames], for clips that share one decoding."""
    return np.stack([sample_indices(times, start=start, **rule) for start in starts])


def _reference(n: int, frames: int, stride: int, start: float) -> np.ndarray:
    """V-JEPA's choice among n frames (src/datasets/video_dataset.py), a quirk that the published encoders have learned.

    `frames` points are spread evenly over frames * stride frames, both ends included, and rounded down: 16 x 4 has a
    spacing of 64 / 15 = 4.27, by turns 4 and 5, and the last frame of a video is never in a window that fits. A video
    that is not longer than the window gives n // stride points spread over all of it (wider apart than the stride, the
    more the fewer they are), then its last frame again and again. Exact is better: the spacing is what is asked for
    and the same in every clip, so a motion has one speed.
    """
    length = frames * stride
    if n > length:
        begin = min(n - length - 1, int(start * (n - length)))
        return np.linspace(begin, begin + length, frames).clip(begin, begin + length - 1).astype(np.int64)
    spread = np.linspace(0, n, n // stride)
    return np.concatenate([spread, np.full(frames - len(spread), n)]).clip(0, n - 1).astype(np.int64)


def _whole_stride(times: np.ndarray, fps: float | None) -> int:
    """Frames between those of a clip by V-JEPA 2's rule: the average rate, rounded up, // fps, at least 1.

    30 frames a second at fps=4 give 7 (really 4.3 a second). Rates below fps, an error there, give 1 here.
    """
    assert fps is not None
    span = times[-1] - times[0]
    rate = (len(times) - 1) / span if span > 0 else 0.0
    return max(1, int(math.ceil(rate - _SAME_RATE) // fps))


def repeated(g: int, repeat: int, lanes: int) -> tuple[int, int]:
    """Position g of a stream that shows every sample `repeat` times in a row -> (position of the sample, which copy).

    The copies stand `lanes` positions apart, so that all are in the lane of their sample (position mod lanes): one
    process has them, in one batch if the global batch is a multiple of lanes * repeat, and can decode the video once.
    Such a batch holds batch / repeat samples, and as many positions as there are samples, times `repeat`, are an epoch.
    """
    row, lane = divmod(g, lanes)
    return row // repeat * lanes + lane, row % repeat


def repeated_positions(g: int, repeat: int, lanes: int) -> list[int]:
    """The positions, g among them, that show the sample of position g (see `repeated`)."""
    row, lane = divmod(g, lanes)
    return [(row // repeat * repeat + copy) * lanes + lane for copy in range(repeat)]


def segment_starts(segments: int) -> list[float]:
    """Evenly spread `start`s for `choose`; the middle if there is one segment."""
    return [0.5] if segments == 1 else np.linspace(0, 1, segments).tolist()


def _nearest(times: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Index of the time nearest to each wanted time [k]; the earlier one of two equally near."""
    right = np.searchsorted(times, want).clip(0, len(times) - 1)
    left = (right - 1).clip(0)
    return np.where(times[right] - want < want - times[left] - _SAME_TIME, right, left).astype(np.int64)

"""Which frames of a video make a clip, and where the repeats of a sample are in the stream."""

import math

import numpy as np

from vidssl.data.schema import Rule

SAME_TIME_S = 1e-6  # seconds; a frame must be nearer by more than this to win over the earlier one
SAME_RATE = 0.01  # frames per second; time stamps may be rounded to milliseconds


def sample_indices(
    times: np.ndarray,
    frames: int,
    stride: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    rule: Rule = "exact",
) -> np.ndarray:
    """Returns the frame indices of a clip, i64 [frames], non-decreasing.

    times: f64 [n] in seconds. Exactly one of stride (frames of the video) and fps (frames per second) is
    given.
    start: position of the clip among all that fit, from 0 (first) to 1 (last).
    rule:
    - "exact": equal strides, or the frames nearest to equal times (right for variable frame rates). A video
      shorter than the clip repeats its last frame.
    - "vjepa": the choice of V-JEPA's loader, for published recipes: see `vjepa_indices`.
    """
    if (stride is None) == (fps is None):
        raise ValueError("give exactly one of stride and fps")
    if not 0 <= start <= 1:
        raise ValueError(f"start {start}: expected 0..1")
    if rule == "vjepa":
        return vjepa_indices(len(times), frames, stride or vjepa_stride(times, fps), start)
    steps = np.arange(frames)
    if stride is not None:
        last = len(times) - 1
        latest = max(0, last - (frames - 1) * stride)
        first = min(latest, int(start * (latest + 1)))
        return np.minimum(first + steps * stride, last).astype(np.int64)
    assert fps is not None
    latest_s = max(0.0, times[-1] - (frames - 1) / fps)
    # Begins on a frame: between two frames, rounding would decide which of them is nearer.
    first_s = times[nearest_frames(times, np.array([start * latest_s]))]
    return nearest_frames(times, first_s + steps / fps)


def segment_starts(segments: int) -> list[float]:
    """Evenly spaced `start`s for `sample_indices`; the middle for one segment."""
    return [0.5] if segments == 1 else np.linspace(0, 1, segments).tolist()


def vjepa_indices(n: int, frames: int, stride: int, start: float) -> np.ndarray:
    """V-JEPA's choice among n frames (src/datasets/video_dataset.py), a quirk that the published encoders
    have learned.

    `frames` points are spread evenly over frames * stride frames, both ends included, and rounded down: 16 x
    4 has a spacing of 64 / 15 = 4.27, alternately 4 and 5, and the last frame of a video is never in a window
    that fits. A video not longer than the window gives n // stride points spread over all of it (the fewer
    they are, the wider apart than the stride), then its last frame repeatedly. With "exact" the spacing is
    the requested one and the same in every clip, so a motion has one speed.
    """
    window = frames * stride
    if n > window:
        first = min(n - window - 1, int(start * (n - window)))
        points = np.linspace(first, first + window, frames)
        return points.clip(first, first + window - 1).astype(np.int64)
    points = np.linspace(0, n, n // stride)
    padding = np.full(frames - len(points), n)
    return np.concatenate([points, padding]).clip(0, n - 1).astype(np.int64)


def vjepa_stride(times: np.ndarray, fps: float | None) -> int:
    """V-JEPA 2's stride for a rate: the average rate, rounded up, // fps, at least 1.

    A video of 30 frames per second at fps=4 gives 7 (4.3 per second in fact). A rate below fps, an error
    there, gives 1.
    """
    assert fps is not None
    duration = times[-1] - times[0]
    rate = (len(times) - 1) / duration if duration > 0 else 0.0
    return max(1, int(math.ceil(rate - SAME_RATE) // fps))


def nearest_frames(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Indices of the frames nearest to the wanted times (f64 [k], seconds); the earlier one of two."""
    right = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    left = (right - 1).clip(0)
    right_is_nearer = times[right] - wanted < wanted - times[left] - SAME_TIME_S
    return np.where(right_is_nearer, right, left).astype(np.int64)


def split_repeat(position: int, repeat: int, lanes: int) -> tuple[int, int]:
    """Position of a stream that shows every sample `repeat` times -> (position of the sample, number of the
    repeat).

    The repeats of a sample are `lanes` positions apart, so they are all in the lane of their sample (position
    mod lanes): one process has them, in one batch if the global batch is a multiple of lanes * repeat, and
    can decode the video once. Such a batch holds batch / repeat samples, and an epoch has `repeat` times as
    many positions as samples.
    """
    row, lane = divmod(position, lanes)
    return row // repeat * lanes + lane, row % repeat


def repeated_positions(position: int, repeat: int, lanes: int) -> list[int]:
    """All positions, the given one included, that show the sample of a position (see `split_repeat`)."""
    row, lane = divmod(position, lanes)
    return [(row // repeat * repeat + i) * lanes + lane for i in range(repeat)]

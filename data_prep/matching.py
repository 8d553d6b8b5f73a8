"""Decides whether a candidate pair of videos shows the same pictures, by what moves in them.

Around the time at which the hashes agree, every frame of both videos becomes an 8x8 thumbnail, and each
pixel's mean over time is subtracted, which leaves what moves. The videos are the same if at the best shift
these correlate by MIN_CORRELATION over at least half of the shorter one. This tells clips of one scene and
camera apart: their backgrounds are equal, but not their motion. If nothing moves, and for images, the hashes
decide.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from data_prep.fingerprint import (
    Candidate,
    Fingerprint,
    MediaFile,
    OnProgress,
    fingerprint,
    grey_frames,
    no_progress,
)
from vidssl.data.decoding import open_video
from vidssl.data.isolation import Reporter

COMPARED_SECONDS = 30.0  # of the test video, around the time at which the hashes agree
EXTRA_SECONDS = 10.0  # of the training video, before and after that
THUMBNAILS_PER_SECOND = 24.0
MIN_CORRELATION = 0.88
MIN_OVERLAP_SECONDS = 0.75
MIN_MOTION = 0.5  # grey levels, mean over pixels of the standard deviation in time; under it nothing moves
MAX_STILL_DISTANCE = 6.0  # bits of 64, mean hash distance at which still pictures are the same


def motion_thumbnails(
    file: MediaFile, start: float, end: float, on_progress: OnProgress
) -> tuple[float, np.ndarray]:
    """Returns the time of the first frame after `start` (seconds) and thumbnails f32 [n,64] from it to `end`.

    THUMBNAILS_PER_SECOND of them, interpolated linearly between frames; n is 0 if there are fewer than two
    frames.
    """
    with open_video(*file) as video:
        indices = np.flatnonzero((video.times >= start) & (video.times <= end))
        if len(indices) < 2:
            return 0.0, np.zeros((0, 64), np.float32)
        frame_times = video.times[indices]
        frames = grey_frames(video, indices, 8, on_progress).reshape(-1, 64).astype(np.float32)
    times = np.arange(frame_times[0], frame_times[-1] + 1e-6, 1 / THUMBNAILS_PER_SECOND)
    before = np.searchsorted(frame_times, times, side="right").clip(1, len(frame_times) - 1) - 1
    fraction = (times - frame_times[before]) / (frame_times[before + 1] - frame_times[before])
    weight = fraction.astype(np.float32)[:, None]
    return float(frame_times[0]), frames[before] * (1 - weight) + frames[before + 1] * weight


def align(train: np.ndarray, test: np.ndarray) -> tuple[float, int, int]:
    """Finds the shift at which two sequences of thumbnails, f32 [n,64] and f32 [m,64], correlate most.

    Returns (correlation, shift, number of common thumbnails); (-1, 0, 0) if too few are common at any shift.
    """
    best = (-1.0, 0, 0)
    min_common = max(MIN_OVERLAP_SECONDS * THUMBNAILS_PER_SECOND, min(len(train), len(test)) / 2)
    for shift in range(-len(test), len(train)):
        first = max(0, -shift)
        last = min(len(test), len(train) - shift)
        if last - first >= min_common:
            a = train[first + shift : last + shift]
            b = test[first:last]
            a = a - a.mean(0)
            b = b - b.mean(0)
            correlation = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-9))
            best = max(best, (correlation, shift, last - first))
    return best


def compare(
    candidate: Candidate, test: MediaFile, train: MediaFile, on_progress: OnProgress = no_progress
) -> dict | None:
    """Returns the record of a pair that shows the same pictures, or None. Raises DecodeError.

    Record: "match" ("pictures" or "still pictures"), "shift" (seconds, training video minus test video),
    "hash_distance" (bits); for "pictures" also "correlation" and "overlap" (seconds).
    """
    record = {"hash_distance": round(candidate.hash_distance, 2), "shift": candidate.shift}
    start = candidate.test_time - COMPARED_SECONDS / 2
    end = candidate.test_time + COMPARED_SECONDS / 2
    test_start, b = motion_thumbnails(test, start, end, on_progress)
    train_start, a = motion_thumbnails(
        train, start + candidate.shift - EXTRA_SECONDS, end + candidate.shift + EXTRA_SECONDS, on_progress
    )
    if not len(a) or not len(b) or min(a.std(0).mean(), b.std(0).mean()) < MIN_MOTION:
        is_same = candidate.hash_distance <= MAX_STILL_DISTANCE
        return {**record, "match": "still pictures"} if is_same else None
    correlation, shift, common = align(a, b)
    if correlation < MIN_CORRELATION:
        return None
    return {
        **record,
        "match": "pictures",
        "shift": round(shift / THUMBNAILS_PER_SECOND + train_start - test_start, 2),
        "correlation": round(correlation, 4),
        "overlap": round(common / THUMBNAILS_PER_SECOND, 2),
    }


def matching_job(
    read: Callable[[Any], MediaFile],
    report: Reporter,
    task: Literal["fingerprint", "compare"],
    *args: Any,
) -> Fingerprint | dict | None:
    """Work of a child process: ("fingerprint", location) or ("compare", candidate, test location, train
    location).

    read: location -> the file there.
    """
    if task == "fingerprint":
        return fingerprint(read(args[0]), report.progress)
    candidate, test, train = args
    return compare(candidate, read(test), read(train), report.progress)

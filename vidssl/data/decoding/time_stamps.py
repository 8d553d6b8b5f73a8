"""Repairs the time stamps of frames: faults are local, so the repair is local too.

The stamps that agree with all others are kept as they are. The others (missing, repeated, swapped, far off)
are interpolated between the kept ones. A clock that is set anew in the middle of a file goes on from where it
was.
"""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

# A step between two frames beyond these is no pause but a fault: longer than MAX_GAP_S and than MANY_STEPS
# usual ones (of a time-lapse), or back by more than MAX_BACK_S.
MAX_GAP_S = 600.0
MAX_BACK_S = 10.0
MANY_STEPS = 100
MIN_RUN = 8  # frames that go on evenly after such a step: a clock that was set anew; fewer are wrong stamps
MIN_GOOD = 0.25  # share of the stamps that must agree, else frames are timed by the average rate
FEW = 0.05  # share of the stamps that single faults put in doubt
MAX_REORDERED = 16  # frames between the place of a frame in the order of decoding and in that of display
NEIGHBOURS = 8  # steps from which the step of frames before the first and after the last good one is measured


class RepairedTimes(NamedTuple):
    """seconds: f64 [n], strictly increasing. repairs: reason -> number of frames whose stamp is not used."""

    seconds: np.ndarray
    repairs: dict[str, int]


def repair_times(seconds: np.ndarray, rate: float) -> RepairedTimes:
    """Returns strictly increasing times of frames in the order of display.

    seconds: f64 [n], as the file has them; not finite: missing. rate: frames per second, for a file in which
    too few stamps agree.
    """
    known = np.isfinite(seconds)
    usual = _usual_step(seconds[known], rate)
    if known.all() and _is_steady(seconds, usual):
        return RepairedTimes(seconds, {})
    joined, moved = _join_clocks(seconds, usual)
    good = np.flatnonzero(np.isfinite(joined))
    stamps = joined[good]
    agrees = _agreeing(stamps)
    reordered = 0
    if _is_reordered(stamps, agrees):
        joined[good] = np.sort(stamps)
        reordered = int((joined[good] != stamps).sum())
        agrees = _agreeing(joined[good])
    good = good[agrees]
    if len(good) < max(2, MIN_GOOD * len(seconds)):
        first = float(joined[good[0]] - good[0] / rate) if len(good) else 0.0
        repairs = {"replaced by the average rate": len(seconds)}
        return RepairedTimes(first + np.arange(len(seconds)) / rate, repairs)
    times = _interpolate(joined, good)
    missing = int((~known).sum())
    moved_frames = int(moved[good].sum())
    counts = {
        "missing": missing,
        "moved, for a clock that was set anew": moved_frames,
        "in the order of decoding": reordered,
        "out of order": len(seconds) - len(good) - missing,
    }
    return RepairedTimes(times, {reason: n for reason, n in counts.items() if n})


def _usual_step(stamps: np.ndarray, rate: float) -> float:
    """Median of the positive steps in seconds, 1 / rate without any."""
    steps = np.diff(stamps)
    steps = steps[steps > 0]
    return float(np.median(steps)) if len(steps) else 1 / rate


def _is_steady(stamps: np.ndarray, usual: float) -> bool:
    steps = np.diff(stamps)
    return bool(((steps > 0) & (steps <= max(MAX_GAP_S, MANY_STEPS * usual))).all())


def _join_clocks(seconds: np.ndarray, usual: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits the stamps into runs at impossible steps. A long run that does not continue the clock before it
    is moved to do so; the stamps of a short one are dropped.

    Returns (seconds with NaN for dropped stamps, bool [n]: which are moved).
    """
    known = np.flatnonzero(np.isfinite(seconds))
    stamps = seconds[known]
    joined = np.full(len(seconds), np.nan)
    moved = np.zeros(len(seconds), dtype=bool)
    longest = max(MAX_GAP_S, MANY_STEPS * usual)
    steps = np.diff(stamps)
    runs = np.split(np.arange(len(known)), 1 + np.flatnonzero((steps > longest) | (steps < -MAX_BACK_S)))
    enough = min(MIN_RUN, max((_rises(stamps[run]) for run in runs), default=0))
    clock: tuple[int, float] | None = None  # the last frame of the clock so far, and its time in seconds
    for run in runs:
        offset = 0.0
        if clock is not None and len(run):
            frame, time = clock
            own = (stamps[run] >= time - MAX_BACK_S) & (stamps[run[0]] <= time + longest)
            if 2 * own.sum() >= len(run):
                run = run[own]
            else:
                offset = time + (known[run[0]] - frame) * usual - stamps[run[0]]
        if (offset or clock is None) and _rises(stamps[run]) < enough:
            continue
        if not len(run):
            continue
        moved[known[run]] = offset != 0.0
        joined[known[run]] = stamps[run] + offset
        last = _last_even(stamps[run], MANY_STEPS * usual)
        clock = int(known[run[last]]), float(joined[known[run[last]]])
    return joined, moved


def _last_even(stamps: np.ndarray, largest: float) -> int:
    """Index of the last stamp that no step above `largest` seconds precedes; of the last MIN_RUN stamps."""
    last = len(stamps) - 1
    while last and len(stamps) - last <= MIN_RUN and stamps[last] - stamps[last - 1] > largest:
        last -= 1
    return last


def _rises(stamps: np.ndarray) -> int:
    return int((np.diff(stamps) > 0).sum())


def _agreeing(stamps: np.ndarray) -> np.ndarray:
    """bool [n]: the stamps that are in every longest increasing subsequence.

    Where many frames in a row are in doubt (each stamp is written twice, say), those of one longest
    subsequence: without any, the times in between would be lost.
    """
    before = _rank(stamps)
    after = _rank(-stamps[::-1])[::-1]
    length = before.max(initial=0)
    possible = before + after - 1 == length
    alternatives = np.bincount(before[possible], minlength=length + 1)
    certain = possible & (alternatives[before] == 1)
    edges = np.flatnonzero(np.diff(np.concatenate([[1], certain, [1]])))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        if end - first > 2 * MIN_RUN:
            certain[first:end] = _one_subsequence(before, possible, stamps)[first:end]
    return certain


def _is_reordered(stamps: np.ndarray, agrees: np.ndarray) -> bool:
    """Whether the stamps are right, but in the order in which frames are decoded, which B-frames change (in
    AVI files): many disagree, few are repeated, and none is further from its place than decoders look
    ahead."""
    if (~agrees).sum() <= FEW * len(stamps):
        return False
    order = np.argsort(stamps, kind="stable")
    shifts = np.abs(order - np.arange(len(stamps)))
    return bool((np.diff(stamps[order]) > 0).mean() >= 1 - FEW and shifts.max() <= MAX_REORDERED)


def _rank(stamps: np.ndarray) -> np.ndarray:
    """i64 [n]: length of the longest increasing subsequence that ends at each stamp."""
    smallest_ends: list[float] = []
    ranks = []
    for stamp in stamps.tolist():
        rank = bisect_left(smallest_ends, stamp)
        smallest_ends[rank : rank + 1] = [stamp]
        ranks.append(rank + 1)
    return np.array(ranks, dtype=np.int64)


def _one_subsequence(before: np.ndarray, possible: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """bool [n]: one longest increasing subsequence; of equal stamps in a row, the first."""
    chosen = np.zeros(len(before), dtype=bool)
    rank = int(before.max(initial=0))
    limit = np.inf
    i = len(before) - 1
    while i >= 0:
        if possible[i] and before[i] == rank and stamps[i] < limit:
            while i and stamps[i - 1] == stamps[i]:
                i -= 1
            chosen[i] = True
            limit = stamps[i]
            rank -= 1
        i -= 1
    return chosen


def _interpolate(seconds: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Times of all frames from those at the indices `good` (at least two): linear between them, and with the
    median of the nearest steps before the first and after the last."""
    frames = np.arange(len(seconds))
    times = np.interp(frames, good, seconds[good])
    steps = np.diff(seconds[good]) / np.diff(good)
    first = float(np.median(steps[:NEIGHBOURS]))
    last = float(np.median(steps[-NEIGHBOURS:]))
    times[: good[0]] = seconds[good[0]] + (frames[: good[0]] - good[0]) * first
    times[good[-1] + 1 :] = seconds[good[-1]] + (frames[good[-1] + 1 :] - good[-1]) * last
    return times

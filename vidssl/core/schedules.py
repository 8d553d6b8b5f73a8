"""Schedules as pure functions of progress."""

import math


def cosine(start: float, end: float, done: float) -> float:
    """From start (done 0) to end (done 1 and later) along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def linear(start: float, end: float, done: float) -> float:
    """From start (done 0) to end (done 1 and later) along a line."""
    return start + (end - start) * min(done, 1.0)


def exponential(start: float, end: float, done: float) -> float:
    """From start (done 0) to end (done 1 and later), by the same factor a step."""
    return start * (end / start) ** min(done, 1.0)


DECAYS = {"cosine": cosine, "linear": linear, "exponential": exponential}

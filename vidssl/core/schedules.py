"""Schedules as pure functions of progress: 0 at the start, 1 at the end and later."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def linear(start: float, end: float, progress: float) -> float:
    """From start to end along a line."""
    return start + (end - start) * min(progress, 1.0)


def exponential(start: float, end: float, progress: float) -> float:
    """From start to end by a constant factor per step."""
    return start * (end / start) ** min(progress, 1.0)


DECAYS = {"cosine": cosine, "linear": linear, "exponential": exponential}

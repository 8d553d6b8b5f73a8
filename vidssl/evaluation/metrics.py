"""Accuracy by counting, and its interval by the bootstrap."""

import numpy as np


def accuracy(right: np.ndarray) -> float:
    """bool [n] -> percent."""
    return round(100 * float(right.mean()), 4)


def interval(right: np.ndarray, groups: list[str], seed: int = 0, draws: int = 2000) -> list[float]:
    """95 % percentile bootstrap of the accuracy, in percent; whole groups are resampled, since the clips of one source
    video are not independent. right bool [n], groups: one name a sample."""
    _, group = np.unique(groups, return_inverse=True)
    hits, sizes = np.bincount(group, right.astype(float)), np.bincount(group)
    picks = np.random.default_rng((seed, 5)).integers(len(sizes), size=(draws, len(sizes)))
    shares = hits[picks].sum(1) / sizes[picks].sum(1)
    return [round(100 * float(q), 2) for q in np.quantile(shares, [0.025, 0.975])]

"""Figures by counting, and their intervals by the bootstrap. Percent, except R2."""

from collections.abc import Callable

import numpy as np

DRAWS, SLOW_DRAWS = 2000, 400  # of the bootstrap; the second where a figure is no mean


def accuracy(right: np.ndarray) -> float:
    """bool [n] -> percent."""
    return round(100 * float(right.mean()), 4)


def bootstrap_ci(values: np.ndarray, groups: list[str], seed: int = 0, draws: int = DRAWS) -> list[float]:
    """95 % percentile bootstrap of the mean, in percent; whole groups are bootstrap_metric_ci, since the clips of one source
    video are not independent. values [n]: hits (bool), or differences of hits of two encoders (a paired comparison);
    groups: one name a sample."""
    _, group = np.unique(groups, return_inverse=True)
    hits, sizes = np.bincount(group, values.astype(float)), np.bincount(group)
    picks = np.random.default_rng((seed, 5)).integers(len(sizes), size=(draws, len(sizes)))
    shares = hits[picks].sum(1) / sizes[picks].sum(1)
    return [round(100 * float(q), 2) for q in np.quantile(shares, [0.025, 0.975])]


def bootstrap_metric_ci(
    figure: Callable[[np.ndarray], float], groups: list[str], seed: int = 0
) -> list[float]:
    """The same of any figure: a function of the numbers of the samples, whole groups of them drawn."""
    _, group = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
    rng = np.random.default_rng((seed, 5))
    drawn = [
        np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        for _ in range(SLOW_DRAWS)
    ]
    return [round(float(q), 4) for q in np.quantile([figure(i) for i in drawn], [0.025, 0.975])]


def true_class_rank(output: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many classes stand before the true one, i64 [n]: output [n, C], truth i64 [n]. Of equal ones the first."""
    mine = np.take_along_axis(output, truth[:, None], 1)
    before = np.arange(output.shape[1]) < truth[:, None]
    return ((output > mine) | ((output == mine) & before)).sum(1)


def mean_per_class(right: np.ndarray, truth: np.ndarray) -> float:
    """Mean of the accuracies of the classes that occur: no class counts more for having more samples."""
    return round(100 * float(np.mean([right[truth == c].mean() for c in np.unique(truth)])), 4)


def average_precision(score: np.ndarray, relevant: np.ndarray) -> float:
    """score [n], relevant bool [n] with at least one: mean over the relevant of the precision down to each, in [0, 1].
    Of equal scores the irrelevant stand first, so that a constant score gains nothing."""
    hits = relevant[np.lexsort((relevant, -score))]
    return float((np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)).mean())


def mean_average_precision(output: np.ndarray, relevant: np.ndarray) -> float:
    """output [n, C], relevant bool [n, C]: mean over the columns that occur, in percent (multi-label mAP)."""
    some = np.flatnonzero(relevant.any(0))
    return (
        100 * float(np.mean([average_precision(output[:, c], relevant[:, c]) for c in some]))
        if len(some)
        else 0.0
    )


def r2(guess: np.ndarray, truth: np.ndarray) -> float:
    """1 - squared error over that of the mean of `truth`; 0 where all are equal."""
    spread = float(np.square(truth - truth.mean()).sum())
    return 1 - float(np.square(guess - truth).sum()) / spread if spread else 0.0

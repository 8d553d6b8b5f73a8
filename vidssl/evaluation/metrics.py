"""Metrics by counting, and their bootstrap confidence intervals. In percent, except R2."""

from collections.abc import Callable, Iterator

import numpy as np

MEAN_RESAMPLES = 2000  # bootstrap resamples of a mean
METRIC_RESAMPLES = 400  # of any other metric, which is slower
RESAMPLES_AT_ONCE = 50  # bounds the memory to 50 numbers per group


def accuracy(correct: np.ndarray) -> float:
    """bool [n] -> percent."""
    return round(100 * float(correct.mean()), 4)


def bootstrap_ci(
    values: np.ndarray, groups: list[str], seed: int = 0, resamples: int = MEAN_RESAMPLES
) -> list[float]:
    """95 % percentile bootstrap interval of the mean, in percent. Whole groups are resampled, since the clips
    of one source video are not independent. values [n]: hits (bool), or differences between the hits of two
    encoders (a paired comparison); groups: the group of each sample."""
    _, group = np.unique(groups, return_inverse=True)
    sums = np.bincount(group, values.astype(float))
    sizes = np.bincount(group)
    means = [
        sums[drawn].sum(1) / sizes[drawn].sum(1) for drawn in resampled_groups(len(sizes), seed, resamples)
    ]
    return percent_interval(np.concatenate(means))


def resampled_groups(groups: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Yields i64 [n, groups]: the groups of n resamples, together of all."""
    rng = np.random.default_rng((seed, 5))
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        yield rng.integers(groups, size=(min(RESAMPLES_AT_ONCE, resamples - start), groups))


def percent_interval(values: np.ndarray) -> list[float]:
    """95 % percentile interval of fractions [n], in percent."""
    return [round(100 * float(q), 2) for q in np.quantile(values, [0.025, 0.975])]


def bootstrap_seeds_ci(
    first: np.ndarray, base: np.ndarray, groups: list[str], seed: int = 0, resamples: int = MEAN_RESAMPLES
) -> list[float]:
    """95 % percentile bootstrap interval of the difference between the mean accuracies of two methods, in
    percentage points: groups of test samples are resampled, and of each method its trainings, which differ by
    seed. first [S, n], base [S', n]: hits of the encoder of each training; with one training each this is
    bootstrap_ci of their difference. Of few trainings the interval is too narrow: by a factor of about
    sqrt(1 - 1/S) in what the trainings add."""
    names, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    sums = [
        np.stack([np.bincount(group, hits, len(names)) for hits in method.astype(float)])
        for method in (first, base)
    ]
    seed_rngs = [np.random.default_rng((seed, 6, i)) for i in range(2)]
    differences = []
    for drawn in resampled_groups(len(sizes), seed, resamples):
        hits = []
        for method, seed_rng in zip(sums, seed_rngs, strict=True):
            of_seed = method[:, drawn].sum(2)  # [S, count]
            chosen = seed_rng.integers(len(method), size=(len(method), len(drawn)))
            hits.append(np.take_along_axis(of_seed, chosen, 0).mean(0))
        differences.append((hits[0] - hits[1]) / sizes[drawn].sum(1))
    return percent_interval(np.concatenate(differences))


def bootstrap_metric_ci(
    metric: Callable[[np.ndarray], float], groups: list[str], seed: int = 0
) -> list[float]:
    """95 % percentile bootstrap interval of any metric: a function of the indices i64 [m] of the resampled
    samples."""
    _, group = np.unique(groups, return_inverse=True)
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group))[:-1])
    rng = np.random.default_rng((seed, 5))
    values = []
    for _ in range(METRIC_RESAMPLES):
        drawn = rng.integers(len(members), size=len(members))
        values.append(metric(np.concatenate([members[g] for g in drawn])))
    return [round(float(q), 4) for q in np.quantile(values, [0.025, 0.975])]


def true_class_rank(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Number of classes that score higher than the true one, i64 [n], for outputs [n, C] and labels i64 [n].
    Among equal scores the lower class comes first."""
    own = np.take_along_axis(outputs, labels[:, None], 1)
    lower_class = np.arange(outputs.shape[1]) < labels[:, None]
    return ((outputs > own) | ((outputs == own) & lower_class)).sum(1)


def mean_per_class(correct: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the accuracies of the classes that occur, so that each class has the same weight."""
    return round(100 * float(np.mean([correct[labels == c].mean() for c in np.unique(labels)])), 4)


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """scores [n], relevant bool [n] with at least one true: mean of the precision at each relevant sample, in
    [0, 1]. Among equal scores the irrelevant samples come first, so that a constant score gains nothing."""
    hits = relevant[np.lexsort((relevant, -scores))]
    return float((np.cumsum(hits)[hits] / (np.flatnonzero(hits) + 1)).mean())


def mean_average_precision(outputs: np.ndarray, relevant: np.ndarray) -> float:
    """outputs [n, C], relevant bool [n, C]: mean over the columns that occur, in percent (multi-label
    mAP)."""
    columns = np.flatnonzero(relevant.any(0))
    if not len(columns):
        return 0.0
    return 100 * float(np.mean([average_precision(outputs[:, c], relevant[:, c]) for c in columns]))


def r2(predictions: np.ndarray, labels: np.ndarray) -> float:
    """1 - squared error over the squared error of the labels' mean; 0 if all labels are equal."""
    spread = float(np.square(labels - labels.mean()).sum())
    return 1 - float(np.square(predictions - labels).sum()) / spread if spread else 0.0

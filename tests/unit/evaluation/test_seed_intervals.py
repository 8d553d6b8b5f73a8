"""Intervals of the difference between two methods, of which each was trained with several seeds."""

import numpy as np

from vidssl.evaluation.metrics import bootstrap_ci, bootstrap_seeds_ci

SAMPLES, SEEDS = 200, 5
EACH_ALONE = [str(i) for i in range(SAMPLES)]


def test_one_training_each_is_the_paired_interval():
    rng = np.random.default_rng(0)
    first, base = rng.uniform(size=(2, SAMPLES)) < [[0.6], [0.4]]
    groups = [str(i // 4) for i in range(SAMPLES)]
    expected = bootstrap_ci(first.astype(float) - base, groups)
    assert bootstrap_seeds_ci(first[None], base[None], groups) == expected


def test_the_interval_covers_the_difference_of_methods_whose_trainings_differ():
    """The accuracies of the trainings of a method have a deviation of 10 points, test samples one of 3.5."""
    rng = np.random.default_rng(1)
    covered_by_seeds, covered_by_one = 0, 0
    for i in range(200):
        accuracies = rng.normal(0.5, 0.1, size=(2, SEEDS, 1)).clip(0, 1)
        first, base = rng.uniform(size=(2, SEEDS, SAMPLES)) < accuracies
        low, high = bootstrap_seeds_ci(first, base, EACH_ALONE, seed=i, resamples=400)
        covered_by_seeds += low <= 0 <= high
        low, high = bootstrap_ci(first[0].astype(float) - base[0], EACH_ALONE, seed=i, resamples=400)
        covered_by_one += low <= 0 <= high
    assert covered_by_seeds >= 170  # of 5 trainings somewhat less than 95 % of 200
    assert covered_by_one <= 130

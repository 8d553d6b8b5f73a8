"""Rank correlation of scores without labels with the accuracy, and its interval over runs."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from vidssl.zoo.scores import correlation_table, interval_over_runs, rank_correlation


def test_it_is_spearmans_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(6, size=(2, 30)).astype(float)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(rank_correlation(x, np.ones(30)))


def test_snapshots_of_one_run_are_not_independent():
    """The same points with a run each give a narrower interval than with two runs in all."""
    rng = np.random.default_rng(1)
    x = np.arange(20.0)
    y = x + rng.normal(size=20) * 8
    low, high = interval_over_runs(x, y, [f"run {i}" for i in range(20)])
    assert low < rank_correlation(x, y) < high
    few = interval_over_runs(x, y, [f"run {i // 10}" for i in range(20)])
    # two runs have three mixtures: the first twice, the second twice, both
    found = [rank_correlation(x[part], y[part]) for part in (slice(10), slice(10, 20), slice(20))]
    assert min(found) <= few[0] <= few[1] <= max(found)


def test_a_line_for_each_score_that_all_encoders_have():
    rows = [
        {"run": f"r{i}", "run_seed": 0, "control": "none", "samples": 9, "rankme": i, "value": 10.0 * i}
        for i in range(5)
    ]
    shuffled = [{**rows[0], "control": "shuffled", "rankme": 99}]
    table = correlation_table({"p: motion": rows + shuffled})
    assert table[2:] == ["| p: motion | rankme | +1.00 [+1.00, +1.00] | 5 of 5 runs |"]
    assert correlation_table({"p: motion": rows[:3]}) == []
    rows[0]["samples"] = 8  # of another number of samples it is another score
    assert correlation_table({"p: motion": rows}) == []

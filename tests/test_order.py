"""Order: each epoch shows each sample once, whatever the shards, lanes, window and processes."""

import numpy as np
import pytest

from vidssl.data.order import Order, batches, check_split
from vidssl.errors import UserError


def flat(order: Order, g: int) -> int:
    shard, number = order.at(g)
    assert 0 <= number < order.counts[shard]
    return int(order.counts[:shard].sum()) + number


@pytest.mark.parametrize("seed", range(6))
def test_every_epoch_is_a_permutation(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, rng.integers(1, 12)).tolist()
    counts[0] += 1
    lanes, window = int(rng.choice([1, 2, 8, 16])), int(rng.integers(1, 20))
    order = Order(counts, seed, lanes, window)
    for epoch in range(4):
        shown = [flat(order, epoch * order.n + p) for p in range(order.n)]
        assert sorted(shown) == list(range(order.n))


def test_lanes_are_equal_to_within_one():
    order = Order([1, 50, 3, 7], 0, lanes=8)
    for epoch in range(5):
        sizes = np.diff(order._lay_out(epoch).starts)
        assert sizes.sum() == order.n
        assert sizes.max() - sizes.min() <= 1


def test_epochs_and_seeds_differ_and_calls_do_not():
    def epoch(seed, e):
        order = Order([20] * 5, seed, lanes=4)
        return [order.at(e * 100 + p) for p in range(100)]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_positions_do_not_depend_on_who_asks_or_when():
    backwards, forwards = Order([13, 4, 9], 3, 4, 5), Order([13, 4, 9], 3, 4, 5)
    asked = [forwards.at(g) for g in range(100)]
    assert [backwards.at(g) for g in reversed(range(100))] == asked[::-1]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_processes_share_the_same_global_batches(world):
    whole = list(batches(3, 7, 16, 8, 0, 1))
    parts = [list(batches(3, 7, 16, 8, r, world)) for r in range(world)]
    for step, one in enumerate(whole):
        together = [g for r in range(world) for g in parts[r][step]]
        assert sorted(together) == one
        assert len({len(parts[r][step]) for r in range(world)}) == 1


def test_a_process_reads_few_shards_at_a_time():
    order = Order([100] * 80, 0, lanes=8, window=200)
    mine = [g for step in batches(0, 100, 8, 8, rank=0, world=8) for g in step]  # one lane: 100 samples, of 1000
    assert len({order.at(g)[0] for g in mine}) <= 4


def test_samples_are_well_mixed_within_a_lane():
    order = Order([1000], 0, lanes=1, window=1000)
    shown = np.array([flat(order, g) for g in range(1000)])
    assert abs(np.corrcoef(np.arange(1000), shown)[0, 1]) < 0.15  # 4.7 deviations of a perfect shuffle


def test_replacements_are_functions_of_the_position():
    order, again = Order([10, 10], 0, 2), Order([10, 10], 0, 2)
    drawn = [order.replacement(g, a) for g in range(5) for a in (1, 2, 3)]
    assert drawn == [again.replacement(g, a) for g in range(5) for a in (1, 2, 3)]
    assert len(set(drawn)) > 5


def test_batch_lanes_and_processes_must_divide():
    check_split(16, 8, 4)
    with pytest.raises(UserError, match="batch 12"):
        check_split(12, 8, 1)
    with pytest.raises(UserError, match="3 processes"):
        check_split(16, 8, 3)

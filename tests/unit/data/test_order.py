"""Order: each epoch shows each sample once, whatever the shards, lanes, window and processes."""

import pickle

import numpy as np
import pytest

from tools.bench_order import covers_epoch, neighbours, resident_mb
from vidssl.core.errors import UserError
from vidssl.data.order import Mixture, Order, check_split, interleave, make_order, positions_per_step


def flat(order: Order, g: int) -> int:
    shard, number = order.locate(g)
    assert 0 <= number < order.counts[shard]
    return int(order.counts[:shard].sum()) + number


@pytest.mark.parametrize("seed", range(6))
def test_every_epoch_is_a_permutation(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, rng.integers(1, 12)).tolist()
    counts[0] += 1
    lanes = int(rng.choice([1, 2, 8, 16]))
    window = int(rng.integers(1, 20))
    order = Order(counts, seed, lanes, window)
    for epoch in range(4):
        shown = [flat(order, epoch * order.n + p) for p in range(order.n)]
        assert sorted(shown) == list(range(order.n))


def test_lanes_are_equal_to_within_one():
    order = Order([1, 50, 3, 7], 0, lanes=8)
    for epoch in range(5):
        sizes = np.diff(order._make_layout(epoch).lane_starts)
        assert sizes.sum() == order.n
        assert sizes.max() - sizes.min() <= 1


def test_order_is_a_function_of_seed_and_epoch():
    def epoch(seed, e):
        order = Order([20] * 5, seed, lanes=4)
        return [order.locate(e * 100 + p) for p in range(100)]

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)


def test_order_does_not_depend_on_access_order():
    backwards, forwards = Order([13, 4, 9], 3, 4, 5), Order([13, 4, 9], 3, 4, 5)
    asked = [forwards.locate(g) for g in range(100)]
    assert [backwards.locate(g) for g in reversed(range(100))] == asked[::-1]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_processes_share_the_same_global_batches(world):
    whole = list(positions_per_step(3, 7, 16, 8, 0, 1))
    parts = [list(positions_per_step(3, 7, 16, 8, r, world)) for r in range(world)]
    for step, one in enumerate(whole):
        together = [g for r in range(world) for g in parts[r][step]]
        assert sorted(together) == one
        assert len({len(parts[r][step]) for r in range(world)}) == 1


def test_a_process_reads_few_shards_at_a_time():
    order = Order([100] * 80, 0, lanes=8, window=200)
    mine = [
        g for step in positions_per_step(0, 100, 8, 8, rank=0, world=8) for g in step
    ]  # one lane: 100 samples, of 1000
    assert len({order.locate(g)[0] for g in mine}) <= 4


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
    check_split(48, 8, 2, repeat=3)
    with pytest.raises(UserError, match=r"run\.batch 16 is not a multiple of run\.lanes 8 x data\.repeat 3"):
        check_split(16, 8, 2, repeat=3)


# --- mixtures ---

WEIGHTS = [[0.335, 0.1, 0.565], [1, 1, 1], [7, 5, 3, 2], [0.9, 0.05, 0.03, 0.02], [1, 2], [3.5]]


def mixture(weights: list[float], lanes: int = 8, seed: int = 0) -> Mixture:
    """Corpora of 6, 12, 18, ... shards; shard numbers tell the corpora apart."""
    sizes = [np.full(6 * (i + 1), 3 + i) for i in range(len(weights))]
    order = make_order(sizes, weights, seed, lanes, window=10)
    assert isinstance(order, Mixture)
    return order


def corpora(order: Mixture, positions: range) -> np.ndarray:
    return np.array([order.corpus_position(g)[0] for g in positions])


def deviation(shown: np.ndarray, weights: list[float]) -> float:
    """The largest difference, in samples, between what a prefix shows of a corpus and that corpus's share of
    it."""
    count = (shown[:, None] == np.arange(len(weights))).cumsum(0)
    return float(abs(count - np.arange(1, len(shown) + 1)[:, None] * np.array(weights) / sum(weights)).max())


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_every_prefix_of_a_mixture_holds_the_shares(weights, lanes):
    assert deviation(interleave(weights), weights) < 1
    shown = corpora(mixture(weights, lanes), range(lanes * 110 if lanes > 1 else 500))
    assert deviation(shown, weights) < max(1, lanes / 2)
    for lane in range(lanes):
        assert deviation(shown[lane::lanes], weights) < (2 if lane else 1)


def test_every_batch_of_a_mixture_is_mixed():
    steps = corpora(mixture([0.335, 0.1, 0.565], lanes=64), range(64 * 200)).reshape(200, 64)
    shares = np.stack([(steps == c).mean(1) for c in range(3)], 1)
    assert abs(shares - [0.335, 0.1, 0.565]).max() < 0.1  # drawn at random: 0.2


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_corpus_of_a_mixture_has_epochs_of_its_own(weights):
    order = mixture(weights)
    shown: list[list[tuple[int, int]]] = [[] for _ in weights]
    for g in range(8 * 400):
        corpus, own = order.corpus_position(g)
        assert order.orders[corpus].locate(own) == (
            order.locate(g)[0] - order.first_shards[corpus],
            order.locate(g)[1],
        )
        shown[corpus].append((own, g))
    for each in shown:
        owns = sorted(own for own, _ in each)
        whole = min(max(o for o in owns if o % 8 == lane) for lane in range(8))
        assert [o for o in owns if o <= whole] == list(range(whole + 1))  # none left out, none twice
        lanes = {own % 8 == g % 8 for own, g in each}
        assert lanes == {True}  # so a process touches the shards of its own lanes only


def test_a_mixture_is_a_function_of_the_position():
    order = mixture([0.5, 0.3, 0.2])
    again = pickle.loads(pickle.dumps(mixture([0.5, 0.3, 0.2])))
    assert [order.locate(g) for g in range(400)] == [again.locate(g) for g in reversed(range(400))][::-1]
    for g in range(200):  # what replaces a sample is of its corpus
        first = order.locate(g)
        second = order.replacement(g, 1)
        assert second == again.replacement(g, 1)
        assert (
            len({int(np.searchsorted(order.first_shards, s, side="right")) for s, _ in (first, second)}) == 1
        )


def test_equal_corpora_are_not_shuffled_alike():
    order = make_order([np.full(20, 5)] * 2, [1, 1], 0, 4, 50)
    own = [[], []]
    for g in range(200):
        shard, number = order.locate(g)
        own[shard // 20].append((shard % 20, number))
    assert len(own[0]) == len(own[1]) and own[0] != own[1]


def test_without_weights_it_is_one_corpus():
    sizes = [np.array([3, 4]), np.array([5])]
    plain = Order([3, 4, 5], 7, 4, 10)
    joined = make_order(sizes, None, 7, 4, 10)
    assert [plain.locate(g) for g in range(50)] == [joined.locate(g) for g in range(50)]


def test_wrong_weights():
    sizes = [np.array([3]), np.array([4])]
    with pytest.raises(UserError, match=r"data\.weights has 3 entries, data\.train has 2"):
        make_order(sizes, [1, 2, 3], 0, 4, 10)
    with pytest.raises(UserError, match="fewer digits"):
        make_order(sizes, [0.123456789, 1], 0, 4, 10)
    with pytest.raises(UserError, match=r"data\.train\[1\]: the index lists no samples"):
        make_order([sizes[0], np.array([0])], [1, 2], 0, 4, 10)


# --- at scale (no bytes are read); tools/bench_order.py does the same with 10^8 samples ---


def test_simulation_of_many_processes():
    counts = np.random.default_rng(0).integers(50, 151, 400)
    order = Order(counts, 0, lanes=1024, window=128)
    assert covers_epoch(order, epoch=0) and covers_epoch(order, epoch=3)
    want = [sorted(order.locate(g) for g in range(2048 * s, 2048 * (s + 1))) for s in range(2)]
    for world in (1, 8, 64, 1024):
        own = [
            Order(counts, 0, lanes=1024, window=128) for _ in range(min(world, 2))
        ]  # processes share nothing
        for step in range(2):
            mine = [next(positions_per_step(step, step + 1, 2048, 1024, r, world)) for r in range(world)]
            parts = [own[r % len(own)].locate(g) for r in range(world) for g in mine[r]]
            assert sorted(parts) == want[step]


def test_batches_are_as_mixed_as_a_perfect_shuffle():
    order = Order([1000] * 500, 0, lanes=64, window=4000)
    found = neighbours(order, batch=64, steps=300)
    assert abs(found["batch, distance"] - 1 / 3) < 0.01  # of all shards; 1/3 in a perfect shuffle
    assert found["batch, same shard"] < 3 / 500  # 1/500
    assert 0.1 < found["lane, same shard"] < 0.35  # within a lane: of the four or five shards of a window


def test_memory_of_many_lanes():
    before = resident_mb()
    order = Order(np.full(100_000, 1000), 0, lanes=1024)
    for g in range(1024 * 3):
        order.locate(g)
    assert resident_mb() - before < 60


def test_batch_and_lanes_of_an_extra_stream():
    with pytest.raises(UserError, match=r"data\.extra_streams\[0\]\.clips 4 is not"):
        check_split(4, 8, 1, "data.extra_streams[0].clips")
    with pytest.raises(UserError, match=r"run\.batch 0 is not"):
        check_split(0, 8, 1)

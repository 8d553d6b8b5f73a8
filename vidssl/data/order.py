"""The order of training samples: arithmetic without state.

The training stream is the positions 0, 1, 2, ...; step s with global batch B takes positions [s*B, (s+1)*B).
Position g belongs to epoch g // N, whose N positions contain each of the N samples once; a batch may span two
epochs, so no sample is dropped.

Lanes. The stream is divided into L lanes (run.lanes): position g belongs to lane g mod L, and process r of W
reads the lanes l with l mod W == r. In each epoch the shards are shuffled and concatenated; each lane is a
contiguous run of that sequence (lanes are equal to within one sample, however few or uneven the shards) and
is shuffled within windows, so a lane reads few shards at a time. The sample at a position is therefore a
function of the shard sizes, the seed, the position and the two constants L and window; the numbers of
processes and workers do not enter.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from vidssl.core.errors import UserError
from vidssl.core.suggestions import multiples_near


class EpochLayout(NamedTuple):
    """The shuffled shards of an epoch, concatenated, and the lanes as runs of that sequence of samples."""

    shards: np.ndarray  # i64 [S]  shard numbers in shuffled order
    shard_ends: np.ndarray  # i64 [S]  end of each of these shards in the sequence
    first_positions: np.ndarray  # i64 [L]  each lane's first position within the epoch
    lane_starts: np.ndarray  # i64 [L+1]  start of each lane in the sequence


class SampleOrder(Protocol):
    """The sample at each position of a stream, as (shard, number within the shard)."""

    seed: int
    lanes: int

    def locate(self, position: int) -> tuple[int, int]: ...

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """Returns the sample that replaces an undecodable one, a function of position and attempt."""
        ...


class Order:
    """The order of one corpus, or of several that are shown in proportion to their sizes."""

    def __init__(
        self,
        counts: list[int] | np.ndarray,
        seed: int,
        lanes: int = 8,
        window: int = 4096,
        corpus_id: int = 0,
    ):
        """counts: samples in each shard; lanes: a multiple of every number of processes; window: samples that
        are shuffled among themselves. corpus_id: gives identical corpora different shuffles.
        """
        self.counts = np.asarray(counts, np.int64)
        self.n = int(self.counts.sum())
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self.corpus_id = corpus_id
        self._layout = lru_cache(maxsize=2)(self._make_layout)
        self._window_shuffle = lru_cache(maxsize=lanes + 8)(self._permute_window)  # all lanes of a process

    def __reduce__(self) -> tuple[type["Order"], tuple]:  # each worker has caches of its own
        return Order, (self.counts, self.seed, self.lanes, self.window, self.corpus_id)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key, *([self.corpus_id] if self.corpus_id else [])))

    def _make_layout(self, epoch: int) -> EpochLayout:
        shards = self._rng(0, epoch).permutation(len(self.counts))
        first = (np.arange(self.lanes) - epoch * self.n) % self.lanes
        sizes = (self.n - first + self.lanes - 1) // self.lanes
        return EpochLayout(shards, self.counts[shards].cumsum(), first, np.concatenate([[0], sizes.cumsum()]))

    def _permute_window(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        shuffled = self._rng(1, epoch, lane, window).permutation(size)
        return shuffled.astype(np.uint16 if size <= 1 << 16 else np.uint32)  # compact: one for each lane

    def locate(self, position: int) -> tuple[int, int]:
        """Returns (shard, number within the shard) of the sample at `position`."""
        epoch, in_epoch = divmod(position, self.n)
        lane = position % self.lanes
        layout = self._layout(epoch)
        in_lane = (in_epoch - int(layout.first_positions[lane])) // self.lanes
        lane_start = int(layout.lane_starts[lane])
        lane_size = int(layout.lane_starts[lane + 1]) - lane_start
        window, in_window = divmod(in_lane, self.window)
        window_start = window * self.window
        shuffled = self._window_shuffle(epoch, lane, window, min(self.window, lane_size - window_start))
        return self._split_index(layout, lane_start + window_start + int(shuffled[in_window]))

    @staticmethod
    def _split_index(layout: EpochLayout, index: int) -> tuple[int, int]:
        """Index in the sequence of an epoch's samples -> (shard, number within the shard)."""
        i = int(np.searchsorted(layout.shard_ends, index, side="right"))
        return int(layout.shards[i]), index - (int(layout.shard_ends[i - 1]) if i else 0)

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """Returns any sample of the corpus, drawn by (seed, position, attempt)."""
        index = int(self._rng(2, position, attempt).integers(self.n))
        return self._split_index(self._layout(position // self.n), index)


MAX_PERIOD = 100_000  # samples; the longest period of a mixture's pattern


def interleave(weights: list[float]) -> np.ndarray:
    """Returns i64 [P], the corpus of each sample of a period; P is the common denominator of the shares.

    The i-th sample of a corpus with share w (of 1) is released at i / w and due by (i + 1) / w, and the
    earliest deadline comes first. Every prefix of n samples then holds n * w samples of each corpus to within
    one. Source: the pfair schedules of Baruah et al., "Proportionate progress" (1996), for one processor.
    """
    exact = [Fraction(str(w)) for w in weights]
    shares = [w / sum(exact) for w in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > MAX_PERIOD:
        raise UserError(
            f"data.weights {weights}: give fewer digits, "
            f"so that their common denominator is at most {MAX_PERIOD}"
        )
    counts = [int(share * period) for share in shares]  # samples of each corpus in a period
    taken = [0] * len(counts)
    pattern = np.empty(period, np.int64)
    for t in range(period):
        deadlines = [
            (-(-(n + 1) * period // count), corpus)
            for corpus, (n, count) in enumerate(zip(taken, counts, strict=True))
            if n * period // count <= t
        ]
        corpus = min(deadlines)[1]
        pattern[t] = corpus
        taken[corpus] += 1
    return pattern


class Mixture:
    """Several corpora in one stream with given shares, interleaved within each lane. Each has its own epochs.

    The k-th sample of a lane belongs to the corpus at index k of the lane's pattern; the n-th sample of that
    corpus in the lane is the n-th of the same lane in the corpus's own Order. All lanes use one pattern, from
    starts that are evenly spaced over it, so that every batch is mixed. A prefix of a lane therefore holds
    each share to within two samples, and a prefix of the stream to within one per lane (far closer, as the
    deviations of the lanes cancel).
    """

    def __init__(self, orders: list[Order], weights: list[float], first_shards: list[int]):
        """first_shards: number of each corpus's first shard among all shards."""
        self.orders = orders
        self.first_shards = first_shards
        self.weights = weights
        self.seed = orders[0].seed
        self.lanes = orders[0].lanes
        self.pattern = interleave(weights)
        is_corpus = self.pattern[:, None] == np.arange(len(orders))
        # i64 [P+1, m]: samples of each corpus in each prefix of the pattern
        self.prefix_counts = np.concatenate([np.zeros((1, len(orders)), np.int64), is_corpus.cumsum(0)])
        self.pattern_starts = np.arange(self.lanes) * len(self.pattern) // self.lanes  # i64 [L]

    def corpus_position(self, position: int) -> tuple[int, int]:
        """Returns (corpus, position in the corpus's own stream)."""
        k, lane = divmod(position, self.lanes)
        start = int(self.pattern_starts[lane])
        periods, index = divmod(start + k, len(self.pattern))
        corpus = int(self.pattern[index])
        counts = self.prefix_counts[:, corpus]
        in_lane = int(periods * counts[-1] + counts[index] - counts[start])
        return corpus, in_lane * self.lanes + lane

    def locate(self, position: int) -> tuple[int, int]:
        """Returns (shard, number within the shard) of the sample at `position`."""
        corpus, p = self.corpus_position(position)
        shard, number = self.orders[corpus].locate(p)
        return self.first_shards[corpus] + shard, number

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """Returns a sample of the same corpus, so that the shares hold."""
        corpus, p = self.corpus_position(position)
        shard, number = self.orders[corpus].replacement(p, attempt)
        return self.first_shards[corpus] + shard, number


def make_order(
    sizes: list[np.ndarray],
    weights: list[float] | None,
    seed: int,
    lanes: int,
    window: int,
    stream_id: int = 0,
) -> Order | Mixture:
    """sizes: samples in each shard of each corpus; stream_id: number of the stream, if a run has several.

    Without weights the corpora are one: each is shown in proportion to its size.
    """
    if weights is None:
        return Order(np.concatenate(sizes), seed, lanes, window, stream_id << 8)
    if len(weights) != len(sizes):
        raise UserError(f"data.weights has {len(weights)} entries, data.train has {len(sizes)}")
    orders = [Order(n, seed, lanes, window, (stream_id << 8) + 1 + i) for i, n in enumerate(sizes)]
    if empty := [i for i, order in enumerate(orders) if not order.n]:
        raise UserError(f"data.train[{empty[0]}]: the index lists no samples, so it cannot have a weight")
    first_shards = np.cumsum([0, *map(len, sizes)])[:-1].tolist()
    return Mixture(orders, weights, first_shards)


def positions_per_step(
    start: int, stop: int, batch: int, lanes: int, rank: int, world: int
) -> Iterator[list[int]]:
    """Yields the positions of process `rank` of `world`, one list for each of the steps start..stop-1."""
    offsets = [j for j in range(batch) if j % lanes % world == rank]
    for step in range(start, stop):
        yield [step * batch + j for j in offsets]


def check_split(batch: int, lanes: int, world: int, what: str = "run.batch", repeat: int = 1) -> None:
    """Raises UserError unless lanes * repeat divides the global batch, and `world` the lanes."""
    if batch % (lanes * repeat) or batch < 1:
        times = f" x data.repeat {repeat}" if repeat > 1 else ""
        near = multiples_near(batch, lanes * repeat)
        raise UserError(f"{what} {batch} is not a multiple of run.lanes {lanes}{times}: give {near}")
    if lanes % world:
        raise UserError(
            f"run.lanes {lanes} is not a multiple of the {world} processes: choose a common multiple"
        )

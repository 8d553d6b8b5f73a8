"""Who sees which sample at which step: arithmetic, no state.

The training stream is the positions g = 0, 1, 2, ...; step s of global batch B shows positions [s*B, (s+1)*B). Position
g is in epoch g // N, whose N positions show each of the N samples once, so what does not fill an epoch's last batch
opens the next epoch and nothing is dropped. Position g belongs to lane g mod L; process r of W owns the lanes l with
l mod W == r. Within an epoch the shards are shuffled and laid in one line; a lane is a contiguous run of that line
(lanes are equal to within one sample, however few or uneven the shards) and is shuffled within windows, so a lane
touches few shards at a time. The sample at g is a function of (shard sizes, seed, g) and the two constants L and
window; the number of processes and workers does not enter.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from vidssl.core.errors import UserError


class Epoch(NamedTuple):
    shards: np.ndarray  # i64 [S]  shard numbers in the order of the line
    ends: np.ndarray  # i64 [S]    where each ends on the line
    first: np.ndarray  # i64 [L]   each lane's first position p within the epoch
    starts: np.ndarray  # i64 [L+1] where each lane starts on the line


class Stream(Protocol):
    """What the loader asks: which sample stands at a position of a stream."""

    seed: int
    lanes: int

    def at(self, g: int) -> tuple[int, int]: ...

    def replacement(self, g: int, attempt: int) -> tuple[int, int]: ...


class Order:
    """The order of a set of shards for training."""

    def __init__(
        self, counts: list[int] | np.ndarray, seed: int, lanes: int = 8, window: int = 4096, number: int = 0
    ):
        """counts: samples in each shard; lanes L: a multiple of every number of processes; window: in samples.

        number: tells corpora of one run apart, so that equal ones are not shuffled alike.
        """
        self.counts = np.asarray(counts, np.int64)
        self.n, self.seed, self.lanes, self.window, self.number = (
            int(self.counts.sum()),
            seed,
            lanes,
            window,
            number,
        )
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        self._shuffle = lru_cache(maxsize=lanes + 8)(
            self._permute
        )  # a process asks for the lanes that it owns

    def __reduce__(self) -> tuple[type["Order"], tuple]:  # workers keep caches of their own
        return Order, (self.counts, self.seed, self.lanes, self.window, self.number)

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *what, *([self.number] if self.number else [])))

    def _lay_out(self, epoch: int) -> Epoch:
        shards = self._rng(0, epoch).permutation(len(self.counts))
        lane = np.arange(self.lanes)
        first = (lane - epoch * self.n) % self.lanes
        sizes = (self.n - first + self.lanes - 1) // self.lanes
        return Epoch(shards, self.counts[shards].cumsum(), first, np.concatenate([[0], sizes.cumsum()]))

    def _permute(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        shuffled = self._rng(1, epoch, lane, window).permutation(size)
        return shuffled.astype(np.uint16 if size <= 1 << 16 else np.uint32)  # of many lanes, so kept small

    def at(self, g: int) -> tuple[int, int]:
        """Position g -> (shard, number within the shard)."""
        epoch, p = divmod(g, self.n)
        lane = g % self.lanes
        e = self._epoch(epoch)
        q = (p - int(e.first[lane])) // self.lanes  # this is the lane's q-th sample in the epoch
        size = int(e.starts[lane + 1] - e.starts[lane])
        window, inside = divmod(q, self.window)
        begin = window * self.window
        shuffled = self._shuffle(epoch, lane, window, min(self.window, size - begin))
        return self._on_line(e, int(e.starts[lane]) + begin + int(shuffled[inside]))

    @staticmethod
    def _on_line(e: Epoch, x: int) -> tuple[int, int]:
        i = int(np.searchsorted(e.ends, x, side="right"))
        return int(e.shards[i]), x - (int(e.ends[i - 1]) if i else 0)

    def replacement(self, g: int, attempt: int) -> tuple[int, int]:
        """What is shown at g when its own sample cannot be decoded: a function of g, too."""
        return self._on_line(self._epoch(g // self.n), int(self._rng(2, g, attempt).integers(self.n)))


MOST_PERIOD = 100_000  # samples after which the pattern of a mixture may repeat


def interleave(weights: list[float]) -> np.ndarray:
    """Shares of m corpora -> i64 [P]: which corpus each sample of a period P is from, P the shares' denominator.

    The i-th sample of a corpus of share w (of 1) is released at i / w and due by (i + 1) / w, and what is due first is
    shown first: so every prefix holds prefix * w samples of each corpus to within one. Source: the pfair schedules of
    Baruah et al., "Proportionate progress" (1996), for one processor.
    """
    parts = [Fraction(str(w)) for w in weights]
    shares = [part / sum(parts) for part in parts]
    period = math.lcm(*(share.denominator for share in shares))
    if period > MOST_PERIOD:
        raise UserError(
            f"data.weights {weights}: give fewer digits, such that they share a denominator of {MOST_PERIOD}"
        )
    counts = [int(share * period) for share in shares]
    shown, pattern = [0] * len(counts), np.empty(period, np.int64)
    for t in range(period):
        due = [
            (-(-(n + 1) * period // a), c)
            for c, (n, a) in enumerate(zip(shown, counts, strict=True))
            if n * period // a <= t
        ]
        pattern[t] = corpus = min(due)[1]
        shown[corpus] += 1
    return pattern


class Mixture:
    """Several corpora in one stream, each with epochs of its own: within a lane they are interleaved by arithmetic.

    The k-th sample of a lane is of the corpus that stands at k in the lane's pattern; the n-th sample of that corpus in
    the lane is the n-th that the lane of the corpus's own Order shows. All lanes use one pattern, from starts that are
    evenly spread over it, so that every batch is mixed; by that a lane's prefix holds each share to within two samples,
    and the stream's to within one a lane (far closer, as the lanes' deviations cancel).
    """

    def __init__(self, orders: list[Order], weights: list[float], firsts: list[int]):
        """firsts: number of each corpus's first shard among the shards of all."""
        self.orders, self.firsts, self.weights = orders, firsts, weights
        self.seed, self.lanes = orders[0].seed, orders[0].lanes
        self.pattern = interleave(weights)
        hits = self.pattern[:, None] == np.arange(len(orders))
        self.before = np.concatenate([np.zeros((1, len(orders)), np.int64), hits.cumsum(0)])  # i64 [P+1, m]
        self.starts = np.arange(self.lanes) * len(self.pattern) // self.lanes  # i64 [L]

    def _own(self, g: int) -> tuple[int, int]:
        """Position g -> (corpus, position in the corpus's own stream)."""
        k, lane = divmod(g, self.lanes)
        start = int(self.starts[lane])
        rounds, at = divmod(start + k, len(self.pattern))
        corpus = int(self.pattern[at])
        shown = self.before[:, corpus]
        return corpus, int(rounds * shown[-1] + shown[at] - shown[start]) * self.lanes + lane

    def at(self, g: int) -> tuple[int, int]:
        """Position g -> (shard, number within the shard)."""
        corpus, own = self._own(g)
        shard, number = self.orders[corpus].at(own)
        return self.firsts[corpus] + shard, number

    def replacement(self, g: int, attempt: int) -> tuple[int, int]:
        """From the same corpus, so that the shares hold."""
        corpus, own = self._own(g)
        shard, number = self.orders[corpus].replacement(own, attempt)
        return self.firsts[corpus] + shard, number


def make_order(
    sizes: list[np.ndarray], weights: list[float] | None, seed: int, lanes: int, window: int, number: int = 0
) -> Order | Mixture:
    """sizes: samples in each shard of each corpus. Without weights they are one corpus, each shown by its size.

    number: of the stream, where a run has several.
    """
    if weights is None:
        return Order(np.concatenate(sizes), seed, lanes, window, number << 8)
    if len(weights) != len(sizes):
        raise UserError(f"data.weights: {len(weights)} of them, but data.train names {len(sizes)} corpora")
    orders = [Order(n, seed, lanes, window, (number << 8) + 1 + i) for i, n in enumerate(sizes)]
    if empty := [i for i, order in enumerate(orders) if not order.n]:
        raise UserError(f"data.train[{empty[0]}]: the index lists no samples, so it cannot have a weight")
    firsts = np.cumsum([0, *map(len, sizes)])[:-1].tolist()
    return Mixture(orders, weights, firsts)


def batches(start: int, stop: int, batch: int, lanes: int, rank: int, world: int) -> Iterator[list[int]]:
    """Positions of process `rank` of `world` at steps start..stop-1, a list a step."""
    mine = [j for j in range(batch) if j % lanes % world == rank]
    for step in range(start, stop):
        yield [step * batch + j for j in mine]


def check_split(batch: int, lanes: int, world: int, what: str = "run.batch", repeat: int = 1) -> None:
    """The global batch is a multiple of the lanes (times the clips of a video), the lanes of the processes."""
    if batch % (lanes * repeat) or batch < 1:
        times = f" x data.repeat {repeat}" if repeat > 1 else ""
        raise UserError(f"{what} {batch} is not a multiple of run.lanes {lanes}{times}")
    if lanes % world:
        raise UserError(
            f"run.lanes {lanes} is not a multiple of the {world} processes: choose a common multiple"
        )

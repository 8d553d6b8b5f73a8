"""Who sees which sample at which step: arithmetic, no state.

The training stream is the positions g = 0, 1, 2, ...; step s of global batch B shows positions [s*B, (s+1)*B). Position
g is in epoch g // N, whose N positions show each of the N samples once, so what does not fill an epoch's last batch
opens the next epoch and nothing is dropped. Position g belongs to lane g mod L; process r of W owns the lanes l with
l mod W == r. Within an epoch the shards are shuffled and laid in one line; a lane is a contiguous run of that line
(lanes are equal to within one sample, however few or uneven the shards) and is shuffled within windows, so a lane
touches few shards at a time. The sample at g is a function of (shard sizes, seed, g) and the two constants L and
window; the number of processes and workers does not enter.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vidssl.errors import UserError


class Epoch(NamedTuple):
    shards: np.ndarray  # i64 [S]  shard numbers in the order of the line
    ends: np.ndarray  # i64 [S]    where each ends on the line
    first: np.ndarray  # i64 [L]   each lane's first position p within the epoch
    starts: np.ndarray  # i64 [L+1] where each lane starts on the line


class Order:
    """The order of a set of shards for training."""

    def __init__(self, counts: list[int], seed: int, lanes: int = 8, window: int = 4096):
        """counts: samples in each shard; lanes L: a multiple of every number of processes; window: in samples."""
        self.counts = np.asarray(counts, np.int64)
        self.n, self.seed, self.lanes, self.window = int(self.counts.sum()), seed, lanes, window
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        self._shuffle = lru_cache(maxsize=2 * lanes)(self._permute)

    def __reduce__(self) -> tuple[type["Order"], tuple[list[int], int, int, int]]:  # workers keep caches of their own
        return Order, (self.counts.tolist(), self.seed, self.lanes, self.window)

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *what))

    def _lay_out(self, epoch: int) -> Epoch:
        shards = self._rng(0, epoch).permutation(len(self.counts))
        lane = np.arange(self.lanes)
        first = (lane - epoch * self.n) % self.lanes
        sizes = (self.n - first + self.lanes - 1) // self.lanes
        return Epoch(shards, self.counts[shards].cumsum(), first, np.concatenate([[0], sizes.cumsum()]))

    def _permute(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        return self._rng(1, epoch, lane, window).permutation(size)

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


def batches(start: int, stop: int, batch: int, lanes: int, rank: int, world: int) -> Iterator[list[int]]:
    """Positions of process `rank` of `world` at steps start..stop-1, a list a step."""
    mine = [j for j in range(batch) if j % lanes % world == rank]
    for step in range(start, stop):
        yield [step * batch + j for j in mine]


def check_split(batch: int, lanes: int, world: int) -> None:
    """The global batch is a multiple of the lanes, the lanes of the processes."""
    if batch % lanes:
        raise UserError(f"run.batch {batch} is not a multiple of run.lanes {lanes}")
    if lanes % world:
        raise UserError(f"run.lanes {lanes} is not a multiple of the {world} processes: choose a common multiple")

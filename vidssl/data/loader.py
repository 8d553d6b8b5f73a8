"""The training loader: position in the stream -> bytes -> frames -> uint8 clip; batches of them, in any worker.

A run may have several streams (clips of different lengths, images), each with an order of its own; a step takes so many
clips of each. Positions of stream i are numbered from i * STREAM, so that one number says all.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vidssl.core.errors import UserError
from vidssl.data.dataset import STREAM_STRIDE, DecodeFailure, Example, Streams, TrainClips
from vidssl.data.isolated_dataset import IsolatedDataset


class Batch(NamedTuple):
    video: Tensor  # u8 [B, 3, T, H, W]
    label: Tensor  # i64 [B]
    position: Tensor  # i64 [B]
    key: list[str]
    bad: list[DecodeFailure]


def collate(items: list[Example]) -> Batch:
    return Batch(
        torch.stack([i.video for i in items]),
        torch.tensor([i.label for i in items]),
        torch.tensor([i.position for i in items]),
        [i.key for i in items],
        [b for i in items for b in i.bad],
    )


class DecodeErrorMonitor:
    """Counts what could not be decoded; stops the run when it is too much."""

    def __init__(self, limit: float):
        self.limit, self.seen, self.reasons, self.last = limit, 0, Counter[str](), ""

    def add(self, positions: list[int], bad: list[tuple[str, str]], failed: bool) -> None:
        self.seen += len(positions)
        self.reasons.update(reason for _, reason in bad)
        self.last = bad[-1][0] if bad else self.last
        share = self.reasons.total() / self.seen
        if failed or (self.seen >= 200 and share > self.limit):
            raise UserError(
                f"{self.reasons.total()} of {self.seen} samples could not be decoded ({dict(self.reasons)}; last "
                f"{self.last}): over data.max_decode_error_rate {self.limit}; python -m data_prep.verify names the files"
            )


def train_steps(
    streams: Streams,
    start: int,
    stop: int,
    sizes: list[int],
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    isolate: bool = False,
) -> Iterator[list[Batch]]:
    """This process's part of steps start..stop-1, a batch of each stream, in order, whatever the number of workers.

    sizes: clips of each stream in a global batch.
    """
    data = streams.clips[0].data
    tally = DecodeErrorMonitor(data.max_decode_error_rate)
    kept = sum(c.cache.left for c in streams.clips)
    isolated = (
        IsolatedDataset(streams, data.decode_timeout_s, data.memory_mb << 20, kept) if isolate else None
    )
    loader: Any = DataLoader(
        isolated or streams,
        batch_sampler=streams.positions(start, stop, sizes, rank, world),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,  # items as they are, so that a position where all failed can be told from the others
        prefetch_factor=4 if workers else None,
    )
    try:
        for items in loader:
            bad = [b for i in items for b in i.bad]
            tally.add([i.position for i in items], bad, failed=any(not i.key for i in items))
            each = range(len(streams.clips))
            yield [collate([i for i in items if i.position // STREAM_STRIDE == number]) for number in each]
    finally:
        if isolated:
            isolated.close()


def train_batches(
    clips: TrainClips,
    start: int,
    stop: int,
    batch: int,
    rank: int,
    world: int,
    workers: int,
    isolate: bool = False,
) -> Iterator[Batch]:
    """`train_steps` of a run with one stream."""
    for (one,) in train_steps(Streams([clips]), start, stop, [batch], rank, world, workers, isolate):
        yield one

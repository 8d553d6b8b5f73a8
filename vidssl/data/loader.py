"""The training loader: batches of each stream of a run, step by step, for any number of processes.

A run may have several streams (clips of different lengths, images), each with an order of its own. A step
takes a fixed number of clips from each.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from vidssl.core.errors import Preempted, UserError
from vidssl.core.log import logger
from vidssl.data.dataset import (
    EXHAUSTED,
    STREAM_STRIDE,
    DecodeFailure,
    Example,
    MultiStreamDataset,
    TrainClips,
)
from vidssl.data.device_augment import ClipPlanes, PlaneBatch, collate_planes
from vidssl.data.device_cache import CachedClip, CachedClips, collate_cached
from vidssl.data.isolated_dataset import IsolatedDataset
from vidssl.data.order import make_order
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards
from vidssl.data.stream import ClipDecoder, ShardUrls, StreamingDataset, StreamSettings

PREFETCHED = 16  # batches that the loader workers together make ahead, each of them 2 to 4
MIN_SAMPLES_FOR_RATE = 200  # samples read before the rate of failures is judged


class Batch(NamedTuple):
    """Clips of one stream."""

    # u8 [B, 3, T, H, W], or what becomes it by `to(device)`: a PlaneBatch or CachedClips
    video: Any
    label: Tensor  # i64 [B]
    position: Tensor  # i64 [B]
    key: list[str]
    failures: list[DecodeFailure]  # samples that could not be decoded and were replaced
    motion: Tensor | None = None  # f16 [B, 2, T, h, w], stays on the host; with data.motion_vectors


class CollatedBatch(NamedTuple):
    """A Batch on its way from a loader worker: `video` and `motion` have the only tensors, since each tensor
    that crosses holds a file descriptor open until the batch is used."""

    video: Tensor | PlaneBatch | CachedClips  # u8 [B, 3, T, H, W], in shared memory if a worker made it
    labels: list[int]
    positions: list[int]
    keys: list[str]
    failures: list[DecodeFailure]
    motion: Tensor | None = None

    def to_batch(self) -> Batch:
        label, position = torch.tensor(self.labels), torch.tensor(self.positions)
        return Batch(self.video, label, position, self.keys, self.failures, self.motion)


class CollatedStep(NamedTuple):
    """The clips of a step, collated where they are decoded."""

    batches: list[CollatedBatch]  # one of each stream; none after an exhausted position
    exhausted: Example | None  # an example whose attempts all failed


def collate_step(examples: list[Example], streams: int) -> CollatedStep:
    """Stacks the clips of each of the streams, in the order of the examples."""
    exhausted = next((e for e in examples if e.key == EXHAUSTED), None)
    if exhausted:  # it has no video
        return CollatedStep([], exhausted)
    groups = [[e for e in examples if e.position // STREAM_STRIDE == i] for i in range(streams)]
    return CollatedStep([collate(group) for group in groups], None)


def collate(examples: list[Example]) -> CollatedBatch:
    """Stacks clips; in a loader worker directly into the shared memory that the training process reads."""
    return CollatedBatch(
        collate_clips([e.video for e in examples]),
        [e.label for e in examples],
        [e.position for e in examples],
        [e.key for e in examples],
        [failure for e in examples for failure in e.failures],
        None if examples[0].motion is None else default_collate([e.motion for e in examples]),
    )


def collate_clips(clips: list[Any]) -> Tensor | PlaneBatch | CachedClips:
    if isinstance(clips[0], CachedClip):
        return collate_cached(clips)
    return collate_planes(clips) if isinstance(clips[0], ClipPlanes) else default_collate(clips)


class DecodeErrorMonitor:
    """Counts decode failures by reason; raises UserError if their rate exceeds `limit`, or at an exhausted
    position."""

    def __init__(self, limit: float):
        self.limit = limit
        self.samples = 0
        self.reasons = Counter[str]()
        self.last_key = ""

    def add(self, samples: int, failures: list[DecodeFailure], exhausted: Example | None = None) -> None:
        """samples: number of clips read; exhausted: an example whose attempts all failed."""
        if exhausted:
            last = exhausted.failures[-1]
            raise UserError(
                f"{len(exhausted.failures)} samples in a row failed at position {exhausted.position}; "
                f"last reason '{last.reason}' ({last.key}); vidssl verify names the files"
            )
        self.samples += samples
        self.reasons.update(failure.reason for failure in failures)
        self.last_key = failures[-1].key if failures else self.last_key
        rate = self.reasons.total() / self.samples
        if self.samples >= MIN_SAMPLES_FOR_RATE and rate > self.limit:
            raise UserError(
                f"{self.reasons.total()} of {self.samples} samples could not be decoded "
                f"({dict(self.reasons)}; last {self.last_key}): "
                f"over data.max_decode_error_rate {self.limit}; "
                "vidssl verify names the files"
            )


def open_shards(data: DataConfig) -> tuple[list[Shards] | ShardUrls, str]:
    """Returns the shards of each stream (with data.reader=stream: the tar URLs), and a hash of the data."""
    if data.reader == "stream":
        urls = ShardUrls(data)
        return urls, urls.hash
    shards = [Shards(d.train, d.cache_dir, d.cache_gb, d.on_missing) for d in data.streams()]
    hashes = [s.hash for s in shards]
    return shards, hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def make_streams(
    data: DataConfig,
    shards: list[Shards] | ShardUrls,
    augment: Callable,
    seed: int,
    lanes: int,
    window: int,
) -> MultiStreamDataset | StreamingDataset:
    """shards: from `open_shards`; lanes, window: see `Order`."""
    if isinstance(shards, ShardUrls):
        return StreamingDataset(shards, ClipDecoder(data, augment, seed), lanes)
    streams = []
    for i, (d, s) in enumerate(zip(data.streams(), shards, strict=True)):
        sizes = [s.counts[s.folder_of == f] for f in range(len(s.folders))]
        order = make_order(sizes, list(d.weights) if d.weights else None, seed, lanes, window, i)
        streams.append(TrainClips(s, order, d, augment, i))
    return MultiStreamDataset(streams)


def train_steps(
    streams: MultiStreamDataset | StreamingDataset,
    start: int,
    stop: int,
    sizes: list[int],
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    isolate: bool = False,
    patience_s: float = 0,
    pin_memory: bool = False,
) -> Generator[list[Batch], None, None]:
    """Yields a batch of each stream for steps start..stop-1: the clips of process `rank` of `world`.

    sizes: clips of each stream in a global batch. isolate: decode in a child process. patience_s:
    seconds to wait for a batch of the workers, then Preempted is raised; 0: without end. pin_memory: into
    memory from which a GPU copies by itself. With the indexed reader the batches do not depend on `workers`.
    """
    collate_fn = partial(collate_step, streams=len(sizes))
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
    if workers:
        options |= {"prefetch_factor": min(4, max(2, PREFETCHED // workers)), "timeout": patience_s}
    if isinstance(streams, StreamingDataset):
        data = streams.decoder.data
        settings = StreamSettings(start, stop, sizes[0], rank, world, isolate)
        steps = _load_streamed(streams, settings, collate_fn, options)
    else:
        data = streams.clips[0].data
        positions = streams.positions(start, stop, sizes, rank, world)
        steps = _load_indexed(streams, positions, isolate, collate_fn, options)
    monitor = DecodeErrorMonitor(data.max_decode_error_rate)
    with closing(steps):
        for collated, exhausted in give_up_after(patience_s, steps):
            batches = [batch.to_batch() for batch in collated]
            failures = [failure for batch in batches for failure in batch.failures]
            monitor.add(sum(len(batch.key) for batch in batches), failures, exhausted)
            yield batches


def give_up_after(patience_s: float, steps: Iterator[CollatedStep]) -> Iterator[CollatedStep]:
    """Yields from `steps`; raises Preempted if the DataLoader behind it has given up."""
    try:
        yield from steps
    except RuntimeError as e:
        if patience_s and "DataLoader timed out" in str(e):
            raise Preempted(
                f"error: no batch for {patience_s:g} s: reading or decoding is stuck; a process waits "
                "for data half as long as the others wait for it (efficiency.peer_timeout_s)"
            ) from None
        raise


def _load_indexed(
    streams: MultiStreamDataset,
    positions: Iterator[list[int]],
    isolate: bool,
    collate_fn: Callable[[list[Example]], CollatedStep],
    options: dict[str, Any],
) -> Generator[CollatedStep, None, None]:
    data = streams.clips[0].data
    isolated = None
    if isolate and data.cache == "none":  # cached videos are decoded already
        isolated = IsolatedDataset(streams, data.decode_timeout_s, data.memory_mb << 20)
    try:
        yield from DataLoader(
            isolated or streams,
            batch_sampler=positions,  # type: ignore[arg-type]
            collate_fn=collate_fn,
            **options,
        )
    finally:
        if isolated:
            isolated.close()


def _load_streamed(
    streams: StreamingDataset,
    settings: StreamSettings,
    collate_fn: Callable[[list[Example]], CollatedStep],
    options: dict[str, Any],
) -> Generator[CollatedStep, None, None]:
    streams.settings = settings
    if settings.rank == 0:
        logger.info(streams.describe(options["num_workers"]))
    yield from DataLoader(
        streams,
        batch_size=None,  # the data set yields whole batches
        collate_fn=collate_fn,
        **options,
    )

"""What the data of a run cost: CPU time of a clip, and the size of the corpus."""

import time
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple

from vidssl.core.errors import UserError
from vidssl.data.dataset import MultiStreamDataset
from vidssl.data.loader import make_streams, open_shards
from vidssl.data.planes import place_augmentation
from vidssl.data.shards import Shards
from vidssl.training.schema import TrainConfig

WARM_CLIPS = 4  # that are not timed


class PackedCorpus(NamedTuple):
    """The packed videos of a run."""

    videos: int
    size_bytes: int


def measure_corpus(shards: list[Shards]) -> PackedCorpus:
    """Of the first stream."""
    return PackedCorpus(shards[0].n, int(shards[0].sizes.sum()))


def open_indexed(cfg: TrainConfig) -> list[Shards]:
    """The shards of a run. Raises UserError if they are read without an index."""
    shards, _ = open_shards(cfg.data)
    if not isinstance(shards, list):
        raise UserError("--measure needs data.reader=indexed: run vidssl scan on the shards")
    return shards


def measure_cpu_ms(cfg: TrainConfig, shards: list[Shards], clips: int, on_gpu: bool) -> float:
    """CPU milliseconds of this machine for a clip of the run, the mean of `clips`: reading, decoding, and the
    augmentation that is left to the host."""
    augment = cfg.augment.build()
    data = place_augmentation(replace(cfg.data, cache="none"), augment, on_gpu)
    streams = make_streams(data, shards, augment, cfg.run.seed, cfg.run.lanes, cfg.run.shuffle_window)
    assert isinstance(streams, MultiStreamDataset)
    positions = chain.from_iterable(streams.positions(0, 10**9, cfg.data.clips(cfg.run.batch), 0, 1))
    for position in islice(positions, WARM_CLIPS):
        streams[position]
    begin_s = time.process_time()
    for position in islice(positions, clips):
        streams[position]
    return 1000 * (time.process_time() - begin_s) / clips

"""Training clips of a packed folder, and packed folders with damage, for several test files."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from vidssl.data.augment import RandomCrop
from vidssl.data.cache_fill import cache_videos
from vidssl.data.dataset import MultiStreamDataset, TrainClips
from vidssl.data.loader import Batch, train_steps
from vidssl.data.order import Order
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards


def make_clips(folder: Path | str, seed: int = 3, **data) -> TrainClips:
    shards = Shards([str(folder)])
    config = DataConfig(**{"train": [str(folder)], "frames": 4, "stride": 2, **data})
    clips = TrainClips(shards, Order(shards.counts, seed, lanes=4, window=16), config, RandomCrop(32))
    cache_videos([clips], workers=0, isolate=False, quiet=True)
    return clips


def copy_with_damage(folder: Path, out: Path, damaged: dict[tuple[int, int], float]) -> Path:
    """A copy of a packed folder; of the samples (shard, number) the media bytes are zero from that fraction
    on."""
    shutil.copytree(folder, out)
    shards = Shards([str(out)])
    for place, fraction in damaged.items():
        sample = shards.sample(*place)
        begin = int(shards.sample(*place).size * fraction)
        with open(shards.path(sample.shard), "r+b") as f:
            f.seek(sample.offset + begin)
            f.write(bytes(sample.size - begin))
    return out


def train_batches(
    clips: TrainClips,
    start: int,
    stop: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    isolate: bool = False,
) -> Iterator[Batch]:
    """`train_steps` of a run with one stream."""
    for (one,) in train_steps(
        MultiStreamDataset([clips]), start, stop, [batch], rank, world, workers, isolate
    ):
        yield one

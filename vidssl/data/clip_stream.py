"""Training clips for one's own loop: `vidssl.open_dataset`, with the data path of a training run."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from vidssl.config import Choice, Spec, from_tree, to_tree
from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.data.loader import Batch, make_streams, open_shards, train_steps
from vidssl.data.order import check_split
from vidssl.data.planes import place_augmentation
from vidssl.data.schema import AUGMENT_PARTS, MUTABLE_KEYS, DataConfig

ENDLESS = 1 << 40  # steps
DEFAULT_LANES = 8


@dataclass(frozen=True)
class ClipConfig:
    """The sections of a configuration that describe training clips."""

    data: DataConfig
    augment: Annotated[Spec, Choice(AUGMENT_PARTS)]


class ClipStream:
    """Batches of augmented clips, step by step; this process's part of each.

    Iterating goes on after the last step taken, also of an earlier iteration. `state_dict` is the number of
    steps taken, and what decides the clips: the same ones follow whatever the number of processes and of
    loader workers is then. With reader="stream" a new pass over newly shuffled shards follows."""

    def __init__(
        self, cfg: ClipConfig, batch: int, steps: int | None, seed: int, lanes: int, workers: int, place: Any
    ):
        """batch: clips a step, over all processes; steps: at which it ends; None: never. place: (rank, number
        of processes)."""
        self.rank, self.world = place
        check_split(batch, lanes, self.world, "open_dataset: batch", cfg.data.repeat)
        self.batch = batch
        self.seed = seed
        self.lanes = lanes
        self.config = clip_config(cfg)
        self.workers = workers
        self.stop = ENDLESS if steps is None else steps
        self.step = 0  # steps taken
        augment = cfg.augment.build()
        data = place_augmentation(cfg.data, augment, False)
        shards, self.data_hash = open_shards(data)
        self.samples = sum(part.n for part in shards) if isinstance(shards, list) else None
        self._streams = make_streams(data, shards, augment, seed, lanes, 4096)

    def __len__(self) -> int:
        """Steps that are left."""
        if self.stop == ENDLESS:
            raise TypeError("this stream of clips has no end: give steps=")
        return self.stop - self.step

    def __iter__(self) -> Iterator[Batch]:
        clips = train_steps(
            self._streams, self.step, self.stop, [self.batch], self.rank, self.world, self.workers, True
        )
        for (batch,) in clips:
            # Counted before it is used: what is saved within the loop has this step
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The steps taken and what decides the clips, as plain data that JSON can hold."""
        names = ("step", "batch", "data_hash", "seed", "lanes", "config")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the steps of a saved state. Raises UserError for a state of other data, or of another
        batch, seed, number of lanes or configuration of the clips; what a state of an earlier version does
        not name is not checked."""
        own: dict[str, Any] = {"batch": self.batch, "data_hash": self.data_hash}
        given = {key: state.get(key) for key in own}
        own |= {"seed": self.seed, "lanes": self.lanes, **self.config}
        given |= {key: state[key] for key in ("seed", "lanes") if key in state} | state.get("config", {})
        for key, value in given.items():
            if value != own.get(key):
                raise UserError(f"open_dataset: the state has {key} {value}, this one {own.get(key)}")
        if "seed" not in state:
            logger.warning("open_dataset: the state does not name seed, lanes, data and augment: not checked")
        self.step = int(state["step"])


def clip_config(cfg: ClipConfig) -> dict[str, Any]:
    """Dotted key -> value, of what decides the clips beside data, seed and lanes; plain data."""
    ignored = (*MUTABLE_KEYS, "max_decode_error_rate")
    return {
        f"{section}.{key}": value
        for section, values in to_tree(cfg).items()
        for key, value in values.items()
        if section != "data" or key not in ignored
    }


def this_process() -> tuple[int, int]:
    """(rank, number of processes), of torch.distributed or as launchers tell it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def open_dataset(
    shards: str | Path | Sequence[str | Path],
    *,
    batch: int,
    frames: int = 16,
    size: int = 224,
    stride: int | None = None,
    fps: float | None = None,
    augment: Mapping[str, Any] | None = None,
    steps: int | None = None,
    seed: int = 0,
    lanes: int | None = None,
    workers: int = 2,
    **data: Any,
) -> ClipStream:
    """Opens packed shards as a stream of training clips for one's own loop.

    Iterating yields a batch a step: video u8 [B, 3, T, S, S], label i64 [B] (-1: none), position i64 [B],
    key. A sample that cannot be decoded is replaced and listed in `failures`. Every process gets its part of
    the global batch.

    shards: folders or URLs of packed data. batch: clips a step, over all processes. frames: of a clip, size:
    pixels; stride (frames; default 4) or fps: between its frames. augment: the `augment` section of a
    configuration, without size; default: {"kind": "random_crop"}. steps: at which the stream ends; None:
    never. seed: of order, clips and augmentation. lanes: a multiple of every number of processes that may be
    used, and a divisor of the batch; None: 8, or the largest power of two that divides the batch. workers:
    decoding processes. data: other keys of the `data` section (weights, windows, decoder, ...)."""
    folders = [shards] if isinstance(shards, str | Path) else shards
    if stride is None and fps is None:
        stride = 4
    section = {"train": [str(folder) for folder in folders], "frames": frames, **data}
    section |= {key: value for key, value in (("stride", stride), ("fps", fps)) if value is not None}
    tree = {"data": section, "augment": {"kind": "random_crop", **(augment or {}), "size": size}}
    cfg = from_tree(tree, ClipConfig, "open_dataset")
    if cfg.data.extra_streams:
        raise UserError("open_dataset: data.extra_streams: open a data set for each stream")
    lanes = lanes or math.gcd(batch // cfg.data.repeat, DEFAULT_LANES)
    return ClipStream(cfg, batch, steps, seed, lanes, workers, this_process())

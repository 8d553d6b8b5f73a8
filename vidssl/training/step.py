"""One training step: forward and backward passes over micro-batches and streams."""

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.core.rng import GlobalBatch, KeyedRNG
from vidssl.data.cache import cache_videos
from vidssl.data.dataset import MultiStreamDataset
from vidssl.data.loader import Batch, make_streams, train_steps
from vidssl.data.shards import Shards
from vidssl.data.stream import ShardUrls
from vidssl.objective.masks import Masker, count_cut_groups
from vidssl.training.distributed import Strategy
from vidssl.training.schema import TrainConfig


def load_steps(
    cfg: TrainConfig, shards: list[Shards] | ShardUrls, start: int, strategy: Strategy
) -> Generator[list[Batch], None, None]:
    """This process's batches of steps start..run.steps-1, one of each stream."""
    run, efficiency = cfg.run, cfg.efficiency
    workers, isolate = efficiency.workers, efficiency.decode_in_subprocess
    streams = make_streams(cfg.data, shards, cfg.augment.build(), run.seed, run.lanes, run.shuffle_window)
    if isinstance(streams, MultiStreamDataset):
        cache_videos(streams.clips, workers, isolate, quiet=not strategy.is_main)
    return train_steps(
        streams,
        start,
        run.steps,
        cfg.data.clips(run.batch),
        strategy.rank,
        strategy.world,
        workers,
        isolate,
        strategy.data_patience_s,
    )


def make_cut_groups(cfg: TrainConfig, mask: Masker, world: int) -> Callable[[int], int]:
    """Returns what maps the clips of a global batch to the number of groups that `mask` cuts together.

    Raises UserError if they do not divide the batch, or the processes cannot share them evenly.
    """
    lanes = cfg.run.lanes
    for clips in cfg.data.clips(cfg.run.batch):
        groups = count_cut_groups(mask, clips)
        if groups % world and world % groups:
            shares = [n for n in range(1, lanes + 1) if groups % n == 0 or n % groups == 0]
            works = ", ".join(str(n) for n in shares if lanes % n == 0)
            raise UserError(
                f"method.mask.truncate_over {clips // groups} makes {groups} groups of {clips} clips, which "
                f"{world} processes cannot share: give {works} processes"
            )
    return partial(count_cut_groups, mask)


class MicroBatch(NamedTuple):
    """Clips that one forward pass takes."""

    video: Tensor  # u8 [B, 3, T, S, S]
    position: Tensor  # i64 [B]
    batch: GlobalBatch  # that they are a part of


def split_batch(batch: Batch, micro_batches: int, groups: int, rank: int, world: int) -> list[MicroBatch]:
    """Splits process `rank`'s clips of a stream in `micro_batches` equal parts, and these where they hold
    clips of several of the `groups` of the global batch (KeyedRNG.over_group)."""
    whole = GlobalBatch(int(batch.position.min()) - rank, len(batch.position) * world)
    group = (batch.position - whole.first) % groups
    order = group.argsort(stable=True)
    video = batch.video if groups == 1 else batch.video[order]
    position = batch.position[order]
    chunks = zip(
        video.chunk(micro_batches),
        position.chunk(micro_batches),
        group[order].chunk(micro_batches),
        strict=True,
    )
    parts = []
    for clips, positions, of_group in chunks:
        sizes = of_group.unique_consecutive(return_counts=True)[1].tolist()
        pieces = zip(clips.split(sizes), positions.split(sizes), strict=True)
        parts += [MicroBatch(*piece, whole) for piece in pieces]
    return parts


def forward_backward(
    strategy: Strategy,
    model: nn.Module,
    batches: list[Batch],
    seed: int,
    step: int,
    micro_batches: int,
    cut_groups: Callable[[int], int] = lambda clips: 1,
) -> dict[str, Tensor]:
    """Accumulates the gradients of this process's clips. Returns the loss and its parts, averaged over the
    clips.

    batches: one of each stream, of which each is computed in at least `micro_batches` parts; cut_groups: maps
    the clips of a global batch to the number of its groups (see split_batch). With several streams the loss
    of each is returned, too, as loss_stream_0, loss_stream_1, ...
    """
    parts: list[tuple[int, Tensor, Tensor, GlobalBatch]] = []
    for stream, batch in enumerate(batches):
        groups = cut_groups(len(batch.position) * strategy.world)
        on_device = batch._replace(video=batch.video.to(strategy.device))
        for part in split_batch(on_device, micro_batches, groups, strategy.rank, strategy.world):
            parts.append((stream, part.video, part.position.to(strategy.device), part.batch))
    clips = sum(len(position) for _, _, position, _ in parts)
    total: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for i, (stream, video, position, whole) in enumerate(parts):
        share = len(position) / clips
        is_last = i == len(parts) - 1
        with contextlib.nullcontext() if is_last else strategy.no_sync(model):
            with strategy.autocast():
                losses = model(normalise(video), KeyedRNG(seed, step, position, whole))
            strategy.backward(losses["loss"] * share)
        if len(batches) > 1:
            losses[f"loss_stream_{stream}"] = losses["loss"]
        for name, value in losses.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value.detach() * share
            weights[name] = weights.get(name, 0.0) + share
    if len(batches) > 1:  # a value that only some streams report is a mean over those
        total = {name: value / weights[name] for name, value in total.items()}
    return total

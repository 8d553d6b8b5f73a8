"""One training step: forward and backward passes over micro-batches and streams."""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn

from vidssl.core.pixels import normalise
from vidssl.data.cache_fill import cache_videos
from vidssl.data.dataset import MultiStreamDataset
from vidssl.data.loader import Batch, make_streams, train_steps
from vidssl.data.planes import place_augmentation
from vidssl.data.shards import Shards
from vidssl.data.stream import ShardUrls
from vidssl.training.distributed import Strategy
from vidssl.training.micro_batches import MicroBatch
from vidssl.training.schema import TrainConfig


def load_steps(
    cfg: TrainConfig, shards: list[Shards] | ShardUrls, start: int, strategy: Strategy
) -> Generator[list[Batch], None, None]:
    """This process's batches of steps start..run.steps-1, one of each stream."""
    run, efficiency = cfg.run, cfg.efficiency
    workers, isolate = cfg.num_workers, efficiency.decode_in_subprocess
    augment = cfg.augment.build()
    data = place_augmentation(cfg.data, augment, strategy.device.type == "cuda")
    streams = make_streams(data, shards, augment, run.seed, run.lanes, run.shuffle_window)
    if isinstance(streams, MultiStreamDataset):
        cache_videos(streams.clips, workers, isolate, not strategy.is_main, strategy.device)
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
        pin_memory=strategy.device.type == "cuda",
    )


def forward_backward(strategy: Strategy, model: nn.Module, parts: list[MicroBatch]) -> dict[str, Tensor]:
    """Accumulates the gradients of this process's clips. Returns the loss and its parts, averaged over the
    clips, without waiting for the device.

    With several streams the loss of each is returned, too, as loss_stream_0, loss_stream_1, ...
    """
    clips = sum(len(part.video) for part in parts)
    has_streams = len({part.stream for part in parts}) > 1
    total: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for i, part in enumerate(parts):
        share = len(part.video) / clips
        is_last = i == len(parts) - 1
        with contextlib.nullcontext() if is_last else strategy.no_sync(model):
            with strategy.autocast():
                losses = model(normalise(part.video), part.rng, part.masks)
            strategy.backward(losses["loss"] * share)
        if has_streams:
            losses[f"loss_stream_{part.stream}"] = losses["loss"]
        for name, value in losses.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value.detach() * share
            weights[name] = weights.get(name, 0.0) + share
    if has_streams:  # a value that only some streams report is a mean over those
        total = {name: value / weights[name] for name, value in total.items()}
    return total

"""One training step: the random seed, and forward and backward passes over micro-batches and streams."""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn

from vidssl.core.pixels import normalise
from vidssl.core.rng import GOLDEN_RATIO, KeyedRNG, splitmix64
from vidssl.data.loader import Batch, make_streams, train_steps
from vidssl.data.shards import Shards
from vidssl.data.stream import ShardUrls
from vidssl.model.vit import TransformerStack
from vidssl.training.distributed import Strategy
from vidssl.training.schema import TrainConfig


def configure_blocks(module: nn.Module, activation_checkpointing: bool, compile: bool = False) -> None:
    """Sets the options of every transformer stack in `module`."""
    for stack in module.modules():
        if isinstance(stack, TransformerStack):
            stack.activation_checkpointing = activation_checkpointing
            # dynamic: one graph for all numbers of tokens; the names of the weights do not change
            for block in stack if compile else ():
                block.compile(dynamic=True)


def load_steps(
    cfg: TrainConfig, shards: list[Shards] | ShardUrls, start: int, strategy: Strategy
) -> Generator[list[Batch], None, None]:
    """This process's batches of steps start..run.steps-1, one of each stream."""
    run, efficiency = cfg.run, cfg.efficiency
    cache_bytes = efficiency.cache_mb << 20
    augment = cfg.augment.build()
    streams = make_streams(cfg.data, shards, augment, run.seed, run.lanes, run.shuffle_window, cache_bytes)
    return train_steps(
        streams,
        start,
        run.steps,
        cfg.data.clips(run.batch),
        strategy.rank,
        strategy.world,
        efficiency.workers,
        efficiency.decode_in_subprocess,
    )


def seed_step(seed: int, step: int, position: int) -> None:
    """Seeds torch's global generator, from which stochastic depth draws, by a hash of (seed, step, position).

    position: of the first sample of this process in the stream. Runs with other seeds share no draws. Data
    order, frames, augmentation and masks do not use this generator and do not depend on the number of
    processes. Stochastic depth does: a process draws for all of its samples in turn, so another number of
    processes draws other depths.
    """
    key = torch.tensor(seed) + 2 * torch.tensor(GOLDEN_RATIO)
    for value in (step, position):
        key = splitmix64(key) + value
    torch.manual_seed(int(splitmix64(key)))


def forward_backward(
    strategy: Strategy, model: nn.Module, batches: list[Batch], seed: int, step: int, micro_batches: int
) -> dict[str, Tensor]:
    """Accumulates the gradients of this process's clips. Returns the loss and its parts, averaged over the
    clips.

    batches: one of each stream, of which each is computed in `micro_batches` equal parts. With several
    streams the loss of each is returned, too, as loss_stream_0, loss_stream_1, ...
    """
    parts: list[tuple[int, Tensor, Tensor]] = []
    for stream, batch in enumerate(batches):
        videos = batch.video.to(strategy.device).chunk(micro_batches)
        positions = batch.position.to(strategy.device).chunk(micro_batches)
        parts += [(stream, v, p) for v, p in zip(videos, positions, strict=True)]
    clips = sum(len(position) for _, _, position in parts)
    total: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for i, (stream, video, position) in enumerate(parts):
        share = len(position) / clips
        is_last = i == len(parts) - 1
        with contextlib.nullcontext() if is_last else strategy.no_sync(model):
            with strategy.autocast():
                losses = model(normalise(video), KeyedRNG(seed, step, position))
            strategy.backward(losses["loss"] * share)
        if len(batches) > 1:
            losses[f"loss_stream_{stream}"] = losses["loss"]
        for name, value in losses.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value.detach() * share
            weights[name] = weights.get(name, 0.0) + share
    if len(batches) > 1:  # a value that only some streams report is a mean over those
        total = {name: value / weights[name] for name, value in total.items()}
    return total

"""Counts the FLOPs of a training step without computing it, on the meta device: tensors without values."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vidssl.core.pixels import normalise
from vidssl.data.loader import Batch
from vidssl.model.vit import TransformerStack
from vidssl.objective.objective import Objective
from vidssl.training.blocks import all_stacks
from vidssl.training.distributed import Strategy
from vidssl.training.flops import ModelFlops
from vidssl.training.micro_batches import MicroBatch, make_part_maker
from vidssl.training.schema import TrainConfig

META = torch.device("meta")
PARTS = 128  # micro-batches whose masks are drawn, at most
CLIPS = 4096  # whose masks are drawn, at most, but for one step
SIZES = 6  # of masks, the most frequent ones, for which a forward pass is counted


def step_flops(cfg: TrainConfig) -> float:
    """Model FLOPs of a step of one process: the mean over masks as they are drawn in the first steps."""
    objective = cfg.build_objective()
    return flops_without_values(cfg, objective, drawn_parts(cfg, objective))


def flops_without_values(
    cfg: TrainConfig, objective: Objective, parts: Sequence[MicroBatch], sizes: int = SIZES
) -> float:
    """Model FLOPs of a step, by the micro-batches of drawn_parts. The objective is of no further use.

    sizes: of masks, for which a forward pass is counted.
    """
    objective.to(META)
    # stacks are counted as a whole, by the shapes of their inputs
    for stack in all_stacks(objective):
        if isinstance(stack, TransformerStack):
            for block in stack:
                block.forward = pass_on_tokens  # type: ignore[method-assign]
    counter = ModelFlops(objective)
    total = 0.0
    for stream, clips in enumerate(cfg.data.clips(cfg.run.batch)):
        of_size: dict[tuple, list[MicroBatch]] = {}
        for part in parts:
            if part.stream == stream:
                shapes = tuple(leaf.shape for leaf in tree_leaves(part.masks) if isinstance(leaf, Tensor))
                of_size.setdefault((len(part.video), shapes), []).append(part)
        counted = sorted(of_size.values(), key=len, reverse=True)[:sizes]
        spent = 0
        for alike in counted:
            with counter.counting():
                objective(normalise(alike[0].video), alike[0].rng, alike[0].masks)
            spent += counter.total * len(alike)
        total += spent * clips / sum(len(part.video) for alike in counted for part in alike)
    return total


def pass_on_tokens(
    x: Tensor,
    rope: object = None,
    num_outputs: int | None = None,
    path_scale: object = None,
    attends: object = None,
    mlp_output: bool = False,
    condition: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """In the place of a Block's forward pass: its shapes without its work."""
    x = x if num_outputs is None else x[:, -num_outputs:]
    return (x, x) if mlp_output else x


def drawn_parts(cfg: TrainConfig, objective: Objective, world: int = 1) -> list[MicroBatch]:
    """The micro-batches of the first of `world` processes in as many steps as show how masks vary."""
    process = cast(Strategy, SimpleNamespace(rank=0, world=world))
    make_parts = make_part_maker(cfg, objective, process)
    parts: list[MicroBatch] = []
    for step in range(PARTS if objective.varying_parts else 1):
        parts += make_parts(step, step_batches(cfg, step, world))
        if len(parts) >= PARTS or sum(len(part.video) for part in parts) >= CLIPS:
            break
    return parts


def step_batches(cfg: TrainConfig, step: int, world: int = 1) -> list[Batch]:
    """The clips of a step of the first of `world` processes, one batch of each stream, without pixels."""
    size = cfg.augment.arguments["size"]
    batches = []
    for clips, stream in zip(cfg.data.clips(cfg.run.batch), cfg.data.streams(), strict=True):
        own = clips // world
        video = torch.empty(own, 3, stream.clip_frames, size, size, dtype=torch.uint8, device=META)
        position = torch.arange(own) * world + clips * step
        batches.append(Batch(video, torch.zeros(own), position, [""] * own, []))
    return batches

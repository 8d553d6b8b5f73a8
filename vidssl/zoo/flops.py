"""Counts the FLOPs of a training step without computing it, on the meta device: tensors without values."""

from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vidssl.core.pixels import normalise
from vidssl.data.loader import Batch
from vidssl.training.distributed import Strategy
from vidssl.training.flops import ModelFlops
from vidssl.training.micro_batches import MicroBatch, make_part_maker
from vidssl.training.schema import TrainConfig

META = torch.device("meta")
PARTS = 128  # micro-batches whose masks are drawn
SIZES = 6  # of masks, the most frequent ones, for which a forward pass is counted


def step_flops(cfg: TrainConfig) -> float:
    """Model FLOPs of a step of one process: the mean over masks as they are drawn in the first steps."""
    objective = cfg.build_objective().to(META)
    counter = ModelFlops(objective)
    one_process = cast(Strategy, SimpleNamespace(rank=0, world=1))
    make_parts = make_part_maker(cfg, objective, one_process)
    parts: list[MicroBatch] = []
    for step in range(PARTS):
        parts += make_parts(step, step_batches(cfg, step))
        if len(parts) >= PARTS:
            break
    total = 0.0
    for stream, clips in enumerate(cfg.data.clips(cfg.run.batch)):
        of_size: dict[tuple, list[MicroBatch]] = {}
        for part in parts:
            if part.stream == stream:
                shapes = tuple(leaf.shape for leaf in tree_leaves(part.masks) if isinstance(leaf, Tensor))
                of_size.setdefault((len(part.video), shapes), []).append(part)
        counted = sorted(of_size.values(), key=len, reverse=True)[:SIZES]
        spent = 0
        for alike in counted:
            with counter.counting():
                objective(normalise(alike[0].video), alike[0].rng, alike[0].masks)
            spent += counter.total * len(alike)
        total += spent * clips / sum(len(part.video) for alike in counted for part in alike)
    return total


def step_batches(cfg: TrainConfig, step: int) -> list[Batch]:
    """The clips of a step, one batch of each stream, without pixels."""
    size = cfg.augment.arguments["size"]
    batches = []
    for clips, stream in zip(cfg.data.clips(cfg.run.batch), cfg.data.streams(), strict=True):
        video = torch.empty(clips, 3, stream.clip_frames, size, size, dtype=torch.uint8, device=META)
        position = torch.arange(clips) + clips * step
        batches.append(Batch(video, torch.zeros(clips), position, [""] * clips, []))
    return batches

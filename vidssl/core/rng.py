"""Random numbers that depend on their purpose only, not on the order of calls.

Masks (and whatever else the objective draws) must not change with the number of processes or the per-process
batch. So each sample of a batch has its own key, made of (seed, position in the training stream), and its
numbers are a hash of (key, counter): the counter-based generators of Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3" (2011), with the finaliser of splitmix64 (Steele et al. 2014) as the hash.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vidssl.core.constants import upload

GOLDEN_RATIO = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of int64 whose values look random."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def box_muller(uniform: Tensor) -> Tensor:
    """Maps [2, ...] in [0, 1) to normally distributed numbers [...]; the largest is 5.8 of 24 random bits."""
    radius, angle = uniform
    return (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()


class GlobalBatch(NamedTuple):
    """The clips of a stream in one step, over all processes: the positions first .. first + clips - 1."""

    first: int
    clips: int


class KeyedRNG:
    """Uniform numbers for a batch: `rand` per sample, `shared` the same for the whole global batch of a
    step."""

    def __init__(self, seed: int, step: int, positions: Tensor, batch: GlobalBatch | None = None):
        """positions i64 [B]: positions of the samples in the training stream, on the host where masks are
        drawn there (see `to`); batch: the global batch that they are a part of; None: they are all of it."""
        self.step = step
        self.positions = positions
        self.batch = batch
        start = torch.full((), seed, device=positions.device)
        self.seed_key = splitmix64(start + GOLDEN_RATIO)
        self.keys = splitmix64(self.seed_key + positions)
        self.step_key = splitmix64(splitmix64(start - GOLDEN_RATIO) + step)[None]
        self.used = {"rand": 0, "shared": 0}

    def to(self, device: torch.device) -> "KeyedRNG":
        """This generator on a device, where it goes on with the same numbers. The copies do not wait for the
        device."""
        moved = copy.copy(self)
        names = ("positions", "seed_key", "keys", "step_key")
        moved.__dict__ |= {name: upload(getattr(self, name), device) for name in names}
        return moved

    def of_views(self, views: int) -> "KeyedRNG":
        """The generator of `views` x B samples, all samples of one view after another. Each has a key of its
        own, which counts as a number drawn here, so that further calls give others."""
        several = copy.copy(self)
        counter = torch.arange(self.used["rand"] + 1, self.used["rand"] + views + 1, device=self.keys.device)
        self.used["rand"] += views
        several.used = {**self.used, "rand": 0}
        several.positions = self.positions.repeat(views)
        several.keys = splitmix64(self.keys + counter[:, None] * GOLDEN_RATIO).flatten()
        return several

    def over_group(self, count_groups: Callable[[int], int]) -> tuple["KeyedRNG", Tensor]:
        """Returns the generator of all samples of a group of the global batch, and where in it the samples
        of this one are, i64 [B]. What the one draws counts as drawn by the other.

        count_groups: maps the size of the global batch to the number of groups. Group g of n holds the
        samples g, g + n, g + 2 n, ... of the batch, so that a process, which holds every W-th sample, has
        whole groups or a part of one; it can compute the numbers of samples that another process holds.
        Raises ValueError if the samples are of several groups (micro_batches.split_batch keeps them apart).
        """
        if self.batch is None:
            return self, torch.arange(len(self.positions), device=self.positions.device)
        groups = count_groups(self.batch.clips)
        offset = self.positions - self.batch.first
        place = offset // groups
        group = offset % groups
        if (group != group[0]).any():
            raise ValueError("the samples belong to several groups")
        members = torch.arange(self.batch.clips // groups, device=place.device) * groups
        wide = copy.copy(self)
        wide.positions = self.batch.first + group[0] + members
        wide.keys = splitmix64(self.seed_key + wide.positions)
        return wide, place

    def _draw(self, stream: str, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
        n = torch.Size(shape).numel()
        counter = torch.arange(self.used[stream] + 1, self.used[stream] + n + 1, device=keys.device)
        self.used[stream] += n
        bits = _shift(splitmix64(keys[:, None] + counter * GOLDEN_RATIO), 40)
        return (bits.to(torch.float32) / (1 << 24)).reshape(len(keys), *shape)

    def rand(self, *shape: int) -> Tensor:
        """f32 [B, *shape] in [0, 1)."""
        return self._draw("rand", self.keys, shape)

    def normal(self, *shape: int) -> Tensor:
        """f32 [B, *shape], normally distributed with mean 0 and deviation 1 (Box and Muller 1958)."""
        return box_muller(self.rand(2, *shape).transpose(0, 1))

    def shared(self, *shape: int) -> Tensor:
        """f32 [*shape] in [0, 1), the same on every process."""
        return self._draw("shared", self.step_key, shape)[0]

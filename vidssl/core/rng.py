"""Random numbers that are a function of what they are for, not of who asks first.

Masks (and whatever else the objective draws) must not change with the number of processes or the per-process batch, so
each sample of a batch has a key of its own, made of (seed, position in the training stream), and its numbers are a hash
of (key, counter): the counter-based generators of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011),
with the finaliser of splitmix64 (Steele et al. 2014) as the hash.
"""

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIX_1, MIX_2 = -4658895280553007687, -7723592293110705685  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser: int64 -> int64, a bijection that looks random."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


class KeyedRNG:
    """Uniform numbers for a batch: `rand` per sample, `shared` the same for the whole global batch of a step."""

    def __init__(self, seed: int, step: int, positions: Tensor):
        """positions i64 [B]: places of the samples in the training stream."""
        self.step = step
        at = torch.tensor(seed, device=positions.device)
        self.keys = splitmix64(splitmix64(at + GOLDEN) + positions)
        self.step_key = splitmix64(splitmix64(at - GOLDEN) + step)[None]
        self.used = {"rand": 0, "shared": 0}

    def _draw(self, stream: str, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
        n = torch.Size(shape).numel()
        counter = torch.arange(self.used[stream] + 1, self.used[stream] + n + 1, device=keys.device)
        self.used[stream] += n
        bits = _shift(splitmix64(keys[:, None] + counter * GOLDEN), 40)
        return (bits.to(torch.float32) / (1 << 24)).reshape(len(keys), *shape)

    def rand(self, *shape: int) -> Tensor:
        """f32 [B, *shape] in [0, 1)."""
        return self._draw("rand", self.keys, shape)

    def shared(self, *shape: int) -> Tensor:
        """f32 [*shape] in [0, 1), the same on every process."""
        return self._draw("shared", self.step_key, shape)[0]

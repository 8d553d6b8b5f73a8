"""Random numbers that depend on their purpose only, not on the order of calls.

Masks (and whatever else the objective draws) must not change with the number of processes or the per-process
batch. So each sample of a batch has its own key, made of (seed, position in the training stream), and its
numbers are a hash of (key, counter): the counter-based generators of Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3" (2011), with the finaliser of splitmix64 (Steele et al. 2014) as the hash.
"""

import torch
from torch import Tensor

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


class KeyedRNG:
    """Uniform numbers for a batch: `rand` per sample, `shared` the same for the whole global batch of a
    step."""

    def __init__(self, seed: int, step: int, positions: Tensor):
        """positions i64 [B]: positions of the samples in the training stream."""
        self.step = step
        start = torch.tensor(seed, device=positions.device)
        self.keys = splitmix64(splitmix64(start + GOLDEN_RATIO) + positions)
        self.step_key = splitmix64(splitmix64(start - GOLDEN_RATIO) + step)[None]
        self.used = {"rand": 0, "shared": 0}

    def _draw(self, stream: str, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
        n = torch.Size(shape).numel()
        counter = torch.arange(self.used[stream] + 1, self.used[stream] + n + 1, device=keys.device)
        self.used[stream] += n
        bits = _shift(splitmix64(keys[:, None] + counter * GOLDEN_RATIO), 40)
        return (bits.to(torch.float32) / (1 << 24)).reshape(len(keys), *shape)

    def rand(self, *shape: int) -> Tensor:
        """f32 [B, *shape] in [0, 1)."""
        return self._draw("rand", self.keys, shape)

    def shared(self, *shape: int) -> Tensor:
        """f32 [*shape] in [0, 1), the same on every process."""
        return self._draw("shared", self.step_key, shape)[0]

"""Corruptions: what the encoder sees in place of the clean video."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask


class Corrupted(NamedTuple):
    """What the encoder sees."""

    video: Tensor  # f32 [B, 3, T, H, W]
    replaced: tuple[Tensor, Tensor] | None = None  # bool [B, N] and [D]: see Encoder.forward


class Corruption(nn.Module):
    """Base of all corruptions."""

    sees_all = True  # the encoder sees all tokens, hidden ones corrupted; False: it sees the context alone

    def forward(self, video: Tensor, mask: Mask, grid: Grid, rng: KeyedRNG) -> Corrupted:
        """video f32 [B, 3, T, H, W], clean."""
        raise NotImplementedError


CORRUPTIONS: dict[str, Callable[..., Corruption]] = {}

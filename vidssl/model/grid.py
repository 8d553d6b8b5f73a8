"""Tokens: the grid a clip is cut into, the mask over it, and the two moves between them."""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor


class Grid(NamedTuple):
    """Tokens along time, height and width; flat token numbers run in (t, h, w) order, w fastest."""

    t: int
    h: int
    w: int

    @property
    def n(self) -> int:
        return self.t * self.h * self.w


class Mask(NamedTuple):
    """What the encoder is given and what is to be predicted. M target groups share one context."""

    context: Tensor  # i64 [B, Nc]
    target: Tensor  # i64 [B, M, Nt]
    weight: Tensor | None = None  # f32 [B, M, Nt]; None: every error counts once


def patchify(video: Tensor, tubelet: int, patch: int) -> Tensor:
    """[B, C, T, H, W] -> [B, N, C, tubelet, patch, patch]."""
    return rearrange(video, "b c (t u) (h p) (w q) -> b (t h w) c u p q", u=tubelet, p=patch, q=patch)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, ...], ids i64 [B, ...ids] -> [B, ...ids, ...]: the tokens `ids` of each sample."""
    flat = ids.flatten(1)
    rest = x.shape[2:]
    index = flat.reshape(*flat.shape, *[1] * len(rest)).expand(-1, -1, *rest)
    return x.gather(1, index).reshape(*ids.shape, *rest)

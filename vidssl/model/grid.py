"""Tokens: the grid a clip is cut into, the mask over it, and the two moves between them."""

from typing import NamedTuple

import numpy as np
import torch
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


def take(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, ...], ids i64 [B, ...ids] -> [B, ...ids, ...]: the tokens `ids` of each sample."""
    flat = ids.flatten(1)
    rest = x.shape[2:]
    index = flat.reshape(*flat.shape, *[1] * len(rest)).expand(-1, -1, *rest)
    return x.gather(1, index).reshape(*ids.shape, *rest)


def _sincos_1d(position: np.ndarray, dim: int) -> np.ndarray:
    """float64 [n] -> [n, dim]: sines in the first half, cosines in the second."""
    omega = 10000.0 ** -(np.arange(dim // 2) / (dim / 2))
    angle = position[:, None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def sincos_3d(grid: Grid, dim: int, uniform: bool) -> Tensor:
    """Fixed positions f32 [N, dim], [t | h | w] along dim, each axis [sines | cosines].

    uniform: every axis has 2*ceil(dim/6) entries and the whole is cut to dim, as V-JEPA trains
    (`uniform_power: true`); otherwise time has dim/2 and height and width dim/4 each.
    Source: V-JEPA, src/models/utils/pos_embs.py; checked against its tables.
    """
    parts = [2 * -(-dim // 6)] * 3 if uniform else [dim // 2, dim // 4, dim // 4]
    t, h, w = (m.ravel().astype(np.float64) for m in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    table = np.concatenate([_sincos_1d(p, d) for p, d in zip((t, h, w), parts, strict=True)], 1)
    return torch.from_numpy(table[:, :dim]).float()


def sincos_flat(grid: Grid, dim: int) -> Tensor:
    """Fixed positions f32 [N, dim] over the flat token number, sine and cosine interleaved.

    Source: VideoMAE, modeling_finetune.py get_sinusoid_encoding_table; checked against its tables.
    """
    j = np.arange(dim)
    angle = np.arange(grid.n)[:, None] / 10000.0 ** (2 * (j // 2) / dim)
    return torch.from_numpy(np.where(j % 2, np.cos(angle), np.sin(angle))).float()


POSITIONS = {
    "sincos_uniform": lambda grid, dim: sincos_3d(grid, dim, True),
    "sincos": lambda grid, dim: sincos_3d(grid, dim, False),
    "sincos_flat": sincos_flat,
}

"""Where a token is: tables added to the tokens, fixed or learned, and rotations of queries and keys."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.model.grid import Grid

PositionKind = Literal[
    "sincos_uniform",
    "sincos",
    "sincos_flat",
    "sincos_2d",
    "learned",
    "learned_separable",
    "rope",
    "rope_interleaved",
]
RotaryTable = tuple[Tensor, Tensor]  # cosines and sines, f32 [..., n, D / heads]


def _sincos_1d(position: np.ndarray, dim: int) -> np.ndarray:
    """float64 [n] -> [n, dim]: sines in the first half, cosines in the second."""
    omega = 10000.0 ** -(np.arange(dim // 2) / (dim / 2))
    angle = position[:, None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def _places(grid: Grid) -> list[np.ndarray]:
    """Time, row and column of every token, float64 [N] each."""
    return [m.ravel().astype(np.float64) for m in np.meshgrid(*map(np.arange, grid), indexing="ij")]


def sincos_3d(grid: Grid, dim: int, uniform: bool) -> Tensor:
    """Fixed positions f32 [N, dim], [t | h | w] along dim, each axis [sines | cosines].

    uniform: every axis has 2*ceil(dim/6) entries and the whole is cut to dim, as V-JEPA trains
    (`uniform_power: true`); otherwise time has dim/2 and height and width dim/4 each.
    Source: V-JEPA, src/models/utils/pos_embs.py; checked against its tables.
    """
    parts = [2 * -(-dim // 6)] * 3 if uniform else [dim // 2, dim // 4, dim // 4]
    table = np.concatenate([_sincos_1d(p, d) for p, d in zip(_places(grid), parts, strict=True)], 1)
    return torch.from_numpy(table[:, :dim]).float()


def sincos_2d(grid: Grid, dim: int) -> Tensor:
    """Fixed positions f32 [N, dim] of an image, [w | h] along dim, each axis [sines | cosines].

    Source: MAE, util/pos_embed.py, and I-JEPA, whose names say the opposite order; checked against I-JEPA's tables.
    """
    if grid.t > 1:
        raise UserError(
            f"positions sincos_2d are for images (one time slice), not for {grid.t} slices: use sincos"
        )
    _, h, w = _places(grid)
    return torch.from_numpy(np.concatenate([_sincos_1d(w, dim // 2), _sincos_1d(h, dim // 2)], 1)).float()


def sincos_flat(grid: Grid, dim: int) -> Tensor:
    """Fixed positions f32 [N, dim] over the flat token number, sine and cosine interleaved.

    Source: VideoMAE, modeling_finetune.py get_sinusoid_encoding_table; checked against its tables.
    """
    j = np.arange(dim)
    angle = np.arange(grid.n)[:, None] / 10000.0 ** (2 * (j // 2) / dim)
    return torch.from_numpy(np.where(j % 2, np.cos(angle), np.sin(angle))).float()


TABLES: dict[str, Callable[[Grid, int], Tensor]] = {
    "sincos_uniform": lambda grid, dim: sincos_3d(grid, dim, True),
    "sincos": lambda grid, dim: sincos_3d(grid, dim, False),
    "sincos_flat": sincos_flat,
    "sincos_2d": sincos_2d,
}


def resize_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """[N, dim] of one grid -> of another: trilinear as V-JEPA does, bicubic for images as I-JEPA does."""
    volume = table.T.reshape(1, -1, *old)
    if old.t == new.t == 1:
        volume = F.interpolate(volume[:, :, 0], size=new[1:], mode="bicubic")[:, :, None]
    else:
        volume = F.interpolate(volume, size=tuple(new), mode="trilinear")
    return volume[0].flatten(1).T


def rotary_table(
    grid: Grid, dim: int, interleaved: bool, native: int | None, device: torch.device
) -> RotaryTable:
    """3-D rotary angles of every token as (cosines, sines), f32 [N, dim] each; dim is that of a head.

    Time, row and column turn 2*(dim // 3 // 2) entries each, in pairs of neighbours; the rest does not turn. The
    frequencies are 10000^(-k / half) for k = 0 .. half-1, half = dim // 3 // 2. `interleaved`: the two entries of a
    pair share a frequency (V-JEPA 2.1). Otherwise the list of frequencies is laid twice over the axis, so that they do
    not: a slip in V-JEPA 2, kept there because its weights were trained with it; the wrong layout loads and runs.
    native: rows and columns are stretched to run over 0 .. native-1 whatever the grid (V-JEPA 2.1).
    Source: V-JEPA 2, src/models/utils/modules.py; V-JEPA 2.1, app/vjepa_2_1/models/utils/modules.py.
    """
    half = dim // 3 // 2
    omega = 10000.0 ** -(torch.arange(half, device=device) / half)
    omega = omega.repeat_interleave(2) if interleaved else omega.repeat(2)
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
    if native:
        axes[1:] = [a * (native - 1) / max(1, len(a) - 1) for a in axes[1:]]
    angles = [p.flatten()[:, None] * omega for p in torch.meshgrid(*axes, indexing="ij")]
    angle = F.pad(torch.cat(angles, 1), (0, dim - 6 * half))
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, turn: RotaryTable) -> Tensor:
    """x [B, heads, n, D / heads] -> the same, every pair of neighbouring entries turned by its token's angle."""
    cos, sin = turn
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack((-b, a), -1).flatten(-2) * sin).to(x.dtype)


class PositionEncoding(nn.Module):
    """The positions of one network: `added` gives what is added to its tokens, `turn` what its attention rotates by."""

    def __init__(self, kind: PositionKind, grid: Grid, dim: int, heads: int, rope_grid: int | None = None):
        """grid: the native one, on which tables are defined; rope_grid: see `rotation`."""
        super().__init__()
        self.kind, self.grid, self.head_dim, self.rope_grid = kind, grid, dim // heads, rope_grid
        if kind in TABLES:
            self.register_buffer("table", TABLES[kind](grid, dim), persistent=False)
        elif kind == "learned":
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid.n, dim), std=0.02))
        elif kind == "learned_separable":
            self.time = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid.t, dim), std=0.02))
            self.space = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid.h * grid.w, dim), std=0.02))
        elif self.head_dim < 6 or self.head_dim % 2:
            raise UserError(
                f"rotary positions need an even width of 6 or more for each head, not {dim} / {heads}"
            )

    def added(self, grid: Grid, ids: Tensor | None) -> Tensor | float:
        """-> [B, n, dim] for ids i64 [B, n] (all tokens without: [N, dim]); 0 where nothing is added."""
        if self.kind in ("rope", "rope_interleaved"):
            return 0.0
        if self.kind == "learned_separable":  # MAE-ST, models_mae.py: space repeated, plus time
            table = (self.time[:, None] + self.space).flatten(0, 1)
        else:
            table = self.table
        if grid != self.grid:
            table = resize_table(table, self.grid, grid)
        return table if ids is None else table[ids]

    def turn(self, grid: Grid, ids: Tensor | None, device: torch.device) -> RotaryTable | None:
        """-> cosines and sines [B or none, 1, n, D / heads]; None without rotary positions."""
        if self.kind not in ("rope", "rope_interleaved"):
            return None
        cos, sin = rotary_table(grid, self.head_dim, self.kind == "rope_interleaved", self.rope_grid, device)
        return (cos, sin) if ids is None else (cos[ids][:, None], sin[ids][:, None])

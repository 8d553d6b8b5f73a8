"""Position encodings: tables added to the tokens, fixed or learned, and rotary embeddings of queries and
keys."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.model.grid import Grid

PositionKind = Literal[
    "sincos_uniform",
    "sincos",
    "sincos_flat",
    "sincos_2d",
    "sincos_frames",
    "learned",
    "learned_separable",
    "rope",
    "rope_interleaved",
]
RotaryTable = tuple[Tensor, Tensor]  # cosines, and sines with the signs of a rotation; [..., D / heads] each
MIN_ROTARY_HEAD_DIM = 6  # one pair of entries for each of three axes


def _sincos_1d(position: np.ndarray, dim: int) -> np.ndarray:
    """position float64 [n]. Returns [n, dim]: sines in the first half, cosines in the second."""
    omega = 10000.0 ** -(np.arange(dim // 2) / (dim / 2))
    angle = position[:, None] * omega
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def _token_coordinates(grid: Grid) -> list[np.ndarray]:
    """Time, row and column of every token, float64 [N] each."""
    return [m.ravel().astype(np.float64) for m in np.meshgrid(*map(np.arange, grid), indexing="ij")]


def sincos_3d(grid: Grid, dim: int, uniform: bool) -> Tensor:
    """Fixed positions f32 [N, dim], [t | h | w] along dim, each axis [sines | cosines].

    uniform: every axis has 2*ceil(dim/6) entries and the table is cut to dim, as V-JEPA trains
    (`uniform_power: true`); otherwise time has dim/2 and height and width dim/4 each.
    Source: V-JEPA, src/models/utils/pos_embs.py; checked against its tables.
    """
    axis_dims = [2 * -(-dim // 6)] * 3 if uniform else [dim // 2, dim // 4, dim // 4]
    axes = zip(_token_coordinates(grid), axis_dims, strict=True)
    table = np.concatenate([_sincos_1d(position, axis_dim) for position, axis_dim in axes], 1)
    return torch.from_numpy(table[:, :dim]).float()


def sincos_2d(grid: Grid, dim: int) -> Tensor:
    """Fixed positions f32 [N, dim] of an image, [w | h] along dim, each axis [sines | cosines].

    Source: MAE, util/pos_embed.py, and I-JEPA, whose variable names give the opposite order; checked against
    I-JEPA's tables.
    """
    if grid.t > 1:
        raise UserError(
            f"positions sincos_2d are for images (one time slice), not for {grid.t} slices: use sincos, "
            "or sincos_frames for positions without time"
        )
    _, h, w = _token_coordinates(grid)
    return torch.from_numpy(np.concatenate([_sincos_1d(w, dim // 2), _sincos_1d(h, dim // 2)], 1)).float()


def sincos_frames(grid: Grid, dim: int) -> Tensor:
    """Fixed positions f32 [N, dim] that are those of sincos_2d in each time slice (SiamMAE, CropMAE)."""
    return sincos_2d(Grid(1, grid.h, grid.w), dim).repeat(grid.t, 1)


def sincos_flat(grid: Grid, dim: int) -> Tensor:
    """Fixed positions f32 [N, dim] over the flat token number, sine and cosine interleaved.

    Source: VideoMAE, modeling_finetune.py get_sinusoid_encoding_table; checked against its tables.
    """
    entry = np.arange(dim)
    angle = np.arange(grid.n)[:, None] / 10000.0 ** (2 * (entry // 2) / dim)
    return torch.from_numpy(np.where(entry % 2, np.cos(angle), np.sin(angle))).float()


FIXED_TABLES: dict[str, Callable[[Grid, int], Tensor]] = {
    "sincos_uniform": lambda grid, dim: sincos_3d(grid, dim, True),
    "sincos": lambda grid, dim: sincos_3d(grid, dim, False),
    "sincos_flat": sincos_flat,
    "sincos_2d": sincos_2d,
    "sincos_frames": sincos_frames,
}


def resize_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Interpolates a table f32 [N_old, dim] to [N_new, dim]: trilinear as in V-JEPA, bicubic for images as in
    I-JEPA."""
    volume = rearrange(table, "(t h w) d -> 1 d t h w", t=old.t, h=old.h)
    if old.t == new.t == 1:
        volume = F.interpolate(volume[:, :, 0], size=new[1:], mode="bicubic")[:, :, None]
    else:
        volume = F.interpolate(volume, size=tuple(new), mode="trilinear")
    return rearrange(volume, "1 d t h w -> (t h w) d")


def rotary_table(
    grid: Grid, dim: int, interleaved: bool, rope_grid: int | None, device: torch.device
) -> RotaryTable:
    """3-D rotary angles of every token as (cosines, signed sines), f32 [N, dim] each; dim is the width of a
    head. The sine of the first entry of a pair has a minus: see apply_rope.

    Time, row and column rotate 2*(dim // 3 // 2) entries each, in pairs of neighbours; the other entries are
    left as they are. The frequencies are 10000^(-k / half) for k = 0 .. half-1, half = dim // 3 // 2.
    `interleaved`: the two entries of a pair share a frequency (V-JEPA 2.1). Otherwise the list of frequencies
    is repeated twice along the axis, so that they differ: a slip in V-JEPA 2, kept there because its weights
    were trained with it. Weights load and run without an error under the wrong layout. rope_grid: rows and
    columns are stretched to run over 0 .. rope_grid - 1 for any grid (V-JEPA 2.1). Source: V-JEPA 2,
    src/models/utils/modules.py; V-JEPA 2.1, app/vjepa_2_1/models/utils/modules.py.
    """
    half = dim // 3 // 2
    omega = 10000.0 ** -(torch.arange(half, device=device) / half)
    omega = omega.repeat_interleave(2) if interleaved else omega.repeat(2)
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
    if rope_grid:
        axes[1:] = [a * (rope_grid - 1) / max(1, len(a) - 1) for a in axes[1:]]
    angles = [p.flatten()[:, None] * omega for p in torch.meshgrid(*axes, indexing="ij")]
    angle = F.pad(torch.cat(angles, 1), (0, dim - 6 * half))
    sign = 2 * (torch.arange(dim, device=device) % 2) - 1
    return angle.cos(), angle.sin() * sign


def apply_rope(x: Tensor, rope: RotaryTable) -> Tensor:
    """x [..., D / heads] of any type, tables that broadcast to it. Returns x with every pair of neighbouring
    entries rotated by its token's angle.

    Computed in the type of x, which in bf16 moves an entry by less than 2^-6 of the larger of its pair.
    """
    cos, sin = (table.to(x.dtype) for table in rope)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.addcmul(x * cos, torch.stack((odd, even), -1).flatten(-2), sin)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Type of matrix products on a device: that of autocast, where it is on, else f32."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.float32


class PositionEncoding(nn.Module):
    """The positions of one network: `embedding` is added to its tokens, `rope` rotates queries and keys."""

    def __init__(self, kind: PositionKind, grid: Grid, dim: int, heads: int, rope_grid: int | None = None):
        """grid: the native grid, on which tables are defined; rope_grid: see rotary_table."""
        super().__init__()
        self.kind = kind
        self.grid = grid
        self.head_dim = dim // heads
        self.rope_grid = rope_grid
        self._rotary: dict[tuple[Grid, torch.device, torch.dtype], RotaryTable] = {}
        if kind in FIXED_TABLES:
            self.register_buffer("table", FIXED_TABLES[kind](grid, dim), persistent=False)
        elif kind == "learned":
            self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid.n, dim), std=0.02))
        elif kind == "learned_separable":
            self.time = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid.t, dim), std=0.02))
            self.space = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid.h * grid.w, dim), std=0.02))
        elif self.head_dim < MIN_ROTARY_HEAD_DIM or self.head_dim % 2:
            raise UserError(
                f"rotary positions need an even width of {MIN_ROTARY_HEAD_DIM} or more for each head, "
                f"not {dim} / {heads}"
            )

    def embedding(self, grid: Grid, ids: Tensor | None) -> Tensor | float:
        """Returns [B, n, dim] for ids i64 [B, n], [N, dim] without ids, and 0 for rotary positions."""
        if self.kind in ("rope", "rope_interleaved"):
            return 0.0
        if self.kind == "learned_separable":  # MAE-ST, models_mae.py: space repeated, plus time
            table = rearrange(self.time[:, None] + self.space, "t s d -> (t s) d")
        else:
            table = self.table
        if grid != self.grid:
            table = resize_table(table, self.grid, grid)
        return table if ids is None else table[ids]

    def rope(
        self, grid: Grid, ids: Tensor | None, device: torch.device, extra: int = 0
    ) -> RotaryTable | None:
        """Returns cosines and signed sines for x [B, n, parts, heads, D / heads], in the type of matrix
        products: [B, n, 1, 1, D / heads] for ids i64 [B, n] and [N, 1, 1, D / heads] without; None without
        rotary positions. extra: number of tokens before them that are not rotated (a class token)."""
        if self.kind not in ("rope", "rope_interleaved"):
            return None
        key = (grid, device, compute_dtype(device))
        if key not in self._rotary:
            self._rotary[key] = self._build_rotary(*key)
        cos, sin = self._rotary[key]
        if ids is not None:
            cos, sin = cos[ids], sin[ids]
        if extra:
            before = (0, 0) * 3 + (extra, 0)
            cos, sin = F.pad(cos, before, value=1.0), F.pad(sin, before)
        return cos, sin

    @torch.inference_mode(False)  # a table made there could not be used in training later
    def _build_rotary(self, grid: Grid, device: torch.device, dtype: torch.dtype) -> RotaryTable:
        interleaved = self.kind == "rope_interleaved"
        cos, sin = rotary_table(grid, self.head_dim, interleaved, self.rope_grid, device)
        return cos.to(dtype)[:, None, None], sin.to(dtype)[:, None, None]

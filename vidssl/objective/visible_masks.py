"""Masks that are drawn by what stays visible: boxes (CAPI, data2vec 2.0), or a frame and a few places of the
next (SiamMAE)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidssl.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.objective.selection import indices_of, lowest_ids, other_ids


def visible_count(n: int, hidden: int, unit: str) -> int:
    """n - hidden. Raises UserError if all or none of the n would be visible."""
    if not 0 < hidden < n:
        raise UserError(
            f"method.mask.ratio: it hides {hidden} of {n} {unit}; at least one must be hidden and one visible"
        )
    return n - hidden


def through_time(places: Tensor, grid: Grid) -> Mask:
    """The mask that shows places i64 [B, P] in every time slice and hides the others."""
    hidden = other_ids(places, grid.h * grid.w)
    starts = torch.arange(grid.t, device=places.device)[:, None] * (grid.h * grid.w)
    context, target = ((ids[:, None] + starts).flatten(1) for ids in (places, hidden))
    return Mask(context, target[:, None])


@dataclass(frozen=True)
class VisibleBox:
    """One rectangle is visible, through all of time, moved cyclically over the edges of the frame.

    It has exactly the tokens that stay visible: its last row is cut. Source: CAPI (arXiv 2502.08769;
    data.py, InverseBlockMasking), for images there.
    """

    ratio: Fraction = 0.65  # fraction of a slice's places hidden, rounded down
    aspect: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)  # height / width, log-uniform
    roll: bool = True  # moves the rectangle cyclically; otherwise it lies within the frame

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        h, w = grid.h, grid.w
        visible = visible_count(h * w, int(self.ratio * h * w), "places")
        # the grid's sides limit the aspect
        narrowest = math.log(visible / w**2)
        widest = math.log(h**2 / visible)
        low, high = (min(max(math.log(aspect), narrowest), widest) for aspect in self.aspect)
        u = rng.rand(5)
        aspect = (low + u[:, 0] * (high - low)).exp()
        # a ratio that fits exactly must not be rounded up
        rows = ((visible * aspect).sqrt() - 1e-4).ceil().clamp(1, h)
        columns = torch.maximum(((visible / aspect).sqrt() - 1e-4).ceil(), (visible / rows).ceil()).clamp(
            1, w
        )
        rows = torch.maximum(rows, (visible / columns).ceil())
        top = (u[:, 1] * (h - rows + 1)).floor()
        left = (u[:, 2] * (w - columns + 1)).floor()
        box = inside(top, rows, h)[:, :, None] & inside(left, columns, w)[:, None]
        box = box & (box.flatten(1).cumsum(1) <= visible).reshape(box.shape)
        if self.roll:
            box = rolled(rolled(box, (u[:, 3] * h).long(), 1), (u[:, 4] * w).long(), 2)
        return [through_time(indices_of(box.flatten(1), visible), grid)]


def inside(start: Tensor, length: Tensor, n: int) -> Tensor:
    """bool [B, n]: start [B] <= index < start + length [B]."""
    index = torch.arange(n, device=start.device)
    return (index >= start[:, None]) & (index < (start + length)[:, None])


def rolled(x: Tensor, shift: Tensor, dim: int) -> Tensor:
    """x [B, h, w] moved cyclically along dim by shift i64 [B]."""
    n = x.shape[dim]
    index = (torch.arange(n, device=x.device) - shift[:, None]) % n
    return x.gather(dim, index.unsqueeze(3 - dim).expand_as(x))


@dataclass(frozen=True)
class VisibleBoxes:
    """Small boxes are visible, at random places, then single tokens are hidden or shown at random until the
    number is right.

    Source: data2vec 2.0 (arXiv 2212.07525; fairseq, compute_block_mask_2d with inverse_mask), for images
    there.
    """

    ratio: Fraction = 0.8  # fraction of tokens hidden
    side: PositiveInt = 3  # of a box, in tokens
    slices: PositiveInt | None = None  # time slices of a box; null: all of them, and single places likewise
    adjust: NonNegativeFloat = 0.07  # boxes are drawn for a visible fraction that is larger by this

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        drawn = Grid(1, grid.h, grid.w) if self.slices is None else grid
        sides = (self.slices or 1, self.side, self.side)
        # the float arithmetic of the source, which decides the rounding
        share = 1 - self.ratio
        visible = visible_count(drawn.n, drawn.n - int(drawn.n * share), "tokens")
        boxes = int(drawn.n * ((share + self.adjust) / math.prod(sides)))
        centres = (rng.rand(boxes) * drawn.n).long() if boxes else drawn.n * rng.rand(1).long()
        shown = torch.zeros(len(centres), drawn.n, dtype=torch.bool, device=centres.device)
        axes = (centres // (grid.h * grid.w), centres // grid.w % grid.h, centres % grid.w)
        for step in range(math.prod(sides) if boxes else 0):
            dt, rest = divmod(step, self.side**2)
            dy, dx = divmod(rest, self.side)
            near = [
                (c + d - side // 2).clamp(0, n - 1)
                for c, d, side, n in zip(axes, (dt, dy, dx), sides, drawn, strict=True)
            ]
            shown = shown.scatter(1, (near[0] * grid.h + near[1]) * grid.w + near[2], True)
        context = lowest_ids(rng.rand(drawn.n) + ~shown, visible)
        if self.slices is None:
            return [through_time(context, grid)]
        return [Mask(context, other_ids(context, grid.n)[:, None])]


@dataclass(frozen=True)
class NextFrame:
    """The first time slice is visible, and a few places of each later one, at random.

    Source: SiamMAE (arXiv 2305.14344, section 3) and CropMAE (arXiv 2403.17823), whose clips are two frames.
    """

    ratio: Fraction = 0.95  # fraction of a later slice's tokens hidden; the visible ones are rounded down

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        if grid.t < 2:
            raise UserError("method.mask.kind: next_frame needs clips of two or more time slices")
        size = grid.h * grid.w
        visible = visible_count(size, size - int(size * (1 - self.ratio)), "places")
        places = lowest_ids(rng.rand(grid.t - 1, size).flatten(0, 1), visible)
        starts = torch.arange(1, grid.t, device=places.device)[:, None] * size
        hidden = other_ids(places, size)
        shown, target = ((ids.unflatten(0, (-1, grid.t - 1)) + starts).flatten(1) for ids in (places, hidden))
        first = torch.arange(size, device=places.device).expand(len(shown), -1)
        return [Mask(torch.cat([first, shown], 1), target[:, None])]

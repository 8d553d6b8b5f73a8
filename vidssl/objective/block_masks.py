"""Masks made of boxes: V-JEPA's multi-block masks, and I-JEPA's target blocks with a context block around them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from vidssl.config import Count, Positive, Range, Share
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask

# Drawings of a sample's boxes, of which the first that leaves enough context is used; a fixed number, so that no sample
# shifts another's random numbers.
ATTEMPTS = 8

LowQuantile = Annotated[float, Field(ge=0, lt=0.5)]  # a low quantile


def draw_uniform(range_: tuple[float, float], rng: KeyedRNG) -> float:
    """Uniform in the range, the same for the whole step; nothing is drawn where there is nothing to choose."""
    low, high = range_
    return low + (high - low) * float(rng.shared(1)) if low < high else low


def box_size(area: int, aspect: float, grid: Grid) -> tuple[int, int]:
    """(height, width) in places of a box of about `area` places and height / width `aspect`, clipped to the grid."""
    return (
        min(grid.h, max(1, round((area * aspect) ** 0.5))),
        min(grid.w, max(1, round((area / aspect) ** 0.5))),
    )


def interval_mask(u: Tensor, size: int, length: int, starts: int) -> Tensor:
    """u [...] in [0, 1) -> bool [..., length]: an interval of `size`, which begins at one of the first `starts`."""
    start = (u * starts).long()[..., None]
    at = torch.arange(length, device=u.device)
    return (at >= start) & (at < start + size)


def rectangles(u: Tensor, size: tuple[int, int], grid: Grid, starts: tuple[int, int]) -> Tensor:
    """u [..., 2] in [0, 1) -> bool [..., h, w]: boxes of one size, u being their place."""
    rows = interval_mask(u[..., 0], size[0], grid.h, starts[0])
    return rows[..., :, None] & interval_mask(u[..., 1], size[1], grid.w, starts[1])[..., None, :]


def indices_of(chosen: Tensor, count: int) -> Tensor:
    """bool [..., N] of which each row has `count` -> i64 [..., count]: the ids of the chosen ones, ascending."""
    return (~chosen).int().argsort(dim=-1, stable=True)[..., :count]


class BlockGroup(NamedTuple):
    """`blocks` boxes, each over `scale` of a frame's area; their union is hidden."""

    blocks: Count
    scale: Positive


@dataclass(frozen=True)
class MultiBlock3D:
    """Multi-block masks: the union of boxes is the target, the rest the context; one mask a group.

    Source: V-JEPA (arXiv 2404.08471), section 3.2 and src/masks/multiblock3d.py. A box's shape is drawn once a step
    for the whole batch, its place for each sample; a sample whose boxes leave no context is drawn again.

    Unions differ in size, so counts must be evened out. `truncate`:
    - "random" (default): the kept counts are fixed by the parameters and the grid (the `keep_quantile` of the counts
      that the parameters give), what is over is dropped at random over time and space; a sample with too few context
      tokens (that quantile of them) takes random hidden ones. Unbiased, and independent of the batch.
    - "raster": a quirk of the published runs. Every sample is cut to the smallest of the per-process batch, in
      time-major order. It drops the end of the clip, the more the larger the per-process batch.
    """

    groups: Annotated[tuple[BlockGroup, ...], Field(min_length=1)] = (BlockGroup(8, 0.15), BlockGroup(2, 0.7))
    aspect: Range = (0.75, 1.5)  # height over width
    temporal_scale: Range = (1.0, 1.0)  # length of a box, as a fraction of the time slices
    max_temporal_keep: Share = (
        1.0  # later than this fraction of the slices, every token is hidden ("causal multi-block")
    )
    complement: bool = False  # predict all that is not context, what was cut too (V-JEPA 2: full_complement)
    truncate: Literal["random", "raster"] = "random"
    keep_quantile: LowQuantile = 0.05

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return [self._mask(group, grid, rng) for group in self.groups]

    def _mask(self, group: BlockGroup, grid: Grid, rng: KeyedRNG) -> Mask:
        score = self.hidden(group, grid, rng).float()  # 1: hidden
        if self.truncate == "raster":
            nc, nt = int((1 - score).sum(1).min()), int(score.sum(1).min())
        else:
            nc, nt = kept_counts(self, group, grid)
            score = score + rng.rand(grid.n)
        late = torch.arange(grid.n, device=score.device) >= self.early(grid) * grid.h * grid.w
        context = (score + late).argsort(dim=1, stable=True)[:, :nc].sort(1)[0]
        left = score.scatter(1, context, -1.0)
        nt = grid.n - nc if self.complement else nt
        target = left.argsort(dim=1, stable=True, descending=True)[:, :nt].sort(1)[0]
        return Mask(context, target[:, None])

    def early(self, grid: Grid) -> int:
        """How many time slices the context may come from."""
        return max(1, int(grid.t * self.max_temporal_keep))

    def hidden(self, group: BlockGroup, grid: Grid, rng: KeyedRNG) -> Tensor:
        """bool [B, N]: the boxes' union, and what is too late for context; at least one token on each side."""
        t = min(grid.t, max(1, int(grid.t * draw_uniform(self.temporal_scale, rng))))
        size = box_size(int(grid.h * grid.w * group.scale), draw_uniform(self.aspect, rng), grid)
        starts = (grid.h - size[0] + 1, grid.w - size[1] + 1)
        box = rectangles(
            rng.rand(ATTEMPTS, group.blocks, 2), size, grid, starts
        )  # bool [B, ATTEMPTS, blocks, h, w]
        slices = 1 if t == grid.t else grid.t  # boxes as long as the clip: one slice tells all
        if slices > 1:
            span = interval_mask(rng.rand(ATTEMPTS, group.blocks), t, slices, slices - t + 1)
            box = span[..., None, None] & box[..., None, :, :]
        union = box.any(2).flatten(2)  # bool [B, ATTEMPTS, slices * h * w]
        if union.shape[2] < 2:
            raise UserError("method.mask.kind: blocks cannot part a picture of one place; use a larger one")
        first = min(slices, self.early(grid)) * grid.h * grid.w
        usable = (~union[:, :, :first]).any(2).float()
        hidden = union.gather(1, usable.argmax(1)[:, None, None].expand(-1, 1, union.shape[2]))[:, 0]
        spare = rng.rand(first).argmax(1, keepdim=True)  # no drawing left a context: one token does
        hidden = hidden.scatter(1, spare, hidden.gather(1, spare) & ~hidden[:, :first].all(1, keepdim=True))
        hidden = hidden.repeat(1, grid.t // slices)
        hidden[:, self.early(grid) * grid.h * grid.w :] = True
        return hidden


@lru_cache(maxsize=256)
def kept_counts(blocks: MultiBlock3D, group: BlockGroup, grid: Grid) -> tuple[int, int]:
    """(context, target) tokens to keep: the `keep_quantile` of each, over 64 box shapes x 64 samples."""
    hidden = [blocks.hidden(group, grid, KeyedRNG(0, step, torch.arange(64))).sum(1) for step in range(64)]
    count = torch.cat(hidden).sort()[0]
    at = int(blocks.keep_quantile * len(count))
    return grid.n - int(count[len(count) - 1 - at]), int(count[at])


@dataclass(frozen=True)
class SingleBlock:
    """One box is the target, its complement the context. Source: I-JEPA (arXiv 2301.08243), table 6, "block"."""

    scale: Positive = 0.6  # fraction of a frame's area
    aspect: Range = (0.75, 1.5)  # height over width

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        # The box has one size in a step, so there is nothing to cut.
        return MultiBlock3D((BlockGroup(1, self.scale),), self.aspect, truncate="raster")(video, grid, rng)


@dataclass(frozen=True)
class MultiBlock2D:
    """Several target blocks, each a group of its own, and one large context block without what the targets cover.

    Source: I-JEPA (arXiv 2301.08243), section 3 and src/masks/multiblock.py. The sizes of the boxes are drawn once a
    step for the whole batch, their places for each sample; targets may overlap one another. On video the boxes go
    through all of time. Where the context is too small, targets and context are drawn again (the reference rng the
    context alone again and at last lets it overlap targets); where that never helps, all targets lie on the first,
    and all the rest is context.

    The context's count must be the same in a batch: by default it is the `keep_quantile` of the counts that the
    step's box sizes give, smaller ones are drawn again, and what is over is dropped at random.

    `reference_quirks` keeps three quirks of the reference: one uniform number gives both scale and aspect; no box begins in
    the last row or column it could begin in, nor is as long as a side; every context is cut, in raster order, to the
    smallest of the per-process batch.
    """

    targets: Count = 4
    scale: Range = (0.15, 0.2)  # of a target block, fraction of a frame's area
    aspect: Range = (0.75, 1.5)  # of a target block, height over width
    context_scale: Range = (0.85, 1.0)  # of the context block, which is as high as wide
    min_keep: Count = 10  # a context of no more places is drawn again; on small grids an eighth of the places
    keep_quantile: LowQuantile = 0.05
    reference_quirks: bool = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        places = grid.h * grid.w
        if places < 2:
            raise UserError(
                "method.mask.kind: multiblock_2d cannot part a picture of one place; use a larger one"
            )
        size = self._size(self.scale, self.aspect, grid, rng)
        if size[0] * size[1] == places:  # something must be left
            size = (size[0] - 1, size[1]) if size[0] > 1 else (size[0], size[1] - 1)
        frame = self._size(self.context_scale, (1.0, 1.0), grid, rng)
        contexts, targets = self.draw(size, frame, grid, rng, ATTEMPTS)
        least = self.least(grid) if self.reference_quirks else context_places(self, size, frame, grid)
        enough = contexts.sum(2) >= least  # bool [B, ATTEMPTS]
        row, at = torch.arange(len(enough), device=enough.device), enough.int().argmax(1)
        context, target, never = contexts[row, at], targets[row, at], ~enough.any(1)
        target = torch.where(never[:, None, None], target[:, :1], target)
        context = torch.where(never[:, None], ~target[:, 0], context)
        kept = int(context.sum(1).min()) if self.reference_quirks else least
        score = (~context).repeat(1, grid.t).float()
        if not self.reference_quirks:
            score = score + rng.rand(grid.n)
        ids = score.argsort(dim=1, stable=True)[:, : kept * grid.t].sort(1)[0]
        return [Mask(ids, indices_of(target.repeat(1, 1, grid.t), size[0] * size[1] * grid.t))]

    def _size(
        self, scale: tuple[float, float], aspect: tuple[float, float], grid: Grid, rng: KeyedRNG
    ) -> tuple[int, int]:
        """(height, width) of a box, in places."""
        u = rng.shared(2).tolist()
        v = u[0] if self.reference_quirks else u[1]
        area = int(grid.h * grid.w * (scale[0] + u[0] * (scale[1] - scale[0])))
        h, w = box_size(area, aspect[0] + v * (aspect[1] - aspect[0]), grid)
        return (min(h, max(1, grid.h - 1)), min(w, max(1, grid.w - 1))) if self.reference_quirks else (h, w)

    def least(self, grid: Grid) -> int:
        """The fewest places of a context."""
        return min(self.min_keep, grid.h * grid.w // 8) + 1

    def draw(
        self, size: tuple[int, int], frame: tuple[int, int], grid: Grid, rng: KeyedRNG, attempts: int
    ) -> tuple[Tensor, Tensor]:
        """-> context bool [B, attempts, h*w] without the targets, targets bool [B, attempts, M, h*w]."""
        spare = 0 if self.reference_quirks else 1

        def place(u: Tensor, box: tuple[int, int]) -> Tensor:
            starts = (max(1, grid.h - box[0] + spare), max(1, grid.w - box[1] + spare))
            return rectangles(u, box, grid, starts).flatten(-2)

        u = rng.rand(attempts, self.targets + 1, 2)
        target = place(u[:, :, :-1], size)
        return place(u[:, :, -1], frame) & ~target.any(2), target


@lru_cache(maxsize=256)
def context_places(masker: MultiBlock2D, size: tuple[int, int], frame: tuple[int, int], grid: Grid) -> int:
    """Places of a context to keep: the `keep_quantile` over 1,024 samples, in the bounds of what can be had."""
    contexts, _ = masker.draw(size, frame, grid, KeyedRNG(0, 0, torch.arange(1024)), 1)
    count = contexts[:, 0].sum(1).sort()[0]
    quantile = int(count[int(masker.keep_quantile * len(count))])
    return min(max(quantile, masker.least(grid)), grid.h * grid.w - size[0] * size[1])

"""Masks made of boxes: V-JEPA's multi-block masks, and I-JEPA's target blocks with a context block around
them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import torch
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor

from vidssl.config import Fraction, PositiveFloat, PositiveInt, Range
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.core.suggestions import divisors_near
from vidssl.model.grid import Grid, Mask
from vidssl.objective.schema import BlockGroup
from vidssl.objective.selection import indices_of, lowest_ids

# Draws of a sample's boxes; the first that leaves enough context is used. The number is fixed: every sample
# consumes equally many random numbers.
BOX_DRAWS = 8
QUANTILE_STEPS = 64  # box shapes from which kept_counts estimates its quantiles
QUANTILE_SAMPLES = 64  # samples for each shape
CONTEXT_QUANTILE_SAMPLES = 1024

LowQuantile = Annotated[float, Field(ge=0, lt=0.5)]


def draw_uniform(range_: tuple[float, float], rng: KeyedRNG) -> float:
    """Uniform in the range, the same for the whole step; if low == high, no random number is consumed."""
    low, high = range_
    return low + (high - low) * float(rng.shared(1)) if low < high else low


def box_size(area: int, aspect: float, grid: Grid) -> tuple[int, int]:
    """(height, width) in tokens of a box of about `area` tokens and height / width `aspect`, clipped to the
    grid."""
    height = round((area * aspect) ** 0.5)
    width = round((area / aspect) ** 0.5)
    return min(grid.h, max(1, height)), min(grid.w, max(1, width))


def interval_mask(u: Tensor, size: int, length: int, starts: int) -> Tensor:
    """bool [..., length]: an interval of `size` that begins at one of the first `starts` places; u [...] in
    [0, 1) chooses which."""
    start = (u * starts).long()[..., None]
    index = torch.arange(length, device=u.device)
    return (index >= start) & (index < start + size)


def rectangles(u: Tensor, size: tuple[int, int], grid: Grid, starts: tuple[int, int]) -> Tensor:
    """bool [..., h, w]: boxes of one size (height, width); u [..., 2] in [0, 1) chooses among `starts` (rows,
    columns)."""
    rows = interval_mask(u[..., 0], size[0], grid.h, starts[0])
    columns = interval_mask(u[..., 1], size[1], grid.w, starts[1])
    return rows[..., :, None] & columns[..., None, :]


def cut_groups(over: int | None, clips: int) -> int:
    """Number of groups of `over` clips in a global batch of `clips`, each cut to its smallest mask.

    over: None, or more than there are: the whole batch is one group. Raises UserError if it does not divide
    the batch.
    """
    if over is None or over >= clips:
        return 1
    if clips % over:
        raise UserError(
            f"method.mask.truncate_over {over}: does not divide the {clips} clips of a step; "
            f"give {divisors_near(clips, over)}"
        )
    return clips // over


@dataclass(frozen=True)
class MultiBlock3D:
    """Multi-block masks: the union of boxes is the target, the rest the context; one mask for each group.

    Source: V-JEPA (arXiv 2404.08471), section 3.2 and src/masks/multiblock3d.py. A box's shape is drawn once
    per step for the whole batch, its place for each sample; a sample whose boxes leave no context is drawn
    again.

    Unions differ in size, so the numbers of tokens must be made equal. `truncate`:
    - "random" (default): the kept numbers are fixed by the parameters and the grid (the `keep_quantile` of
      their distribution), surplus tokens are dropped at random over time and space; a sample with too few
      context tokens (that quantile of the samples) takes random hidden ones. Unbiased, and independent of the
      batch.
    - "raster": a quirk of the published runs. Every sample is cut to the smallest of `truncate_over` clips,
      in time-major order. This drops the end of the clip, the more the larger that number, which was the
      batch of a process.

    truncate_over: clips that are cut to a common size, every (batch / truncate_over)-th of the global batch,
    so that masks depend neither on the number of processes nor on micro-batches; it must divide the global
    batch. None, or more than there are: all clips of a step.
    """

    groups: Annotated[tuple[BlockGroup, ...], Field(min_length=1)] = (BlockGroup(8, 0.15), BlockGroup(2, 0.7))
    aspect: Range = (0.75, 1.5)  # height over width
    temporal_scale: Range = (1.0, 1.0)  # length of a box, as a fraction of the time slices
    max_temporal_keep: Fraction = (
        1.0  # fraction of the slices with context; later ones are hidden ("causal multi-block")
    )
    complement: bool = (
        False  # predict every token that is not context, dropped ones too (V-JEPA 2: full_complement)
    )
    truncate: Literal["random", "raster"] = "random"
    truncate_over: PositiveInt | None = None
    keep_quantile: LowQuantile = 0.05

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return [self._mask(group, grid, rng) for group in self.groups]

    @property
    def counts_vary(self) -> bool:
        """Whether the numbers of tokens differ from step to step."""
        return self.truncate == "raster"

    def cut_groups(self, clips: int) -> int:
        """Number of parts of a global batch of `clips` clips whose masks are cut together."""
        return cut_groups(self.truncate_over, clips) if self.truncate == "raster" else 1

    def _mask(self, group: BlockGroup, grid: Grid, rng: KeyedRNG) -> Mask:
        if self.truncate == "raster":
            wide, own = rng.over_group(self.cut_groups)
            hidden = self.hidden(group, grid, wide)
            num_context = int((~hidden).sum(1).min())
            num_targets = int(hidden.sum(1).min())
            score = hidden[own].float()  # 1: hidden
        else:
            num_context, num_targets = kept_counts(self, group, grid)
            score = self.hidden(group, grid, rng).float() + rng.rand(grid.n)
        beyond_context = (
            torch.arange(grid.n, device=score.device) >= self.context_slices(grid) * grid.h * grid.w
        )
        context = lowest_ids(score + beyond_context, num_context)
        score = score.scatter(1, context, -1.0)
        if self.complement:
            num_targets = grid.n - num_context
        target = lowest_ids(-score, num_targets)
        return Mask(context, target[:, None])

    def context_slices(self, grid: Grid) -> int:
        """Number of time slices that may contain context."""
        return max(1, int(grid.t * self.max_temporal_keep))

    def hidden(self, group: BlockGroup, grid: Grid, rng: KeyedRNG) -> Tensor:
        """bool [B, N]: the union of the boxes and the slices without context; at least one token is False,
        one True."""
        duration = min(grid.t, max(1, int(grid.t * draw_uniform(self.temporal_scale, rng))))
        size = box_size(int(grid.h * grid.w * group.scale), draw_uniform(self.aspect, rng), grid)
        starts = (grid.h - size[0] + 1, grid.w - size[1] + 1)
        u = rng.rand(BOX_DRAWS, group.blocks, 2)
        slices = 1 if duration == grid.t else grid.t  # boxes as long as the clip are drawn for one slice
        v = rng.rand(BOX_DRAWS, group.blocks) if slices > 1 else None
        first = min(slices, self.context_slices(grid)) * grid.h * grid.w
        if slices * grid.h * grid.w < 2:
            raise UserError("method.mask.kind: blocks cannot split a picture of one token; use a larger one")

        def union(draw: int) -> Tensor:
            boxes = rectangles(u[:, draw], size, grid, starts)  # bool [B, blocks, h, w]
            if v is None:
                return boxes.any(1).flatten(1)  # bool [B, h * w]
            interval = interval_mask(v[:, draw], duration, slices, slices - duration + 1)
            return (interval[..., None, None] & boxes[:, :, None]).any(1).flatten(1)  # bool [B, N]

        hidden = union(0)
        for draw in range(1, BOX_DRAWS):
            lacks_context = hidden[:, :first].all(1, keepdim=True)
            if not lacks_context.any():
                break
            hidden = torch.where(lacks_context, union(draw), hidden)
        # If no draw leaves a context, one random token is the context.
        fallback_token = rng.rand(first).argmax(1, keepdim=True)
        lacks_context = hidden[:, :first].all(1, keepdim=True)
        hidden = hidden.scatter(1, fallback_token, hidden.gather(1, fallback_token) & ~lacks_context)
        hidden = repeat(hidden, "b n -> b (t n)", t=grid.t // slices)
        hidden[:, self.context_slices(grid) * grid.h * grid.w :] = True
        return hidden


@lru_cache(maxsize=256)
def kept_counts(masker: MultiBlock3D, group: BlockGroup, grid: Grid) -> tuple[int, int]:
    """Numbers of (context, target) tokens to keep: the `keep_quantile` of each, over 64 box shapes x 64
    samples."""
    positions = torch.arange(QUANTILE_SAMPLES)
    hidden = [
        masker.hidden(group, grid, KeyedRNG(0, step, positions)).sum(1) for step in range(QUANTILE_STEPS)
    ]
    counts = torch.cat(hidden).sort()[0]
    index = int(masker.keep_quantile * len(counts))
    return grid.n - int(counts[len(counts) - 1 - index]), int(counts[index])


@dataclass(frozen=True)
class SingleBlock:
    """One box is the target, its complement the context. Source: I-JEPA (arXiv 2301.08243), table 6,
    "block"."""

    scale: PositiveFloat = 0.6  # fraction of a frame's area
    aspect: Range = (0.75, 1.5)  # height over width

    @property
    def counts_vary(self) -> bool:
        """Whether the shape of the box, and with it the number of tokens, is drawn in each step."""
        return self.aspect[0] < self.aspect[1]

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        group = BlockGroup(1, self.scale)
        hidden = MultiBlock3D((group,), self.aspect).hidden(group, grid, rng)
        count = int(hidden[0].sum())  # all boxes of a step have one size
        return [Mask(indices_of(~hidden, grid.n - count), indices_of(hidden, count)[:, None])]


@dataclass(frozen=True)
class MultiBlock2D:
    """Several target blocks, each a group of its own, and one large context block minus the targets.

    Source: I-JEPA (arXiv 2301.08243), section 3 and src/masks/multiblock.py. The sizes of the boxes are drawn
    once per step for the whole batch, their places for each sample; targets may overlap each other. On video
    the boxes extend through all of time. Where the context is too small, targets and context are drawn again
    (the reference draws only the context again, and finally lets it overlap targets); if all draws fail,
    every target becomes a copy of the first, and everything else is context.

    The number of context tokens must be the same in a batch: by default it is the `keep_quantile` of the
    numbers that the step's box sizes give, smaller ones are drawn again, and surplus tokens are dropped at
    random.

    `reference_quirks` keeps three quirks of the reference: one uniform number gives both scale and aspect; no
    box begins in the last possible row or column, or is as long as a side; every context is cut, in raster
    order, to the smallest of `truncate_over` clips (see MultiBlock3D), which was the batch of a process.
    """

    targets: PositiveInt = 4
    scale: Range = (0.15, 0.2)  # of a target block, fraction of the frame's area
    aspect: Range = (0.75, 1.5)  # of a target block, height over width
    context_scale: Range = (0.85, 1.0)  # of the context block, which is square
    min_keep: PositiveInt = 10  # contexts of min(min_keep, slice / 8) tokens or fewer, per slice, are redrawn
    keep_quantile: LowQuantile = 0.05
    reference_quirks: bool = False
    truncate_over: PositiveInt | None = None

    def cut_groups(self, clips: int) -> int:
        """Number of parts of a global batch of `clips` clips whose masks are cut together."""
        return cut_groups(self.truncate_over, clips) if self.reference_quirks else 1

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        slice_tokens = grid.h * grid.w
        if slice_tokens < 2:
            raise UserError(
                "method.mask.kind: multiblock_2d cannot split a picture of one token; use a larger one"
            )
        target_size = self._draw_size(self.scale, self.aspect, grid, rng)
        if target_size[0] * target_size[1] == slice_tokens:  # leave at least one row or column
            height, width = target_size
            target_size = (height - 1, width) if height > 1 else (height, width - 1)
        context_size = self._draw_size(self.context_scale, (1.0, 1.0), grid, rng)
        if self.reference_quirks:
            wide, own = rng.over_group(self.cut_groups)
            contexts, targets = self.draw_blocks(target_size, context_size, grid, wide, BOX_DRAWS)
            context, target = self._choose(contexts, targets, self.min_context(grid))
            num_context = int(context.sum(1).min())
            context = context[own]
            target = target[own]
        else:
            num_context = kept_context(self, target_size, context_size, grid)
            contexts, targets = self.draw_blocks(target_size, context_size, grid, rng, BOX_DRAWS)
            context, target = self._choose(contexts, targets, num_context)
        score = repeat(~context, "b n -> b (t n)", t=grid.t).float()
        if not self.reference_quirks:
            score = score + rng.rand(grid.n)
        ids = lowest_ids(score, num_context * grid.t)
        num_targets = target_size[0] * target_size[1] * grid.t
        return [Mask(ids, indices_of(repeat(target, "b m n -> b m (t n)", t=grid.t), num_targets))]

    @staticmethod
    def _choose(contexts: Tensor, targets: Tensor, min_context: int) -> tuple[Tensor, Tensor]:
        """The first draw of every sample with enough context: context bool [B, h*w], targets bool [B, M,
        h*w]."""
        enough = contexts.sum(2) >= min_context  # bool [B, draws]
        first = enough.int().argmax(1)
        sample = torch.arange(len(enough), device=enough.device)
        context = contexts[sample, first]
        target = targets[sample, first]
        never = ~enough.any(1)
        target = torch.where(never[:, None, None], target[:, :1], target)
        return torch.where(never[:, None], ~target[:, 0], context), target

    def _draw_size(
        self, scale: tuple[float, float], aspect: tuple[float, float], grid: Grid, rng: KeyedRNG
    ) -> tuple[int, int]:
        """(height, width) of a box, in tokens."""
        u = rng.shared(2).tolist()
        v = u[0] if self.reference_quirks else u[1]
        area = int(grid.h * grid.w * (scale[0] + u[0] * (scale[1] - scale[0])))
        height, width = box_size(area, aspect[0] + v * (aspect[1] - aspect[0]), grid)
        if self.reference_quirks:
            return min(height, max(1, grid.h - 1)), min(width, max(1, grid.w - 1))
        return height, width

    def min_context(self, grid: Grid) -> int:
        """The smallest number of context tokens per slice."""
        return min(self.min_keep, grid.h * grid.w // 8) + 1

    def draw_blocks(
        self,
        target_size: tuple[int, int],
        context_size: tuple[int, int],
        grid: Grid,
        rng: KeyedRNG,
        draws: int,
    ) -> tuple[Tensor, Tensor]:
        """Returns contexts bool [B, draws, h*w] without the targets, and targets bool [B, draws, M, h*w]."""
        extra_start = 0 if self.reference_quirks else 1

        def place(u: Tensor, size: tuple[int, int]) -> Tensor:
            starts = (max(1, grid.h - size[0] + extra_start), max(1, grid.w - size[1] + extra_start))
            return rearrange(rectangles(u, size, grid, starts), "... h w -> ... (h w)")

        u = rng.rand(draws, self.targets + 1, 2)
        targets = place(u[:, :, :-1], target_size)
        return place(u[:, :, -1], context_size) & ~targets.any(2), targets


@lru_cache(maxsize=256)
def kept_context(
    masker: MultiBlock2D, target_size: tuple[int, int], context_size: tuple[int, int], grid: Grid
) -> int:
    """Context tokens per slice to keep: the `keep_quantile` over 1,024 samples, within the possible range."""
    rng = KeyedRNG(0, 0, torch.arange(CONTEXT_QUANTILE_SAMPLES))
    contexts, _ = masker.draw_blocks(target_size, context_size, grid, rng, 1)
    counts = contexts[:, 0].sum(1).sort()[0]
    quantile = int(counts[int(masker.keep_quantile * len(counts))])
    return min(max(quantile, masker.min_context(grid)), grid.h * grid.w - target_size[0] * target_size[1])

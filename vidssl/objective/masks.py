"""Masks: which tokens the encoder is given and which are to be predicted.

A masker is called with (video, grid, draws) and returns a list of masks; a method with two mask kinds (V-JEPA) returns
two. All samples of a batch have equal counts, and every sample's mask is a function of its own key alone, save where a
mask says otherwise.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from vidssl.config import Count, Positive, Range, Share
from vidssl.draws import Draws
from vidssl.errors import UserError
from vidssl.model.grid import Grid, Mask


def split(score: Tensor, keep: int) -> Mask:
    """score [B, N]: the `keep` lowest are context, the rest one target group; ids ascend."""
    order = score.argsort(dim=1, stable=True)
    return Mask(order[:, :keep].sort(1)[0], order[:, keep:].sort(1)[0][:, None])


def hidden_count(n: int, ratio: float) -> int:
    """int(ratio * n), as VideoMAE counts; at least one token on each side, or an error."""
    hidden = int(ratio * n)
    if not 0 < hidden < n:
        raise UserError(f"method.mask.ratio: {ratio} of {n} tokens hides {hidden}; at least one must stay on each side")
    return hidden


@dataclass(frozen=True)
class Random:
    """Tokens hidden at random over time and space. Source: MAE-ST (arXiv 2205.09113), section 3."""

    ratio: Share = 0.9  # fraction of tokens hidden

    def __call__(self, video: Tensor, grid: Grid, draws: Draws) -> list[Mask]:
        return [split(draws.rand(grid.n), grid.n - hidden_count(grid.n, self.ratio))]


@dataclass(frozen=True)
class Tube:
    """The same places hidden in every time slice. Source: VideoMAE (arXiv 2203.12602), section 3.3."""

    ratio: Share = 0.9  # fraction of the places of a slice hidden

    def __call__(self, video: Tensor, grid: Grid, draws: Draws) -> list[Mask]:
        places = grid.h * grid.w
        rank = draws.rand(places).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        visible = places - hidden_count(places, self.ratio)
        return [split(rank.repeat(1, grid.t), visible * grid.t)]


@dataclass(frozen=True)
class Future:
    """Context in the past, target in the next slice of time: where the past ends is drawn once a step.

    What moves must be carried on, so unlike in the other masks the still background is the easy part.
    """

    visible: Share = 0.5  # fraction of the past's tokens that are context
    past: Count = 2  # fewest slices of the past

    def __call__(self, video: Tensor, grid: Grid, draws: Draws) -> list[Mask]:
        if not 1 <= self.past < grid.t:
            raise UserError(f"method.mask.past: {self.past} must lie in 1..{grid.t - 1}, the clip has {grid.t} slices")
        places = grid.h * grid.w
        now = self.past + int(draws.shared(1) * (grid.t - self.past))
        keep = max(1, round(self.visible * now * places))
        context = draws.rand(now * places).argsort(1)[:, :keep].sort(1)[0]
        target = torch.arange(now * places, (now + 1) * places, device=context.device)
        return [Mask(context, target.expand(len(context), 1, -1))]


class BlockGroup(NamedTuple):
    """`blocks` boxes, each over `scale` of a frame's area and the whole length of the clip; their union is hidden."""

    blocks: Count
    scale: Positive


@dataclass(frozen=True)
class Blocks:
    """Multi-block masks: the union of boxes is the target, the rest the context; one mask a group.

    Source: V-JEPA (arXiv 2404.08471), section 3.2 and src/masks/multiblock3d.py. A box's shape is drawn once a step
    for the whole batch, its place for each sample.

    Unions differ in size, so counts must be evened out. `truncate`:
    - "random" (default): the kept counts are fixed by the parameters and the grid (the `floor` quantile of the counts
      that the parameters give), what is over is dropped at random over time and space; a sample with too few context
      tokens (that quantile of them) takes random hidden ones. Unbiased, and independent of the batch.
    - "raster": every sample is cut to the smallest of the per-process batch, in time-major order, as the published
      runs do. It drops the end of the clip, the more the larger the per-process batch.
    """

    groups: Annotated[tuple[BlockGroup, ...], Field(min_length=1)] = (BlockGroup(8, 0.15), BlockGroup(2, 0.7))
    aspect: Range = (0.75, 1.5)  # height over width
    truncate: Literal["random", "raster"] = "random"
    floor: Annotated[float, Field(ge=0, lt=0.5)] = 0.05

    def __call__(self, video: Tensor, grid: Grid, draws: Draws) -> list[Mask]:
        return [self._mask(group, grid, draws) for group in self.groups]

    def _mask(self, group: BlockGroup, grid: Grid, draws: Draws) -> Mask:
        hidden = hidden_places(group, self.aspect, grid, draws).repeat(1, grid.t)  # bool [B, N]
        if self.truncate == "random":
            nc, nt = kept_counts(group, self.aspect, self.floor, grid)
            score = hidden + draws.rand(grid.n)
        else:
            nc, nt = int((~hidden).sum(1).min()), int(hidden.sum(1).min())
            score = hidden.float()
        forward = score.argsort(dim=1, stable=True)
        if self.truncate == "raster":  # the first nt hidden ones in raster order, not the last
            backward = (1 - score).argsort(dim=1, stable=True)
            return Mask(forward[:, :nc], backward[:, None, :nt])
        return Mask(forward[:, :nc].sort(1)[0], forward[:, -nt:].sort(1)[0][:, None])


# Drawings of a sample's boxes, of which the first that leaves a context is used; a fixed number, so that no sample
# shifts another's random numbers.
ATTEMPTS = 8


def hidden_places(group: BlockGroup, aspect: tuple[float, float], grid: Grid, draws: Draws) -> Tensor:
    """bool [B, h*w]: the union of the boxes of a slice; at least one place stays visible and one hidden."""
    ratio = aspect[0] + (aspect[1] - aspect[0]) * float(draws.shared(1))
    area = grid.h * grid.w * group.scale
    h = min(grid.h, max(1, round((area * ratio) ** 0.5)))
    w = min(grid.w, max(1, round((area / ratio) ** 0.5)))
    u = draws.rand(ATTEMPTS, group.blocks, 2)
    top, left = (u[..., 0] * (grid.h - h + 1)).long(), (u[..., 1] * (grid.w - w + 1)).long()
    y, x = torch.arange(grid.h, device=u.device), torch.arange(grid.w, device=u.device)
    rows = (y >= top[..., None]) & (y < top[..., None] + h)  # bool [B, ATTEMPTS, blocks, h]
    columns = (x >= left[..., None]) & (x < left[..., None] + w)
    union = (rows[..., :, None] & columns[..., None, :]).any(2).flatten(2)  # bool [B, ATTEMPTS, h*w]
    usable = (~union.all(2)).float()
    hidden = union.gather(1, usable.argmax(1)[:, None, None].expand(-1, 1, union.shape[2]))[:, 0]
    spare = draws.rand(grid.h * grid.w).argmax(1, keepdim=True)  # no drawing left a context: one place does
    return hidden.scatter(1, spare, hidden.gather(1, spare) & ~hidden.all(1, keepdim=True))


@lru_cache(maxsize=64)
def kept_counts(group: BlockGroup, aspect: tuple[float, float], floor: float, grid: Grid) -> tuple[int, int]:
    """(context, target) tokens to keep: the `floor` quantile of each, over 64 box shapes x 64 samples."""
    hidden = [hidden_places(group, aspect, grid, Draws(0, step, torch.arange(64))).sum(1) for step in range(64)]
    count = torch.cat(hidden).sort()[0]
    at = int(floor * len(count))
    places = grid.h * grid.w
    return (places - int(count[len(count) - 1 - at])) * grid.t, int(count[at]) * grid.t


MASKS = {"random": Random, "tube": Tube, "future": Future, "blocks": Blocks}

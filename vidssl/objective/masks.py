"""Masks: which tokens the encoder is given and which are to be predicted.

A masker is called with (video, grid, rng) and returns a list of masks; a method with two mask kinds (V-JEPA) returns
two. All samples of a batch have equal counts, and every sample's mask is a function of its own key alone, save where a
mask says otherwise. An image is a grid of one time slice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vidssl.config import Count, Share
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.objective.block_masks import MultiBlock2D, MultiBlock3D, SingleBlock, indices_of


def mask_from_scores(score: Tensor, keep: int) -> Mask:
    """score [B, N]: the `keep` lowest are context, the rest one target group; ids ascend."""
    order = score.argsort(dim=1, stable=True)
    return Mask(order[:, :keep].sort(1)[0], order[:, keep:].sort(1)[0][:, None])


def hidden_count(n: int, ratio: float, what: str) -> int:
    """int(ratio * n), as VideoMAE counts; at least one of `what` on each side, or an error."""
    hidden = int(ratio * n)
    if not 0 < hidden < n:
        raise UserError(
            f"method.mask.ratio: {ratio} of {n} {what} hides {hidden}; at least one must stay on each side"
        )
    return hidden


def random_ranks(rng: KeyedRNG, n: int) -> Tensor:
    """i64 [B, n]: a random order of n things for each sample."""
    return rng.rand(n).argsort(dim=1, stable=True).argsort(dim=1, stable=True)


@dataclass(frozen=True)
class Random:
    """Tokens hidden at random over time and space. Source: MAE-ST (arXiv 2205.09113), section 3."""

    ratio: Share = 0.9  # fraction of tokens hidden

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return [mask_from_scores(rng.rand(grid.n), grid.n - hidden_count(grid.n, self.ratio, "tokens"))]


@dataclass(frozen=True)
class Tube:
    """The same places hidden in every time slice. Source: VideoMAE (arXiv 2203.12602), section 3.3."""

    ratio: Share = 0.9  # fraction of the places of a slice hidden

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        places = grid.h * grid.w
        visible = places - hidden_count(places, self.ratio, "places")
        return [mask_from_scores(random_ranks(rng, places).repeat(1, grid.t), visible * grid.t)]


@dataclass(frozen=True)
class Frame:
    """Whole time slices hidden. Source: VideoMAE (arXiv 2203.12602), the ablation of masks, "frame": 7 of 8 slices."""

    ratio: Share = 0.875  # fraction of the slices hidden

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        places = grid.h * grid.w
        visible = grid.t - hidden_count(grid.t, self.ratio, "time slices")
        return [mask_from_scores(random_ranks(rng, grid.t).repeat_interleave(places, 1), visible * places)]


def past_slices(fewest: int, grid: Grid, rng: KeyedRNG) -> int:
    """How many slices are the past: `fewest` to all but one, drawn once a step."""
    if grid.t < 2:
        raise UserError("method.mask.kind: this mask needs a clip of two or more time slices, not an image")
    if not 1 <= fewest < grid.t:
        raise UserError(
            f"method.mask.past: {fewest} must lie in 1..{grid.t - 1}, the clip has {grid.t} slices"
        )
    return fewest + int(rng.shared(1) * (grid.t - fewest))


@dataclass(frozen=True)
class Future:
    """Context in the past, target in the next slice of time: where the past ends is drawn once a step.

    What moves must be carried on, so unlike in the other masks the still background is the easy part.
    """

    visible: Share = 0.5  # fraction of the past's tokens that are context
    past: Count = 2  # fewest slices of the past

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        places, now = grid.h * grid.w, past_slices(self.past, grid, rng)
        keep = max(1, round(self.visible * now * places))
        context = rng.rand(now * places).argsort(1)[:, :keep].sort(1)[0]
        target = torch.arange(now * places, (now + 1) * places, device=context.device)
        return [Mask(context, target.expand(len(context), 1, -1))]


@dataclass(frozen=True)
class Causal:
    """Context: all of the first slices; target: all later ones. Where the past ends is drawn once a step.

    Drawn, so that every length of past and future is met, and once a step, so that counts are equal in the global
    batch. (The causal masks of V-JEPA's ablation are `blocks` with `max_temporal_keep`.)
    """

    past: Count = 1  # fewest slices of the past

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        end = past_slices(self.past, grid, rng) * grid.h * grid.w
        ids = torch.arange(grid.n, device=rng.keys.device).expand(len(rng.keys), -1)
        return [Mask(ids[:, :end], ids[:, None, end:])]


@dataclass(frozen=True)
class Quadrants:
    """One quarter of the frame, through all of time, is the context, the others are three target groups.

    Source: I-JEPA (arXiv 2301.08243), table 6, "rasterized". The middle row or column of an odd side is left out, so
    that the quarters are alike.
    """

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        h, w = grid.h // 2, grid.w // 2
        if not h * w:
            raise UserError(f"method.mask.kind: quadrants need 2 x 2 places or more, not {grid.h} x {grid.w}")
        ids = torch.arange(grid.n, device=rng.keys.device).reshape(grid)
        corners = [ids[:, y : y + h, x : x + w].flatten() for y in (0, grid.h - h) for x in (0, grid.w - w)]
        first = (rng.rand(1) * 4).long()  # [B, 1]
        quarters = torch.stack(corners)[(first + torch.arange(4, device=ids.device)) % 4]  # i64 [B, 4, Nt]
        return [Mask(quarters[:, 0], quarters[:, 1:])]


def running_cell_maps(grid: Grid, ratio: float) -> Tensor:
    """bool [4, N], True = dropped from the decoder: the running cell from each of its four starts.

    A cell is 2 x 2 places, of which int(4 * ratio) are dropped; from slice to slice the dropped ones run on by one
    place of the cell, counted row by row. Cells cover the frame; what juts out of an odd one is cut.
    Source: VideoMAE V2 (arXiv 2303.16727), section 3, and dataset/masking_generator.py.
    """
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    turn = t + 1 + 2 * (y % 2) + x % 2  # the pointer moves on before the first slice
    return ((torch.arange(4)[:, None] + turn.flatten()) % 4) < int(4 * ratio)


def dual_mask(hidden: Tensor, dropped: Tensor) -> Mask:
    """hidden bool [B, N] from the encoder, dropped bool [B, N] from the decoder, as many in each sample -> Mask.

    Every token that is not dropped is decoded, those that the encoder saw too; they carry no loss (weight 0).
    """
    context = indices_of(~hidden, int((~hidden[0]).sum()))
    target = indices_of(~dropped, int((~dropped[0]).sum()))
    return Mask(context, target[:, None], hidden.gather(1, target).float()[:, None])


@dataclass(frozen=True)
class RunningCell:
    """Dual masking: a tube hides tokens from the encoder, a running cell drops tokens from the decoder.

    The loss counts the tokens that are hidden from the encoder and decoded. Where the cell starts is drawn for each
    sample. The four starts decode unequally many tokens of an odd frame: then all are cut to the fewest, at random,
    those without loss first. Source: VideoMAE V2 (arXiv 2303.16727), section 3.
    """

    ratio: Share = 0.9  # fraction of the places of a slice hidden from the encoder
    decode_ratio: Share = 0.5  # fraction of a cell dropped from the decoder, in whole quarters

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        if int(4 * self.decode_ratio) == 4:
            raise UserError(
                f"method.mask.decode_ratio: {self.decode_ratio} leaves nothing to decode; 0.75 is the most"
            )
        context = Tube(self.ratio)(video, grid, rng)[0].context
        maps = running_cell_maps(grid, self.decode_ratio).to(context.device)
        hidden = torch.ones(len(context), grid.n, dtype=torch.bool, device=context.device).scatter(
            1, context, False
        )
        turn = (
            (rng.rand(1) * 4).long() + torch.arange(4, device=context.device)
        ) % 4  # i64 [B, 4]: starts, in turn
        useful = (
            (hidden[:, None] & ~maps).any(2).gather(1, turn)
        )  # on tiny grids, a start may decode nothing hidden
        dropped = maps[turn.gather(1, useful.int().argmax(1, keepdim=True))[:, 0]]
        decoded = (~maps).sum(1)
        order = (2.0 * dropped + ~hidden + rng.rand(grid.n)).argsort(dim=1, stable=True)
        kept = order[:, : int(decoded[decoded > 0].min())]
        return [dual_mask(hidden, torch.ones_like(hidden).scatter(1, kept, False))]


MASKS = {
    "random": Random,
    "tube": Tube,
    "frame": Frame,
    "future": Future,
    "causal": Causal,
    "quadrants": Quadrants,
    "running_cell": RunningCell,
    "multiblock_3d": MultiBlock3D,
    "single_block": SingleBlock,
    "multiblock_2d": MultiBlock2D,
}

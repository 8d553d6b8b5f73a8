"""Masks: which tokens the encoder receives and which are predicted.

A masker is called with (video f32 [B, 3, T, H, W], grid, rng) and returns a list of masks; a method with two
kinds of masks (V-JEPA) returns two. All samples of a batch have the same numbers of tokens. A sample's mask
is a function of its own key and pixels alone; a masker whose `cut_groups` divides the global batch looks at
the keys of a group. One that keeps the same numbers of tokens in every step says `counts_vary = False`: what
is compiled is then made for them. An image is a grid of one time slice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vidssl.config import Fraction, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.objective.block_masks import MultiBlock2D, MultiBlock3D, SingleBlock
from vidssl.objective.corruption_masks import RandomBoxes, RandomRatios, Whole
from vidssl.objective.objective import Masker
from vidssl.objective.scored_mask import Scored
from vidssl.objective.selection import indices_of, lowest_ids, other_ids
from vidssl.objective.visible_masks import NextFrame, VisibleBox, VisibleBoxes


def mask_from_scores(score: Tensor, num_context: int) -> Mask:
    """Low scores are visible: the `num_context` lowest of score [B, N] are context, the rest one target
    group.

    Ids ascend.
    """
    context = lowest_ids(score, num_context)
    return Mask(context, other_ids(context, score.shape[1])[:, None])


def thin_targets(mask: Mask, fraction: float, rng: KeyedRNG) -> Mask:
    """The mask with a random `fraction` of each group's targets, rounded, at least one; context unchanged.

    The decoder's cost falls with it. Source: CrossMAE (arXiv 2401.14391), "partial reconstruction".
    """
    groups, num_targets = mask.target.shape[1:]
    kept = max(1, round(fraction * num_targets))
    if kept == num_targets:
        return mask
    index = lowest_ids(rng.rand(groups, num_targets).flatten(0, 1), kept).unflatten(0, (-1, groups))
    weight = None if mask.weight is None else mask.weight.gather(2, index)
    return Mask(mask.context, mask.target.gather(2, index), weight)


def needs_video(part: Any) -> bool:
    """Whether a masker or score looks at the pixels. It then draws on the device, in the forward pass;
    otherwise it gets a video without contents and draws on the host, while the device computes the step
    before."""
    return getattr(part, "needs_video", False)


def count_cut_groups(mask: Masker | None, clips: int) -> int:
    """Number of groups of a global batch of `clips` clips that a masker cuts to common numbers of tokens; one
    forward pass takes clips of one group. Raises UserError if they cannot be divided so."""
    cut_groups: Callable[[int], int] | None = getattr(mask, "cut_groups", None)
    return 1 if cut_groups is None else cut_groups(clips)


def hidden_count(n: int, ratio: float, unit: str) -> int:
    """int(ratio * n), as in VideoMAE. Raises UserError if all or none of the n would be hidden."""
    hidden = int(ratio * n)
    if not 0 < hidden < n:
        raise UserError(
            f"method.mask.ratio: {ratio} of {n} {unit} hides {hidden}; "
            "at least one must be hidden and one visible"
        )
    return hidden


def in_slices(slices: Tensor, places: Tensor, grid: Grid) -> Tensor:
    """i64 [B, S * P]: ids of the tokens at `places` i64 [B or 1, P] of `slices` i64 [B or 1, S]; both
    ascend."""
    ids = slices[:, :, None] * (grid.h * grid.w) + places[:, None]
    return rearrange(ids, "b s p -> b (s p)")


@dataclass(frozen=True)
class Random:
    """Tokens hidden at random over time and space. Source: MAE-ST (arXiv 2205.09113), section 3."""

    ratio: Fraction = 0.9  # fraction of tokens hidden

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return [mask_from_scores(rng.rand(grid.n), grid.n - hidden_count(grid.n, self.ratio, "tokens"))]


@dataclass(frozen=True)
class Tube:
    """The same places hidden in every time slice. Source: VideoMAE (arXiv 2203.12602), section 3.3."""

    ratio: Fraction = 0.9  # fraction of a slice's tokens hidden

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        slice_tokens = grid.h * grid.w
        visible = slice_tokens - hidden_count(slice_tokens, self.ratio, "places")
        places = lowest_ids(rng.rand(slice_tokens), visible)
        slices = torch.arange(grid.t, device=places.device)[None]
        hidden = other_ids(places, slice_tokens)
        return [Mask(in_slices(slices, places, grid), in_slices(slices, hidden, grid)[:, None])]


@dataclass(frozen=True)
class Frame:
    """Whole time slices hidden. Source: VideoMAE (arXiv 2203.12602), the ablation of masks, "frame": 7 of 8
    slices."""

    ratio: Fraction = 0.875  # fraction of the slices hidden

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        slice_tokens = grid.h * grid.w
        visible = grid.t - hidden_count(grid.t, self.ratio, "time slices")
        slices = lowest_ids(rng.rand(grid.t), visible)
        places = torch.arange(slice_tokens, device=slices.device)[None]
        hidden = other_ids(slices, grid.t)
        return [Mask(in_slices(slices, places, grid), in_slices(hidden, places, grid)[:, None])]


def draw_past(min_past: int, grid: Grid, rng: KeyedRNG) -> int:
    """Number of time slices in the past: `min_past` to all but one, drawn once per step."""
    if grid.t < 2:
        raise UserError("method.mask.kind: this mask needs a clip of two or more time slices, not an image")
    if not 1 <= min_past < grid.t:
        raise UserError(
            f"method.mask.past: {min_past} must lie in 1..{grid.t - 1}, the clip has {grid.t} slices"
        )
    return min_past + int(rng.shared(1) * (grid.t - min_past))


@dataclass(frozen=True)
class Future:
    """Context in the past, target in the next time slice; the length of the past is drawn once per step.

    The static background is easy to predict; moving parts must be extrapolated.
    """

    visible: Fraction = 0.5  # fraction of the past's tokens that are context
    past: PositiveInt = 2  # smallest number of slices in the past

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        slice_tokens = grid.h * grid.w
        past_tokens = draw_past(self.past, grid, rng) * slice_tokens
        num_context = max(1, round(self.visible * past_tokens))
        context = lowest_ids(rng.rand(past_tokens), num_context)
        target = torch.arange(past_tokens, past_tokens + slice_tokens, device=context.device)
        return [Mask(context, target.expand(len(context), 1, -1))]


@dataclass(frozen=True)
class Causal:
    """Context: all of the first slices; target: all later ones. The length of the past is drawn once per
    step.

    Drawing it makes every split occur; one draw per step keeps token counts equal. (The causal masks of
    V-JEPA's ablation are `multiblock_3d` with `max_temporal_keep`.)
    """

    past: PositiveInt = 1  # smallest number of slices in the past

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        past_tokens = draw_past(self.past, grid, rng) * grid.h * grid.w
        ids = torch.arange(grid.n, device=rng.keys.device).expand(len(rng.keys), -1)
        return [Mask(ids[:, :past_tokens], ids[:, None, past_tokens:])]


@dataclass(frozen=True)
class Quadrants:
    """One quarter of the frame, through all of time, is the context, the others are three target groups.

    Source: I-JEPA (arXiv 2301.08243), table 6, "rasterized". The middle row or column of an odd side is left
    out, so that the quarters have the same size.
    """

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        h, w = grid.h // 2, grid.w // 2
        if not h * w:
            raise UserError(f"method.mask.kind: quadrants need 2 x 2 places or more, not {grid.h} x {grid.w}")
        ids = torch.arange(grid.n, device=rng.keys.device).reshape(grid)
        corners = [ids[:, y : y + h, x : x + w].flatten() for y in (0, grid.h - h) for x in (0, grid.w - w)]
        quarters = torch.stack(corners)[random_rotation(rng)]  # i64 [B, 4, Nt]
        return [Mask(quarters[:, 0], quarters[:, 1:])]


def random_rotation(rng: KeyedRNG) -> Tensor:
    """i64 [B, 4]: 0, 1, 2, 3 from a random start, for each sample."""
    start = (rng.rand(1) * 4).long()
    return (start + torch.arange(4, device=start.device)) % 4


def running_cell_maps(grid: Grid, ratio: float) -> Tensor:
    """bool [4, N], True = dropped from the decoder: the running cell from each of its four starts.

    A cell is 2 x 2 tokens, of which int(4 * ratio) are dropped; from slice to slice the dropped ones advance
    by one place of the cell, counted row by row. Cells cover the frame; those at an odd edge are cut. Source:
    VideoMAE V2 (arXiv 2303.16727), section 3, and dataset/masking_generator.py.
    """
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    pointer = t + 1 + 2 * (y % 2) + x % 2  # it advances before the first slice
    return ((torch.arange(4)[:, None] + pointer.flatten()) % 4) < int(4 * ratio)


def dual_mask(hidden: Tensor, dropped: Tensor) -> Mask:
    """hidden bool [B, N]: not seen by the encoder; dropped bool [B, N]: not decoded; same counts in each
    sample.

    Every token that is not dropped is decoded; those that the encoder saw carry no loss (weight 0).
    """
    context = indices_of(~hidden, int((~hidden[0]).sum()))
    target = indices_of(~dropped, int((~dropped[0]).sum()))
    return Mask(context, target[:, None], hidden.gather(1, target).float()[:, None])


@dataclass(frozen=True)
class RunningCell:
    """Dual masking: a tube hides tokens from the encoder, a running cell drops tokens from the decoder.

    The loss counts the tokens that are hidden from the encoder and decoded. The start of the cell is drawn
    for each sample. In an odd frame the four starts decode different numbers of tokens: then all are cut to
    the smallest number, at random; tokens with zero loss weight are removed first. Source: VideoMAE V2 (arXiv
    2303.16727), section 3.
    """

    ratio: Fraction = 0.9  # fraction of a slice's tokens hidden from the encoder
    decoder_drop_ratio: Fraction = 0.5  # fraction of a cell dropped from the decoder, in whole quarters

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        if int(4 * self.decoder_drop_ratio) == 4:
            raise UserError(
                f"method.mask.decoder_drop_ratio: {self.decoder_drop_ratio} leaves nothing to decode; "
                "the largest value is 0.75"
            )
        context = Tube(self.ratio)(video, grid, rng)[0].context
        maps = running_cell_maps(grid, self.decoder_drop_ratio).to(context.device)
        hidden = torch.ones(len(context), grid.n, dtype=torch.bool, device=context.device)
        hidden = hidden.scatter(1, context, False)
        starts = random_rotation(rng)
        # On tiny grids a start may decode no hidden token: then the next start is used.
        has_loss = (hidden[:, None] & ~maps).any(2).gather(1, starts)
        dropped = maps[starts.gather(1, has_loss.int().argmax(1, keepdim=True))[:, 0]]
        decoded = (~maps).sum(1)
        kept = lowest_ids(2.0 * dropped + ~hidden + rng.rand(grid.n), int(decoded[decoded > 0].min()))
        return [dual_mask(hidden, torch.ones_like(hidden).scatter(1, kept, False))]


MASKS = {
    "random": Random,
    "random_ratios": RandomRatios,
    "tube": Tube,
    "frame": Frame,
    "future": Future,
    "causal": Causal,
    "quadrants": Quadrants,
    "running_cell": RunningCell,
    "multiblock_3d": MultiBlock3D,
    "single_block": SingleBlock,
    "multiblock_2d": MultiBlock2D,
    "visible_box": VisibleBox,
    "visible_boxes": VisibleBoxes,
    "next_frame": NextFrame,
    "scored": Scored,
    "boxes": RandomBoxes,
    "whole": Whole,
}

"""Masks of methods whose encoder sees all tokens, hidden ones corrupted (`method.corrupt`)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vidssl.config import Fraction, Range
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.objective.selection import lowest_ids, other_ids

# Boxes drawn for a sample. The number is fixed: every sample consumes equally many random numbers.
MAX_BOXES = 160


@dataclass(frozen=True)
class RandomBoxes:
    """Hides exactly `ratio` of the tokens: boxes of random size, shape, length and place, one after another;
    one that would hide nothing new, or too much, is left out.

    Source: MaskFeat (arXiv 2112.09133), section 3.2 and SlowFast's MaskingGenerator3D. That may stop short of
    the count (by 1.3 of 157 tokens on average); here random tokens are added, since all samples of a batch
    must hide equally many. On an image the boxes are those of BEiT (arXiv 2106.08254).
    """

    ratio: Fraction = 0.4  # fraction of the tokens that is hidden
    area: Range = (0.2, 1.0)  # of a box, as a fraction of the tokens of a slice
    aspect: Range = (0.3, 3.33)  # height over width, log-uniform
    predict: Literal["hidden", "all"] = "hidden"  # tokens that are targets

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        count = min(grid.n - 1, max(1, round(self.ratio * grid.n)))
        hidden = self.union(count, grid, rng)
        score = rng.rand(grid.n) + hidden  # hidden tokens have the highest scores
        context = lowest_ids(score, grid.n - count)
        if self.predict == "all":
            return [Mask(context, torch.arange(grid.n, device=score.device).expand(len(score), 1, -1))]
        return [Mask(context, other_ids(context, grid.n)[:, None])]

    def union(self, count: int, grid: Grid, rng: KeyedRNG) -> Tensor:
        """bool [B, N]: boxes of at most `count` tokens together."""
        u = rng.rand(6, MAX_BOXES)
        # the loop over boxes is one of small steps, which NumPy takes faster
        boxes = self.boxes(u.cpu().double().numpy(), grid)
        hidden = np.zeros((len(u), *grid), bool)
        for volume, sample in zip(hidden, boxes.tolist(), strict=True):
            missing = count
            for fits, top, left, first, bottom, right, last in sample:
                box = volume[first:last, top:bottom, left:right]
                new = box.size - int(np.count_nonzero(box))
                if fits and new <= missing:
                    box[...] = True
                    missing -= new
        return torch.from_numpy(hidden).flatten(1).to(u.device)

    def boxes(self, u: np.ndarray, grid: Grid) -> np.ndarray:
        """i64 [B, MAX_BOXES, 7]: whether a box fits, its upper, left and first token, and the ends of each;
        u float64 [B, 6, MAX_BOXES] in [0, 1)."""
        low, high = (share * grid.h * grid.w for share in self.area)
        area = low + u[:, 0] * (high - low)
        low, high = (math.log(ratio) for ratio in self.aspect)
        aspect = np.exp(low + u[:, 1] * (high - low))
        height = np.maximum(1, np.rint(np.sqrt(area * aspect)))
        width = np.maximum(1, np.rint(np.sqrt(area / aspect)))
        fits = (height < max(grid.h, 2)) & (width < max(grid.w, 2))
        # one that does not fit is left out, whatever its place
        size = np.stack(
            [np.minimum(height, grid.h), np.minimum(width, grid.w), 1 + np.floor(u[:, 2] * grid.t)]
        )
        room = np.array([grid.h, grid.w, grid.t])[:, None, None] - size + 1
        start = np.floor(u[:, 3:].swapaxes(0, 1) * room)
        return np.concatenate([fits[None], start, start + size]).astype(np.int64).transpose(1, 2, 0)


@dataclass(frozen=True)
class RandomRatios:
    """Several masks of a clip, each of tokens hidden at random with a ratio of its own. Source: UMD (arXiv
    2406.17688), where some clips are clean and others noised."""

    ratios: tuple[Fraction, ...] = (0.75, 0.375)  # fraction of tokens hidden, of each mask

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        masks = []
        for ratio in self.ratios:
            kept = int(grid.n * (1 - ratio))
            if not 0 < kept < grid.n:
                raise UserError(
                    f"method.mask.ratios: {ratio} of {grid.n} tokens hides {grid.n - kept}; at least one "
                    "must be hidden and one visible"
                )
            context = lowest_ids(rng.rand(grid.n), kept)
            masks.append(Mask(context, other_ids(context, grid.n)[:, None]))
        return masks


@dataclass(frozen=True)
class Whole:
    """Every token is context and target: nothing is hidden, all of the clip is corrupted (denoising
    autoencoder, colourisation)."""

    counts_vary = False

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        ids = torch.arange(grid.n, device=rng.keys.device).expand(len(rng.keys), -1)
        return [Mask(ids, ids[:, None])]

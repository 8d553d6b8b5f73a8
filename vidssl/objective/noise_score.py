"""Scores of filtered noise, which look at no pixels."""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from vidssl.config import PositiveFloat
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.model.vit import Encoder
from vidssl.objective.score_base import Score

DEVIATIONS = 3  # of a Gaussian filter, on each side


class ColorNoise(Score):
    """Noise filtered over the token grid. Source: ColorMAE (arXiv 2407.13036), section 3.

    With G(s) a Gaussian filter and (narrow, wide) = sigmas in tokens, the filter is red: G(wide), low
    frequencies; blue: 1 - G(narrow), high ones; green: G(narrow) - G(wide), middle ones; purple: 1 - green.
    The published patterns were filtered beforehand, with deviations that are not in the repository. On video
    the filter extends over time, too, or one map serves all time slices (per_slice).
    """

    needs_video = False

    def __init__(
        self,
        encoder: Encoder,
        color: Literal["green", "blue", "red", "purple"] = "green",
        sigmas: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0),
        same_in_time: bool = False,
    ):
        """sigmas: standard deviations of the narrow and the wide filter, in tokens; same_in_time: one map
        for all time slices."""
        super().__init__()
        if sigmas[0] >= sigmas[1]:
            raise UserError(f"method.score.sigmas {list(sigmas)}: give the smaller one first")
        self.color = color
        self.sigmas = sigmas
        self.same_in_time = same_in_time

    def forward(self, video: Tensor, grid: Grid, rng: KeyedRNG, encoder: Encoder) -> Tensor:
        drawn = Grid(1, grid.h, grid.w) if self.same_in_time else grid
        # An axis of one token is not filtered.
        radii = [radius(self.sigmas[1]) if n > 1 else 0 for n in drawn]
        noise = rng.rand(*(n + 2 * r for n, r in zip(drawn, radii, strict=True))) - 0.5
        # In float64 the order of the sums, which may depend on the batch, does not change the mask.
        scores = self._filter(noise.double(), drawn).flatten(1).float()
        return repeat(scores, "b n -> b (t n)", t=grid.n // drawn.n)

    def _filter(self, noise: Tensor, grid: Grid) -> Tensor:
        """f64 [B, t, h, w] of noise f64 that is wider on each side by the radius of the wide filter."""

        def apply(sigma: float) -> Tensor:
            x = noise
            for n in reversed(grid):
                # The last axis is filtered, and goes before the others.
                matrix = filter_matrix(n, sigma, radius(self.sigmas[1]), noise.device)
                x = rearrange((x[..., None, :] * matrix).sum(-1), "b t h w -> b w t h")
            return x

        narrow, wide = self.sigmas
        if self.color == "red":
            return apply(wide)
        band = apply(narrow) if self.color == "blue" else apply(narrow) - apply(wide)
        return band if self.color == "green" else apply(0.0) - band


def radius(sigma: float) -> int:
    """Width of one side of a Gaussian filter, in tokens."""
    return int(np.ceil(DEVIATIONS * sigma))


@lru_cache(maxsize=64)
def filter_matrix(n: int, sigma: float, margin: int, device: torch.device) -> Tensor:
    """f64 [n, n + 2 * margin]: a Gaussian filter of an axis with a margin on each side, which it removes;
    sigma 0: it does only that. [1, 1] for an axis of one token."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=device)
    distance = np.arange(n + 2 * margin) - np.arange(n)[:, None] - margin
    weights = (distance == 0) if sigma == 0 else np.exp(-0.5 * (distance / sigma) ** 2)
    weights = weights * (np.abs(distance) <= margin)
    matrix = weights / weights.sum(1, keepdims=True)
    with torch.inference_mode(False):
        return torch.tensor(matrix, dtype=torch.float64, device=device)

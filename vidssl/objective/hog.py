"""Histograms of oriented gradients as a target (MaskFeat)."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from vidssl.config import PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.suggestions import multiples_near
from vidssl.model.vit import Encoder
from vidssl.objective.target_base import Target


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients along (width, height) of images f32 [B, C, H, W], each of that shape: left minus right and
    upper minus lower, weighted 1, 2, 1 across, borders reflected."""
    # sums of slices, as a convolution would be rounded to bf16 under autocast
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    columns = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    rows = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return columns[..., :-2] - columns[..., 2:], rows[..., :-2, :] - rows[..., 2:, :]


def gradient_histograms(images: Tensor, bins: int, cell: int) -> Tensor:
    """f32 [B, C, bins, H / cell, W / cell]: for each cell of cell x cell pixels of images f32 [B, C, H, W]
    the gradient magnitudes summed by direction.

    Directions are unsigned, `bins` equal parts of [0, pi); a gradient counts in one bin only.
    """
    across, down = sobel(images)
    magnitude = torch.hypot(across, down)
    direction = (torch.atan2(across, down) / math.pi * bins).floor() % bins
    # a pass for each bin: a scatter would need memory for bins x pixels, and its sums vary on a GPU
    histograms = [
        reduce(magnitude * (direction == b), "b c (h y) (w x) -> b c h w", "sum", y=cell, x=cell)
        for b in range(bins)
    ]
    return torch.stack(histograms, 2)


def check_cell(encoder: Encoder, cell: int) -> None:
    """Raises UserError unless cells of cell x cell pixels divide the encoder's patches."""
    if encoder.patch % cell:
        raise UserError(
            f"method.target.cell: {cell} pixels do not divide model.patch {encoder.patch}: "
            f"give model.patch {multiples_near(encoder.patch, cell)}, or a cell that divides it"
        )


class Hog(Target):
    """Histograms of oriented gradients of the first frame of a token; K = 3 * bins * (patch / cell)**2, in
    (colour, bin, row of cells, column of cells) order.

    Source: MaskFeat (arXiv 2112.09133), section 3 and SlowFast's HOGLayerC: 9 unsigned bins, cells of 8
    pixels, every colour of the normalised input by itself, no blocks of cells, no interpolation between bins.
    norm: the histogram of every cell and colour has L2 norm 1 (False: sums of magnitudes).
    """

    def __init__(self, encoder: Encoder, bins: PositiveInt = 9, cell: PositiveInt = 8, norm: bool = True):
        """cell: side in pixels."""
        check_cell(encoder, cell)
        super().__init__(3 * bins * (encoder.patch // cell) ** 2)
        self.tubelet = encoder.tubelet
        self.cells = encoder.patch // cell
        self.cell = cell
        self.bins = bins
        self.norm = norm

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        frames = video[:, :, :: self.tubelet].float()
        images = rearrange(frames, "b c t h w -> (b t) c h w")
        histograms = gradient_histograms(images, self.bins, self.cell)
        if self.norm:
            histograms = F.normalize(histograms, dim=2)
        return rearrange(
            histograms,
            "(b t) c k (h y) (w x) -> b (t h w) (c k y x)",
            b=len(video),
            y=self.cells,
            x=self.cells,
        )

"""Scores of a box that follows what moves."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidssl.config import PositiveFloat
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, patchify
from vidssl.model.vit import Encoder
from vidssl.objective.score_base import Score

# of a token without motion, beside the mean of a clip's first slice: the box may start anywhere
STILL_CHANCE = 0.01


class MotionBox(Score):
    """Nearness to the centre of a box that follows what moves. For mask.rule=hide with per_slice, which
    hides the box: the tokens nearest to its centre, as many in each time slice.

    The first centre is drawn in proportion to the motion of the first slice; from slice to slice it goes to
    the mean place of the motion around it, and stays where there is none. After MGM (arXiv 2308.12962), which
    has no public code: there, too, the motion of the codec leads a box through time, but its exact rule is
    another.
    """

    def __init__(
        self,
        encoder: Encoder,
        of: Literal["differences", "vectors"] = "differences",
        reach: PositiveFloat = 0.25,
    ):
        """of: motion is the mean absolute difference between frames, or the length of the codec's motion
        vectors (data.motion_vectors). reach: deviation of the Gaussian around the centre within which motion
        counts, as a fraction of the frame's sides."""
        super().__init__()
        self.of = of
        self.needs_motion = of == "vectors"
        self.needs_video = not self.needs_motion
        self.reach = reach

    @torch.no_grad()
    def forward(self, video: Tensor, grid: Grid, rng: KeyedRNG, encoder: Encoder) -> Tensor:
        """video: with motion vectors those, [B, 2, T, h, w], in its place."""
        motion = vector_lengths(video, grid) if self.of == "vectors" else frame_changes(video, grid, encoder)
        return box_nearness(motion, rng.rand(grid.h * grid.w), self.reach).flatten(1)


def vector_lengths(vectors: Tensor, grid: Grid) -> Tensor:
    """f32 [B, t, h, w]: the mean length of motion vectors [B, 2, T, h', w'] in each token."""
    lengths = torch.linalg.vector_norm(vectors.float(), dim=1)
    return F.adaptive_avg_pool3d(lengths, (grid.t, grid.h, grid.w))


def frame_changes(video: Tensor, grid: Grid, encoder: Encoder) -> Tensor:
    """f32 [B, t, h, w]: the mean absolute difference of a token's frames [B, 3, T, H, W] to the frames
    before."""
    change = video.float().diff(dim=2, prepend=video[:, :, :1].float()).abs()
    tokens = patchify(change, video.shape[2] // grid.t, encoder.patch).flatten(2).mean(2)
    return rearrange(tokens, "b (t h w) -> b t h w", t=grid.t, h=grid.h)


def box_nearness(motion: Tensor, noise: Tensor, reach: float) -> Tensor:
    """f32 [B, t, h, w]: minus the distance of each token to the centre of the box in its slice, the larger of
    those along the two axes, in sides of the frame; motion f32 [B, t, h, w], noise uniform [B, h * w]."""
    height, width = motion.shape[2:]
    y, x = ((torch.arange(side, device=motion.device) + 0.5) / side for side in (height, width))
    first = motion[:, 0].flatten(1)
    chances = first + STILL_CHANCE * first.mean(1, keepdim=True) + torch.finfo(first.dtype).tiny
    # the first of exponential clocks whose rates are the chances
    start = (torch.log(-torch.log1p(-noise)) - chances.log()).argmin(1)
    centre_y = y[start // width]
    centre_x = x[start % width]
    nearness = []
    for weights in motion.unbind(1):
        near_y, near_x = (
            torch.exp(-0.5 * ((axis - centre[:, None]) / reach) ** 2)
            for axis, centre in ((y, centre_y), (x, centre_x))
        )
        weights = weights * near_y[:, :, None] * near_x[:, None]
        total = weights.sum((1, 2))
        moves = total > torch.finfo(total.dtype).eps
        total = total.clamp_min(torch.finfo(total.dtype).eps)
        centre_y = torch.where(moves, (weights.sum(2) * y).sum(1) / total, centre_y)
        centre_x = torch.where(moves, (weights.sum(1) * x).sum(1) / total, centre_x)
        away_y = (y - centre_y[:, None]).abs()
        away_x = (x - centre_x[:, None]).abs()
        nearness.append(-torch.maximum(away_y[:, :, None], away_x[:, None]))
    return torch.stack(nearness, 1)

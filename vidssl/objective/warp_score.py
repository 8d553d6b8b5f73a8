"""Scores that move through the clip with its contents."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from vidssl.config import Fraction
from vidssl.core.constants import constant
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.model.vit import Encoder
from vidssl.objective.given_network import GivenNetwork
from vidssl.objective.motion import block_motion
from vidssl.objective.score_base import Score
from vidssl.objective.selection import lowest_ids

MAX_MOVE = 4  # of matched patches between two frames along each axis, in pixels


class Warp(Score):
    """A map of Gaussians around random places of the middle frame, warped to the other frames by optical
    flow and added up over the pixels of each token. For mask.rule=show with per_slice.

    Source: MGMAE (arXiv 2308.10794), section 3.2, and engine_for_mgmae.py.
    """

    def __init__(self, encoder: Encoder, flow: str, ratio: Fraction = 0.9, as_published: bool = True):
        """flow: a file (torch.export .pt2, or TorchScript) of a network that maps two f32 [n, 3, H, W] in
        [-1, 1] to the flow from first to second, [n, 2, H, W], (x, y) in pixels (MGMAE: RAFT-small), or
        "blocks", with which patches are matched. ratio: fraction of the places without a Gaussian.
        as_published: frames before the middle are warped by the flow of the opposite direction, and
        displacements are 1 / side too short; False: neither."""
        super().__init__()
        self._network = None if flow == "blocks" else GivenNetwork(flow, "method.score.flow")
        self.patch = encoder.patch
        self.ratio = ratio
        self.as_published = as_published

    @torch.no_grad()
    def forward(self, video: Tensor, grid: Grid, rng: KeyedRNG, encoder: Encoder) -> Tensor:
        places = grid.h * grid.w
        chosen = lowest_ids(rng.rand(places), places - int(self.ratio * places))
        first = gaussian_map(chosen.to(video.device), grid, encoder.patch)
        mean, std = channel_statistics(video)
        frames = (2 * (video.float() * std + mean) - 1).unbind(2)
        maps = warp_from_middle(
            first, len(frames), lambda a, b: self._flow(frames[a], frames[b]), self.as_published
        )
        return reduce(maps, "b (t u) (h p) (w q) -> b (t h w)", "sum", t=grid.t, h=grid.h, w=grid.w)

    def _flow(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow f32 [B, 2, H, W] from frames `first` f32 [B, 3, H, W] in [-1, 1] to `second`."""
        if self._network is None:
            grey, grey_second = (frame.mean(1, keepdim=True) for frame in (first, second))
            moves = block_motion(grey, grey_second, self.patch, MAX_MOVE)
            return repeat(moves, "b xy h w -> b xy (h p) (w q)", p=self.patch, q=self.patch)
        flow = self._network(first, second)
        expected = (len(first), 2, *first.shape[2:])
        if flow.shape != expected:
            raise UserError(
                f"method.score.flow: the network gives {list(flow.shape)} for two {list(first.shape)}; "
                f"it must give {list(expected)}"
            )
        return flow


def gaussian_map(places: Tensor, grid: Grid, patch: int) -> Tensor:
    """f32 [B, H, W]: the largest of the Gaussians exp(-(distance / patch)**2) around the centres of places
    i64 [B, k] at each pixel, scaled so that a map's largest value is 1."""

    def along(index: Tensor, side: int) -> Tensor:
        centres = index * patch + (patch - 1) / 2
        pixels = torch.arange(side, device=index.device)
        return torch.exp(-(((pixels - centres[..., None]) / patch) ** 2))  # [B, k, side]

    rows = along(places // grid.w, grid.h * patch)
    columns = along(places % grid.w, grid.w * patch)
    largest = rows[:, 0, :, None] * columns[:, 0, None]
    for y, x in zip(rows.unbind(1), columns.unbind(1), strict=True):  # one by one, to save memory
        largest = torch.maximum(largest, y[:, :, None] * x[:, None])
    return largest / largest.amax((1, 2), keepdim=True)


def warp_from_middle(
    first: Tensor, frames: int, flow: Callable[[int, int], Tensor], as_published: bool
) -> Tensor:
    """f32 [B, T, H, W]: the map `first` [B, H, W] of frame T // 2, warped frame by frame to all others.

    flow: maps the indices of two frames to the flow from one to the other, f32 [B, 2, H, W]. Where nothing
    of the map arrives, `first` stays.
    """
    middle = frames // 2
    maps = {middle: first}
    for frame in (*reversed(range(middle)), *range(middle + 1, frames)):
        before = frame + 1 if frame < middle else frame - 1
        is_swapped = as_published and frame < middle
        moved = warp(maps[before], flow(before, frame) if is_swapped else flow(frame, before), as_published)
        maps[frame] = torch.where(moved == 0, first, moved)
    return torch.stack([maps[frame] for frame in range(frames)], 1)


def warp(image: Tensor, flow: Tensor, as_published: bool) -> Tensor:
    """f32 [B, H, W]: at each pixel the value of `image` [B, H, W] where the flow f32 [B, 2, H, W] from that
    pixel, (x, y) in pixels, leads; 0 outside. as_published: see Warp."""
    height, width = image.shape[1:]
    y, x = (torch.linspace(-1, 1, side, device=image.device) for side in (height, width))
    own = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)
    less = 0 if as_published else 1
    half = constant(((width - less) / 2, (height - less) / 2), image.device)
    place = own + rearrange(flow.float(), "b xy h w -> b h w xy") / half
    return F.grid_sample(image[:, None], place, padding_mode="zeros", align_corners=True)[:, 0]

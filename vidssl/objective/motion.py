"""Motion as a target: differences of frames, and displacements of cells of pixels.

Displacements are data-only stand-ins for the trajectories of MME (masked motion encoding, arXiv 2210.06096),
which follow the flow of a network over more frames than the encoder sees: here blocks are matched between the
frames of the clip, or the user gives the flow network.
"""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from vidssl.config import PositiveInt
from vidssl.core.constants import constant
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.model.grid import patchify
from vidssl.model.vit import Encoder
from vidssl.objective.given_network import GivenNetwork
from vidssl.objective.hog import Hog, check_cell
from vidssl.objective.target_base import Target


class FrameDifference(Target):
    """Last frame of a token minus its first one, in normalised pixels; K = 3 * patch * patch."""

    def __init__(self, encoder: Encoder):
        if encoder.tubelet < 2:
            raise UserError("method.target.kind frame_difference: give model.tubelet 2 or more")
        super().__init__(3 * encoder.patch**2)
        self.tubelet = encoder.tubelet
        self.patch = encoder.patch

    def check_clip(self, frames: int, size: int) -> None:
        check_has_motion("frame_difference", frames)

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        patches = patchify(video.float(), self.tubelet, self.patch)
        return rearrange(patches[:, :, :, -1] - patches[:, :, :, 0], "b n c p q -> b n (p q c)")


def check_has_motion(kind: str, frames: int) -> None:
    """Raises UserError if a clip is a single frame."""
    if frames < 2:
        raise UserError(f"method.target.kind {kind}: nothing moves in a stream of one frame; leave it out")


def block_motion(first: Tensor, second: Tensor, cell: int, radius: int) -> Tensor:
    """f32 [n, 2, H / cell, W / cell]: how far each cell of `first` f32 [n, C, H, W] has moved in `second`,
    (x, y) in pixels.

    Block matching: of all whole displacements up to `radius` along each axis the one with the smallest mean
    absolute difference; of equal ones the shortest, so that a flat cell does not move. Borders are repeated.
    """
    height, width = first.shape[-2:]
    padded = F.pad(second, (radius,) * 4, mode="replicate")
    span = range(-radius, radius + 1)
    shortest_first = sorted(product(span, span), key=lambda move: move[0] ** 2 + move[1] ** 2)
    least: Tensor | None = None
    for index, (x, y) in enumerate(shortest_first):
        moved = padded[..., radius + y : radius + y + height, radius + x : radius + x + width]
        cost = reduce((first - moved).abs(), "n c (h p) (w q) -> n h w", "mean", p=cell, q=cell)
        if least is None:
            least = cost
            chosen = torch.zeros_like(cost, dtype=torch.int64)
            continue
        chosen = torch.where(cost < least, index, chosen)
        least = torch.minimum(cost, least)
    moves = constant(tuple(float(c) for move in shortest_first for c in move), first.device).view(-1, 2)
    return rearrange(moves[chosen], "n h w xy -> n xy h w")


def frames_at(video: Tensor, indices: Sequence[int]) -> Tensor:
    """[B * n, C, H, W]: the frames `indices` of video [B, C, T, H, W]."""
    chosen = video.index_select(2, constant(tuple(indices), video.device, torch.int64))
    return rearrange(chosen, "b c t h w -> (b t) c h w")


class Motion(Target):
    """Displacement of every cell of a token's first frame over the next frames, K = 2 * steps *
    (patch / cell)**2, in (step, x or y, row, column) order, in sides of a cell.

    Each step is followed from where the last one ended. Features have 2 K entries, for method.error.kind
    weighted_l2: displacements, then weights, 0 where a track has left the frame or the clip has ended.
    """

    weighted = True

    def __init__(
        self,
        encoder: Encoder,
        steps: PositiveInt = 1,
        cell: PositiveInt = 8,
        radius: PositiveInt = 4,
        flow: str | None = None,
    ):
        """steps: frames that a cell is followed; cell: side in pixels; radius: of the search of block
        matching, in pixels; flow: instead of block matching, a file (torch.export .pt2, or TorchScript) of a
        network that maps two f32 [n, 3, H, W] in [-1, 1] to the flow from first to second, [n, 2, H, W],
        (x, y) in pixels."""
        check_cell(encoder, cell)
        self.cells = encoder.patch // cell
        super().__init__(2 * steps * self.cells**2)
        self.tubelet = encoder.tubelet
        self.steps = steps
        self.cell = cell
        self.radius = radius
        self._flow = None if flow is None else GivenNetwork(flow, "method.target.flow")

    def check_clip(self, frames: int, size: int) -> None:
        check_has_motion("motion", frames)

    def motion_between(self, first: Tensor, second: Tensor) -> Tensor:
        """[n, 2, h, w] in pixels, (x, y), at any resolution; frames f32 [n, 3, H, W] normalised."""
        if self._flow is None:
            return block_motion(
                first.mean(1, keepdim=True), second.mean(1, keepdim=True), self.cell, self.radius
            )
        mean, std = (value[..., 0] for value in channel_statistics(first))
        return self._flow(*(((frames * std + mean) * 2 - 1) for frames in (first, second)))

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        moves, valid = self.track(video.float())
        weights = valid.expand_as(moves) / self.width
        return torch.cat([self._by_token(x, len(video)) for x in (moves / self.cell, weights)], -1)

    def _by_token(self, x: Tensor, batch: int) -> Tensor:
        """x [steps, B * t, 2, rows, columns] of cells to [B, N, K]."""
        pattern = "s (b t) xy (h p) (w q) -> b (t h w) (s xy p q)"
        return rearrange(x, pattern, b=batch, p=self.cells, q=self.cells)

    def track(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Follows the cells of the first frame of every token.

        Returns the displacements of each step in pixels, f32 [steps, B * t, 2, H / cell, W / cell], and
        whether they exist, f32 [steps, B * t, 1, H / cell, W / cell].
        """
        batch, _, count, height, width = video.shape
        starts = range(0, count, self.tubelet)
        centres = self._centres(height, width, video.device)
        position = repeat(centres, "h w xy -> n h w xy", n=batch * len(starts))
        size = constant((float(width), float(height)), video.device)
        inside = torch.ones_like(position[..., :1])
        moves = []
        valid = []
        for step in range(self.steps):
            first, second = (
                frames_at(video, [min(start + offset, count - 1) for start in starts])
                for offset in (step, step + 1)
            )
            flow = self.motion_between(first, second)
            sampled = F.grid_sample(flow, 2 * position / size - 1, padding_mode="border", align_corners=False)
            move = rearrange(sampled, "n xy h w -> n h w xy")
            inside = inside * move.isfinite().all(-1, keepdim=True)
            move = move.nan_to_num(0.0, 0.0, 0.0)
            position = position + move
            inside = inside * ((position >= 0) & (position <= size)).all(-1, keepdim=True)
            exists = constant(tuple(float(start + step + 1 < count) for start in starts), video.device)
            moves.append(move)
            valid.append(inside * repeat(exists, "t -> (b t) 1 1 1", b=batch))
        axes = "s n h w xy -> s n xy h w"
        return rearrange(moves, axes), rearrange(valid, axes)

    def _centres(self, height: int, width: int, device: torch.device) -> Tensor:
        """f32 [H / cell, W / cell, 2]: (x, y) of the centre of each cell, in pixels."""
        y, x = (
            (torch.arange(side // self.cell, device=device) + 0.5) * self.cell for side in (height, width)
        )
        return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)


class HogMotion(Target):
    """Histograms of oriented gradients and displacements, each with half of the loss.

    As MME (see the head of this module) joins them: K is the sum of both; two heads of a predictor are the
    rows of its last layer. Features have 2 K entries, for method.error.kind weighted_l2.
    """

    weighted = True

    def __init__(
        self,
        encoder: Encoder,
        steps: PositiveInt = 1,
        cell: PositiveInt = 8,
        radius: PositiveInt = 4,
        flow: str | None = None,
        norm: bool = True,
    ):
        """cell: of the histograms too; norm: of the histograms, without which (MME) they outweigh the motion
        by far; for the others see Motion."""
        hog = Hog(encoder, cell=cell, norm=norm)
        motion = Motion(encoder, steps, cell, radius, flow)
        super().__init__(hog.width + motion.width)
        self.hog = hog
        self.motion = motion

    def check_clip(self, frames: int, size: int) -> None:
        self.motion.check_clip(frames, size)

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        histograms = self.hog(video)
        moves, weights = self.motion(video).chunk(2, -1)
        even = torch.full_like(histograms, 1 / self.hog.width)
        return torch.cat([histograms, moves, even / 2, weights / 2], -1)

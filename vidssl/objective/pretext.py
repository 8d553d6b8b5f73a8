"""The third formula: naming a transformation of the clip.

loss = cross_entropy( linear( mean over tokens of encoder(transform(video)) ), which transformation it was )

The transformation of a clip is drawn from its key, so its class is a function of (seed, position). Baselines
of the years 2016 to 2020: they learn whatever tells the classes apart, wanted or not. What each is fooled by
stands in its docstring; cheap remedies are built in, the others are up to the data.
"""

from collections.abc import Callable
from itertools import permutations
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from vidssl.config import Fraction, PositiveInt
from vidssl.core.constants import constant
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import Encoder, init_weights
from vidssl.objective.objective import Masks, Objective
from vidssl.objective.pretext_frames import paced_length, piece_length

Pieces = Annotated[int, Field(ge=2, le=5)]


class Transformed(NamedTuple):
    """Clips and what was done to them."""

    video: Tensor  # f32 [B, 3, T', H, W]
    label: Tensor  # i64 [B], number of the transformation


class Pretext(Objective):
    """Base of all: encodes transformed clips and classifies the mean of their tokens. Logs the accuracy
    beside that of guessing, `chance`."""

    reads_levels = False

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder = encoder
        self.classes = classes
        self.head = nn.Linear(encoder.dim, classes)
        init_weights(self.head, "trunc_normal")

    def check_clip(self, frames: int, size: int) -> None:
        """Raises UserError if a clip of so many frames of size x size pixels cannot be transformed."""

    def transform(self, video: Tensor, rng: KeyedRNG) -> Transformed:
        """video f32 [B, 3, T, H, W], normalised; the transformation of each clip is drawn from rng."""
        raise NotImplementedError

    def forward(self, video: Tensor, rng: KeyedRNG, masks: Masks = None) -> dict[str, Tensor]:
        with torch.no_grad():
            views, label = self.transform(video, rng)
        logits = self.head(self.encoder(views, rng=rng).mean(1)).float()
        accuracy = (logits.argmax(1) == label).float().mean()
        chance = torch.full_like(accuracy, 1 / self.classes)
        return {"loss": F.cross_entropy(logits, label), "accuracy": accuracy, "chance": chance}


def draw_class(classes: int, rng: KeyedRNG) -> Tensor:
    """i64 [B]: uniform below `classes`."""
    return (rng.rand(1)[:, 0] * classes).long()


def permuted(parts: Tensor, order: Tensor) -> Tensor:
    """parts [B, P, ...] in the order i64 [B, P] of each clip."""
    index = order.reshape(*order.shape, *[1] * (parts.ndim - 2)).expand_as(parts)
    return parts.gather(1, index)


def crop_apart(parts: Tensor, scale: float, rng: KeyedRNG) -> Tensor:
    """parts [B, P, 3, T, H, W]: of each part a window of `scale` times its sides at a random place, the same
    in all frames, resized to H x W. So edges do not go on from part to part."""
    if scale == 1:
        return parts
    height, width = parts.shape[-2:]
    corner = rng.rand(parts.shape[1], 2).flatten(0, 1) * 2 - 1  # f32 [B * P, 2] in [-1, 1): (x, y)
    axes = [torch.arange(n, device=parts.device) for n in (width, height)]
    x, y = ((2 * axis + 1) / len(axis) - 1 for axis in axes)
    window = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)
    where = scale * window + (1 - scale) * corner[:, None, None]
    images = rearrange(parts, "b p c t h w -> (b p) (c t) h w")
    cropped = F.grid_sample(images, where, padding_mode="border", align_corners=False)
    return cropped.reshape(parts.shape)


class PieceOrder(Pretext):
    """In which order the pieces of the clip are shown: pieces! classes.

    Source: Shuffle and Learn (arXiv 1603.08561), OPN (1708.01246), video clip order prediction (CVPR 2019);
    here the pieces are one clip to the encoder, not clips of their own. Fooled by what drifts: codec
    artefacts, fades, exposure. Gaps between the pieces are drawn for each clip, and each piece has a crop of
    its own, so that neither a seam's distance nor its edges tell the order.
    """

    def __init__(self, encoder: Encoder, pieces: Pieces = 3, crop: Fraction = 0.875, both_ways: bool = True):
        """pieces: their number, together at most three quarters of the clip; crop: sides of a piece's crop
        as a fraction of the frame's; both_ways: an order and its reverse are two classes (OPN: one)."""
        orders = [p for p in permutations(range(pieces)) if both_ways or p[0] < p[-1]]
        super().__init__(encoder, len(orders))
        self.orders = orders
        self.pieces = pieces
        self.crop = crop
        self.both_ways = both_ways

    def check_clip(self, frames: int, size: int) -> None:
        piece_length(frames, self.pieces, self.encoder.tubelet)

    def transform(self, video: Tensor, rng: KeyedRNG) -> Transformed:
        label = draw_class(self.classes, rng)
        orders = constant(tuple(i for order in self.orders for i in order), video.device, torch.int64)
        order = orders.view(-1, self.pieces)[label]
        if not self.both_ways:
            order = torch.where(rng.rand(1) < 0.5, order, order.flip(1))
        length = piece_length(video.shape[2], self.pieces, self.encoder.tubelet)
        spare = video.shape[2] - self.pieces * length
        # ascending places among the spare frames: the gaps before each piece, and after the last
        gaps = (rng.rand(self.pieces).sort(1)[0] * (spare + 1)).long()
        starts = torch.arange(self.pieces, device=video.device) * length + gaps
        frames = starts[:, :, None] + torch.arange(length, device=video.device)
        index = frames.flatten(1)[:, None, :, None, None].expand(-1, 3, -1, *video.shape[-2:])
        parts = rearrange(video.gather(2, index), "b c (p t) h w -> b p c t h w", p=self.pieces)
        shown = permuted(crop_apart(parts, self.crop, rng), order)
        return Transformed(rearrange(shown, "b p c t h w -> b c (p t) h w"), label)


class Arrow(Pretext):
    """Whether the clip runs backwards: 2 classes.

    Source: Pickup et al. (CVPR 2014), Wei et al. (CVPR 2018). Fooled by black borders that move, camera zoom
    and codec artefacts, all of which have a direction in time; data_prep's filters and re-encoding help.
    """

    def __init__(self, encoder: Encoder):
        super().__init__(encoder, 2)

    def check_clip(self, frames: int, size: int) -> None:
        if frames < 2:
            raise UserError("method.pretext.kind arrow: a stream of one frame has no direction; leave it out")

    def transform(self, video: Tensor, rng: KeyedRNG) -> Transformed:
        label = draw_class(2, rng)
        backwards = (label == 1)[:, None, None, None, None]
        return Transformed(torch.where(backwards, video.flip(2), video), label)


class Pace(Pretext):
    """How fast the clip runs: every n-th frame of it, n one of `paces`.

    Source: Wang et al. (arXiv 2008.05861), SpeedNet (2004.06130). Fooled by motion blur and by the frame
    rate of the source; every clip has a crop of its own. The clip of the data is as long as the fastest pace
    needs: the model's has data.frames / the largest of `paces`.
    """

    def __init__(self, encoder: Encoder, paces: tuple[PositiveInt, ...] = (1, 2, 4), crop: Fraction = 0.875):
        """crop: sides of the random crop as a fraction of the frame's."""
        super().__init__(encoder, len(paces))
        self.paces = paces
        self.crop = crop

    def check_clip(self, frames: int, size: int) -> None:
        paced_length(frames, self.paces, self.encoder.tubelet)

    def transform(self, video: Tensor, rng: KeyedRNG) -> Transformed:
        label = draw_class(self.classes, rng)
        pace = constant(self.paces, video.device, torch.int64)[label][:, None]
        length = paced_length(video.shape[2], self.paces, self.encoder.tubelet)
        starts = video.shape[2] - (length - 1) * pace
        first = (rng.rand(1) * starts).long()
        frames = first + pace * torch.arange(length, device=video.device)
        index = frames[:, None, :, None, None].expand(-1, 3, -1, *video.shape[-2:])
        return Transformed(crop_apart(video.gather(2, index)[:, None], self.crop, rng)[:, 0], label)


class FrameRotation(Pretext):
    """By how many quarter turns all frames are rotated: 4 classes.

    Source: RotNet (arXiv 1803.07728), 3D-RotNet (1811.11387). Fooled by watermarks and captions, and by the
    corners of padding, whose place tells the turn.
    """

    def __init__(self, encoder: Encoder):
        super().__init__(encoder, 4)

    def transform(self, video: Tensor, rng: KeyedRNG) -> Transformed:
        label = draw_class(4, rng)
        turned = video
        for turns in (1, 2, 3):
            chosen = (label == turns)[:, None, None, None, None]
            turned = torch.where(chosen, video.rot90(turns, (3, 4)), turned)
        return Transformed(turned, label)


class Jigsaw(Pretext):
    """Which permutation of the four quarters of all frames: 24 classes.

    Source: Noroozi and Favaro (arXiv 1603.09246), space-time cubic puzzles (1811.09795); here the quarters
    are one clip to the encoder. Fooled by edges that go on across a seam, by chromatic aberration and by the
    brightness of a quarter: each is a random crop of its quarter, and its colours are normalised apart.
    """

    def __init__(self, encoder: Encoder, crop: Fraction = 0.8, norm: bool = True):
        """crop: sides of a quarter's crop as a fraction of its own; norm: each quarter's colours have mean 0
        and deviation 1."""
        super().__init__(encoder, 24)
        self.crop = crop
        self.norm = norm

    def check_clip(self, frames: int, size: int) -> None:
        if size % 2:
            raise UserError(
                f"method.pretext.kind jigsaw: frames of {size} pixels have no quarters; give an even size"
            )

    def transform(self, video: Tensor, rng: KeyedRNG) -> Transformed:
        label = draw_class(self.classes, rng)
        orders = constant(tuple(i for p in permutations(range(4)) for i in p), video.device, torch.int64)
        quarters = rearrange(video, "b c t (r h) (s w) -> b (r s) c t h w", r=2, s=2)
        quarters = crop_apart(quarters, self.crop, rng)
        if self.norm:
            centred = quarters - quarters.mean((3, 4, 5), keepdim=True)
            quarters = centred / (centred.square().mean((3, 4, 5), keepdim=True) + 1e-6).sqrt()
        shown = permuted(quarters, orders.view(-1, 4)[label])
        return Transformed(rearrange(shown, "b (r s) c t h w -> b c t (r h) (s w)", r=2, s=2), label)


PRETEXTS: dict[str, Callable[..., Pretext]] = {
    "order": PieceOrder,
    "arrow": Arrow,
    "pace": Pace,
    "rotation": FrameRotation,
    "jigsaw": Jigsaw,
}

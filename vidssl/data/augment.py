"""Augmentation: one drawing for all frames of a clip, on uint8; normalisation happens on the device."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vidssl.config import Count, Range, Share, Size

Scale = Annotated[float, Field(gt=0, le=1)]


def _resized(frames: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> Tensor:
    """u8 [T, H, W, 3] -> u8 [3, T, size, size]: cut a box (pixels), resize it bilinearly with antialiasing."""
    x = torch.from_numpy(frames[:, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    return TF.resize(x, [size, size], antialias=True).permute(1, 0, 2, 3).contiguous()


def scale(frames: np.ndarray, short_side: int | None) -> np.ndarray:
    """u8 [T, H, W, 3], scaled so that the shorter side is `short_side` pixels if it is longer."""
    height, width = frames.shape[1:3]
    if short_side is None or min(height, width) <= short_side:
        return frames
    factor = short_side / min(height, width)
    size = [round(height * factor), round(width * factor)]
    scaled = TF.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), size, antialias=True)
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).numpy())


@dataclass(frozen=True)
class RandomCrop:
    """Clip-consistent random resized crop and horizontal flip (Inception's crop; V-JEPA, app/vjepa/transforms.py)."""

    size: Count  # pixels, height and width of the clip
    scale: Range = (0.3, 1.0)  # fraction of the frame's area
    ratio: Range = (0.75, 1.35)  # width over height
    flip: Share = 0.0  # probability; leave 0 where left and right mean something

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        area = height * width * rng.uniform(*self.scale, 10)
        ratio = np.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), 10))
        u, v, coin = rng.uniform(size=3)
        w, h = np.sqrt(area * ratio).round().astype(int), np.sqrt(area / ratio).round().astype(int)
        fits = np.flatnonzero((w > 0) & (w <= width) & (h > 0) & (h <= height))
        if len(fits):
            h, w = int(h[fits[0]]), int(w[fits[0]])
            top, left = int(u * (height - h + 1)), int(v * (width - w + 1))
        else:  # a frame too long for the ratios: its largest allowed middle
            h, w = min(height, int(width / self.ratio[0])), min(width, int(height * self.ratio[1]))
            top, left = (height - h) // 2, (width - w) // 2
        clip = _resized(frames, top, left, h, w, self.size)
        return clip.flip(-1) if coin < self.flip else clip


@dataclass(frozen=True)
class MultiScaleCrop:
    """Clip-consistent crop of one of a few sizes at one of 13 places.

    A side is a share of the frame's short side; a box's two sides are neighbours among the scales. The places are five
    steps along each axis, of which the corners, the middle, the middles of the edges and of the quarters are taken.
    Source: VideoMAE, transforms.py (GroupMultiScaleCrop; as used in pre-training, without a flip).
    """

    size: Count  # pixels, height and width of the clip
    scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0, 0.875, 0.75, 0.66)  # of the short side
    max_distort: Size = 1  # how far apart the scales of width and height may stand in the list
    flip: Share = 0.0  # probability; leave 0 where left and right mean something

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        pairs, (u, v, coin) = self.pairs(min(height, width)), rng.uniform(size=3)
        h, w = pairs[int(u * len(pairs))]
        across, down = PLACES[int(v * len(PLACES))]
        clip = _resized(frames, down * ((height - h) // 4), across * ((width - w) // 4), h, w, self.size)
        return clip.flip(-1) if coin < self.flip else clip

    def pairs(self, short_side: int) -> list[tuple[int, int]]:
        """(height, width) in pixels of every box; a side within 2 pixels of `size` is `size`, if the frame has it."""
        sides = [max(1, int(short_side * scale)) for scale in self.scales]
        sides = [self.size if abs(side - self.size) < 3 and self.size <= short_side else side for side in sides]
        near = range(-self.max_distort, self.max_distort + 1)
        return [(h, sides[i + d]) for i, h in enumerate(sides) for d in near if 0 <= i + d < len(sides)]


# (steps to the right, steps down), a step being a quarter of the room that a box has
PLACES = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]


@dataclass(frozen=True)
class CenterCrop:
    """The middle square, short side to `size` pixels: what evaluation sees."""

    size: Count

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        side = min(height, width)
        return _resized(frames, (height - side) // 2, (width - side) // 2, side, side, self.size)


AUGMENTS = {"random_crop": RandomCrop, "multi_scale_crop": MultiScaleCrop, "center_crop": CenterCrop}

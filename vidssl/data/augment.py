"""Augmentation: one drawing for all frames of a clip, on uint8; normalisation happens on the device.

A clip goes through crop, flip, RandAugment, colour and erasing, in this order. What is off draws nothing, and how much
the others draw does not depend on what the frames show.
"""

import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vidssl.config import Amount, Count, Range, Share, Size
from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD

Scale = Annotated[float, Field(gt=0, le=1)]
RAND_AUGMENT = (
    r"rand(-(m|n|mmax)\d+|-(p|mstd)\d+(\.\d+)?|-inc[01])*"  # timm's names; it passes over what it cannot read
)


def _resized(frames: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """u8 [T, H, W, 3] -> u8 [T, size, size, 3]: cut a box (pixels), resize it bilinearly with antialiasing."""
    x = torch.from_numpy(frames[:, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    return TF.resize(x, [size, size], antialias=True).permute(0, 2, 3, 1).numpy()


def _planes(frames: np.ndarray) -> Tensor:
    """u8 [T, H, W, 3] -> u8 [3, T, H, W], contiguous; numpy copies this in half of torch's time."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))


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
class ColorJitter:
    """Colour jitter, the same factors in the same random order for all frames (torchvision's ColorJitter).

    A factor is drawn from 1 - amount .. 1 + amount (not below 0), the turn of the hue from -hue .. hue of the circle.
    Contrast stretches each frame about its own mean.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}  # an unknown key is a mistake here, too
    brightness: Amount = 0.0
    contrast: Amount = 0.0
    saturation: Amount = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    chance: Share = 1.0  # that these four are applied
    grey: Share = 0.0  # chance that all colour is taken away, after them

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """u8 [3, T, H, W] -> the same."""
        coins, turn, order = rng.uniform(size=2), rng.uniform(-self.hue, self.hue), rng.permutation(4)
        amounts = np.array([self.brightness, self.contrast, self.saturation])
        factors = rng.uniform(np.maximum(0, 1 - amounts), 1 + amounts)
        frames = clip.transpose(0, 1)
        for what in order if coins[0] < self.chance else ():
            if what == 3 and self.hue:
                frames = TF.adjust_hue(frames, turn)
            elif what < 3 and amounts[what]:
                frames = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[what](
                    frames, factors[what]
                )
        if coins[1] < self.grey:
            frames = TF.rgb_to_grayscale(frames, num_output_channels=3)
        return frames.transpose(0, 1).contiguous()


@lru_cache
def _policy(name: str) -> RandAugment:
    return rand_augment_transform(name, {"interpolation": Image.Resampling.BICUBIC})


def _rand_augmented(frames: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    """u8 [T, H, W, 3] -> the same: timm's RandAugment, grey (128) where it moves pixels in.

    timm draws from the generators of `random` and `numpy.random`: before every frame both are set to one seed, so all
    frames get the same operations, and afterwards both are as they were.
    """
    seed, before, before_numpy = int(rng.integers(2**32)), random.getstate(), np.random.get_state()
    out = np.empty(frames.shape, np.uint8)
    try:
        for i, frame in enumerate(frames):
            random.seed(seed)
            np.random.seed(seed)
            out[i] = _policy(name)(Image.fromarray(frame))
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
    return out


def _erase(clip: Tensor, mode: str, rng: np.random.Generator) -> None:
    """Overwrite a box of u8 [3, T, S, S], the same in all frames.

    Its area is 2 % to a third of the frame's and its ratio 0.3 to 1 / 0.3; of ten drawings the first that fits is taken
    (timm, random_erasing.py). There the clip is normalised already: 0 is the mean colour, and noise has the standard
    deviation of the pixels; in uint8 it is cut off at black and white.
    """
    size, frames = clip.shape[-1], clip.shape[1]
    area = size**2 * rng.uniform(0.02, 1 / 3, 10)
    ratio = np.exp(rng.uniform(math.log(0.3), -math.log(0.3), 10))
    u, v = rng.uniform(size=2)
    heights, widths = np.sqrt(area * ratio).round().astype(int), np.sqrt(area / ratio).round().astype(int)
    fits = np.flatnonzero((heights < size) & (widths < size))
    if not len(fits):
        return
    h, w = int(heights[fits[0]]), int(widths[fits[0]])
    top, left = int(u * (size - h + 1)), int(v * (size - w + 1))
    shape = (3, frames, h, w) if mode == "pixel" else (3, 1, 1, 1)
    noise = 0.0 if mode == "const" else rng.standard_normal(shape, np.float32)
    mean, std = (np.array(c, np.float32).reshape(3, 1, 1, 1) for c in (MEAN, STD))
    fill = np.rint(255 * (mean + std * noise)).clip(0, 255).astype(np.uint8)
    clip[:, :, top : top + h, left : left + w] = torch.from_numpy(fill)


@dataclass(frozen=True, kw_only=True)
class Augmentations:
    """What happens to a clip that is cut: the options that every training crop has."""

    flip: Share = 0.0  # probability; leave 0 where left and right mean something
    randaugment: str | None = None  # as timm names it, e.g. rand-m7-n4-mstd0.5-inc1 (V-JEPA's probes)
    colour: ColorJitter | None = None
    random_erasing: Share = 0.0  # probability (V-JEPA's probes: 0.25)
    random_erasing_mode: Literal["const", "rand", "pixel"] = (
        "pixel"  # the mean colour, one random colour, noise
    )

    def __post_init__(self) -> None:
        if self.randaugment is not None and not re.fullmatch(RAND_AUGMENT, self.randaugment):
            raise UserError(
                f"augment.randaugment: {self.randaugment!r} is no RandAugment of timm's; "
                "give its name, such as rand-m7-n4-mstd0.5-inc1"
            )

    def change(self, frames: np.ndarray, coin: float, rng: np.random.Generator) -> Tensor:
        """u8 [T, S, S, 3] -> u8 [3, T, S, S]; coin in [0, 1) decides the flip."""
        if coin < self.flip:
            frames = frames[:, :, ::-1]
        if self.randaugment is not None:
            frames = _rand_augmented(frames, self.randaugment, rng)
        clip = _planes(frames)
        if self.colour is not None:
            clip = self.colour(clip, rng)
        if self.random_erasing and rng.uniform() < self.random_erasing:
            _erase(clip, self.random_erasing_mode, rng)
        return clip


@dataclass(frozen=True)
class RandomCrop(Augmentations):
    """Clip-consistent random resized crop and horizontal flip (Inception's crop; V-JEPA, app/vjepa/transforms.py)."""

    size: Count  # pixels, height and width of the clip
    scale: Range = (0.3, 1.0)  # fraction of the frame's area
    ratio: Range = (0.75, 1.35)  # width over height

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
        return self.change(_resized(frames, top, left, h, w, self.size), coin, rng)


@dataclass(frozen=True)
class MultiScaleCrop(Augmentations):
    """Clip-consistent crop of one of a few sizes at one of 13 places.

    A side is a share of the frame's short side; a box's two sides are neighbours among the scales. The places are five
    steps along each axis, of which the corners, the middle, the middles of the edges and of the quarters are taken.
    Source: VideoMAE, transforms.py (GroupMultiScaleCrop; as used in pre-training, without a flip).
    """

    size: Count  # pixels, height and width of the clip
    scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0, 0.875, 0.75, 0.66)  # of the short side
    max_distort: Size = 1  # how far apart the scales of width and height may stand in the list

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        pairs, (u, v, coin) = self.pairs(min(height, width)), rng.uniform(size=3)
        h, w = pairs[int(u * len(pairs))]
        across, down = PLACES[int(v * len(PLACES))]
        cut = _resized(frames, down * ((height - h) // 4), across * ((width - w) // 4), h, w, self.size)
        return self.change(cut, coin, rng)

    def pairs(self, short_side: int) -> list[tuple[int, int]]:
        """(height, width) in pixels of every box; a side within 2 pixels of `size` is `size`, if the frame has it."""
        sides = [max(1, int(short_side * scale)) for scale in self.scales]
        sides = [
            self.size if abs(side - self.size) < 3 and self.size <= short_side else side for side in sides
        ]
        near = range(-self.max_distort, self.max_distort + 1)
        return [(h, sides[i + d]) for i, h in enumerate(sides) for d in near if 0 <= i + d < len(sides)]


# (steps to the right, steps down), a step being a quarter of the room that a box has
PLACES = [
    (0, 0),
    (4, 0),
    (0, 4),
    (4, 4),
    (2, 2),
    (0, 2),
    (4, 2),
    (2, 4),
    (2, 0),
    (1, 1),
    (3, 1),
    (1, 3),
    (3, 3),
]


@dataclass(frozen=True)
class CenterCrop:
    """The middle square, short side to `size` pixels: what evaluation sees."""

    size: Count

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        side = min(height, width)
        return _planes(_resized(frames, (height - side) // 2, (width - side) // 2, side, side, self.size))


AUGMENTS = {"random_crop": RandomCrop, "multi_scale_crop": MultiScaleCrop, "center_crop": CenterCrop}

"""Augmentation of uint8 clips, alike in all frames; normalisation happens on the device.

A clip goes through crop, flip, RandAugment, colour jitter and erasing, in this order. Each step that is
switched on draws one number or seed from the clip's generator, independently of pixel content, so that steps
do not affect each other's draws.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from pydantic import Field
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

from vidssl.config import Fraction, NonNegativeInt, PositiveInt, Range
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.data.schema import ColorJitter

SideFraction = Annotated[float, Field(gt=0, le=1)]
# timm's names of RandAugment; timm itself ignores a part that it cannot parse
RAND_AUGMENT = r"rand(-(m|n|mmax)\d+|-(p|mstd)\d+(\.\d+)?|-inc[01])*"


def draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global CPU generators that timm and torchvision draw from, and restores their states
    afterwards.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _resized_crop(frames: np.ndarray, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """u8 [T, H, W, 3] -> u8 [T, size, size, 3]: a box (pixels), resized bilinearly with antialiasing."""
    box = torch.from_numpy(frames[:, top : top + height, left : left + width])
    resized = TF.resize(rearrange(box, "t h w c -> t c h w"), [size, size], antialias=True)
    return rearrange(resized, "t c h w -> t h w c").numpy()


def _channels_first(frames: np.ndarray) -> Tensor:
    """u8 [T, H, W, 3] -> u8 [3, T, H, W], contiguous; numpy copies this in half of torch's time."""
    return torch.from_numpy(np.ascontiguousarray(rearrange(frames, "t h w c -> c t h w")))


def downscale(frames: np.ndarray, short_side: int | None) -> np.ndarray:
    """u8 [T, H, W, 3], scaled down so that the shorter side is `short_side` pixels, if it is longer."""
    height, width = frames.shape[1:3]
    if short_side is None or min(height, width) <= short_side:
        return frames
    factor = short_side / min(height, width)
    size = [round(height * factor), round(width * factor)]
    scaled = TF.resize(rearrange(torch.from_numpy(frames), "t h w c -> t c h w"), size, antialias=True)
    return np.ascontiguousarray(rearrange(scaled, "t c h w -> t h w c").numpy())


def jitter_color(clip: Tensor, jitter: ColorJitter) -> Tensor:
    """u8 [3, T, H, W] -> the same; draws from torch's global generator."""
    color = v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    transform = v2.Compose([v2.RandomApply([color], jitter.p), v2.RandomGrayscale(jitter.grayscale_p)])
    return rearrange(transform(rearrange(clip, "c t h w -> t c h w")), "t c h w -> c t h w").contiguous()


@lru_cache
def _policy(name: str) -> RandAugment:
    return rand_augment_transform(name, {"interpolation": Image.Resampling.BICUBIC})


def _rand_augment(frames: np.ndarray, name: str, seed: int) -> np.ndarray:
    """u8 [T, H, W, 3] -> the same: timm's RandAugment, which fills with grey (128); equal seeds for all
    frames.
    """
    out = np.empty(frames.shape, np.uint8)
    for i, frame in enumerate(frames):
        with seeded(seed):
            out[i] = _policy(name)(Image.fromarray(frame))
    return out


def _erase(clip: Tensor, mode: str) -> Tensor:
    """u8 [3, T, S, S] -> the same with one box overwritten in all frames, by timm's RandomErasing.

    Its area is 2 % to a third of the frame's and its ratio 0.3 to 1 / 0.3. timm erases normalised clips: 0 is
    the mean colour, and noise has the standard deviation of the pixels; in uint8 it is clipped at black and
    white.
    """
    size = clip.shape[-1]
    frames = clip.shape[1] if mode == "pixel" else 1  # of noise; a colour is the same in all frames
    canvas = torch.full((3 * frames, size, size), torch.nan)
    RandomErasing(1.0, mode=mode, device="cpu")(canvas)
    noise = rearrange(canvas, "(c t) h w -> c t h w", c=3)
    mean, std = channel_statistics(noise)
    fill = (255 * (mean + std * noise)).round().clamp(0, 255)
    return torch.where(noise.isnan(), clip, fill.nan_to_num().to(torch.uint8))


@dataclass(frozen=True, kw_only=True)
class Augmentations:
    """Options of all training crops; they apply to the clip after the crop."""

    flip: Fraction = 0.0  # probability; leave 0 where left and right mean something
    randaugment: str | None = None  # as timm names it, e.g. rand-m7-n4-mstd0.5-inc1 (V-JEPA's probes)
    color_jitter: ColorJitter | None = None
    random_erasing: Fraction = 0.0  # probability (V-JEPA's probes: 0.25)
    # const: the mean colour; rand: one random colour; pixel: noise
    random_erasing_mode: Literal["const", "rand", "pixel"] = "pixel"

    def __post_init__(self) -> None:
        if self.randaugment is not None and not re.fullmatch(RAND_AUGMENT, self.randaugment):
            raise UserError(
                f"augment.randaugment: {self.randaugment!r} is not a RandAugment of timm; "
                "give its name, such as rand-m7-n4-mstd0.5-inc1"
            )

    def after_crop(self, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
        """u8 [T, S, S, 3] -> u8 [3, T, S, S]."""
        if rng.uniform() < self.flip:
            frames = frames[:, :, ::-1]
        if self.randaugment is not None:
            frames = _rand_augment(frames, self.randaugment, draw_seed(rng))
        clip = _channels_first(frames)
        if self.color_jitter is not None:
            with seeded(draw_seed(rng)):
                clip = jitter_color(clip, self.color_jitter)
        if self.random_erasing and rng.uniform() < self.random_erasing:
            with seeded(draw_seed(rng)):
                clip = _erase(clip, self.random_erasing_mode)
        return clip


@dataclass(frozen=True)
class RandomCrop(Augmentations):
    """torchvision's RandomResizedCrop (Inception's crop), one box per clip; V-JEPA,
    app/vjepa/transforms.py.
    """

    size: PositiveInt  # pixels, height and width of the clip
    scale: Range = (0.3, 1.0)  # fraction of the frame's area
    ratio: Range = (0.75, 1.35)  # width over height

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        with seeded(draw_seed(rng)):
            frame = torch.empty(frames.shape[1:3]).expand(3, -1, -1)  # only its size is read
            top, left, h, w = RandomResizedCrop.get_params(frame, list(self.scale), list(self.ratio))
        return self.after_crop(_resized_crop(frames, top, left, h, w, self.size), rng)


@dataclass(frozen=True)
class MultiScaleCrop(Augmentations):
    """A crop of one of a few sizes at one of 13 offsets, the same box for all frames.

    A side is a fraction of the frame's short side; the two sides of a box are neighbours in the list of
    scales. There are five positions along each axis; the offsets are the corners, the centre, and the
    midpoints of edges and of quarters. Source: VideoMAE, transforms.py (GroupMultiScaleCrop; as used in
    pre-training, without a flip).
    """

    size: PositiveInt  # pixels, height and width of the clip
    # of the short side
    scales: Annotated[tuple[SideFraction, ...], Field(min_length=1)] = (1.0, 0.875, 0.75, 0.66)
    max_distort: NonNegativeInt = 1  # largest distance in the list between the scales of width and height

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        boxes = self.box_sizes(min(height, width))
        u, v = rng.uniform(size=2)
        h, w = boxes[int(u * len(boxes))]
        right, down = BOX_OFFSETS[int(v * len(BOX_OFFSETS))]
        top = down * ((height - h) // 4)
        left = right * ((width - w) // 4)
        return self.after_crop(_resized_crop(frames, top, left, h, w, self.size), rng)

    def box_sizes(self, short_side: int) -> list[tuple[int, int]]:
        """(height, width) in pixels of every box; a side within 2 pixels of `size` becomes `size` if the
        frame has it.
        """
        sides = [max(1, int(short_side * scale)) for scale in self.scales]
        sides = [
            self.size if abs(side - self.size) < 3 and self.size <= short_side else side for side in sides
        ]
        steps = range(-self.max_distort, self.max_distort + 1)
        return [(h, sides[i + d]) for i, h in enumerate(sides) for d in steps if 0 <= i + d < len(sides)]


# (steps to the right, steps down); a step is a quarter of the distance that a box can move
CORNERS = [(0, 0), (4, 0), (0, 4), (4, 4)]
EDGES = [(0, 2), (4, 2), (2, 4), (2, 0)]
QUARTERS = [(1, 1), (3, 1), (1, 3), (3, 3)]
BOX_OFFSETS = [*CORNERS, (2, 2), *EDGES, *QUARTERS]


@dataclass(frozen=True)
class CenterCrop:
    """The central square, resized to `size` pixels: the crop of evaluation."""

    size: PositiveInt

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        side = min(height, width)
        top = (height - side) // 2
        left = (width - side) // 2
        return _channels_first(_resized_crop(frames, top, left, side, side, self.size))


AUGMENTS = {"random_crop": RandomCrop, "multi_scale_crop": MultiScaleCrop, "center_crop": CenterCrop}

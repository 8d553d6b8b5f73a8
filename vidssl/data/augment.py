"""Augmentation of uint8 clips, alike in all frames but for kinds that cut each frame apart; normalisation
happens on the device.

A clip goes through crop, flip, RandAugment, colour jitter and erasing, in this order. Each step that is
switched on draws one number or seed from the clip's generator, independently of pixel content, so that steps
do not affect each other's draws. `draw` makes the draws of a clip, `apply` changes its frames by them on the
host; `device_augment.py` does so on a device.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor
from typing import Annotated, Literal, NamedTuple, Self

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
from vidssl.core.color import COLOR_CHANGES
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.data.decoding.planes import Box
from vidssl.data.schema import ColorJitter

SideFraction = Annotated[float, Field(gt=0, le=1)]
# timm's names of RandAugment; timm itself ignores a part that it cannot parse
RAND_AUGMENT = r"rand(-(m|n|mmax)\d+|-(p|mstd)\d+(\.\d+)?|-inc[01])*"

# of a pixel: where windows may begin and end, so that the numbers of a device hold the edges exactly
PARTS = 256


class ColorDraws(NamedTuple):
    """Changes of colour, in the order in which they are made."""

    changes: tuple[tuple[str, float], ...]  # (one of COLOR_CHANGES, its factor or, of the hue, its shift)
    grayscale: bool


class Window(NamedTuple):
    """What a clip shows of a frame, in pixels, which it may divide; mirrored with flip."""

    top: float
    left: float
    height: float
    width: float
    flip: bool = False


class ClipDraws(NamedTuple):
    """What augmentation has drawn for a clip."""

    windows: tuple[Window, ...]  # one for all frames, or one for each of them
    randaugment_seed: int | None = None  # None: switched off
    color: ColorDraws | None = None
    erase_seed: int | None = None  # None: nothing is erased


def draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seeds torch's global CPU generator, and restores its state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global CPU generators that timm and torchvision draw from, and restores their states
    afterwards.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with seeded_torch(seed):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def covering_box(windows: Sequence[Window]) -> Box:
    """The smallest box of whole pixels that holds all windows."""
    top = floor(min(w.top for w in windows))
    left = floor(min(w.left for w in windows))
    bottom = ceil(max(w.top + w.height for w in windows))
    right = ceil(max(w.left + w.width for w in windows))
    return Box(top, left, bottom - top, right - left)


def _show(frames: np.ndarray, window: Window, size: int) -> np.ndarray:
    """u8 [T, H, W, 3] -> u8 [T, size, size, 3]: a window, resized bilinearly with antialiasing."""
    box = covering_box([window])
    part = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if box == window[:4]:
        stacked = rearrange(torch.from_numpy(part), "t h w c -> t c h w")
        resized = TF.resize(stacked, [size, size], antialias=True)
        shown = rearrange(resized, "t c h w -> t h w c").numpy()
    else:  # torchvision cuts at whole pixels only
        top, left = window.top - box.top, window.left - box.left
        corners = left, top, left + window.width, top + window.height
        pictures = [Image.fromarray(frame) for frame in part]
        scaled = [p.resize((size, size), Image.Resampling.BILINEAR, corners) for p in pictures]
        shown = np.stack([np.asarray(picture) for picture in scaled])
    return shown[:, :, ::-1] if window.flip else shown


def show_windows(frames: np.ndarray, windows: Sequence[Window], size: int) -> np.ndarray:
    """u8 [T, H, W, 3] -> u8 [T, size, size, 3]; several windows of one frame are a frame each."""
    if len(windows) == 1:
        return _show(frames, windows[0], size)
    sources = np.split(frames, len(frames)) if len(frames) > 1 else [frames] * len(windows)
    return np.concatenate([_show(s, w, size) for s, w in zip(sources, windows, strict=True)])


def _channels_first(frames: np.ndarray) -> Tensor:
    """u8 [T, H, W, 3] -> u8 [3, T, H, W], contiguous; numpy copies this in half of torch's time."""
    return torch.from_numpy(np.ascontiguousarray(rearrange(frames, "t h w c -> c t h w")))


def scaled_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width of a frame scaled down so that its shorter side is `short_side` pixels, if it is
    longer."""
    if short_side is None or min(height, width) <= short_side:
        return height, width
    factor = short_side / min(height, width)
    return round(height * factor), round(width * factor)


def downscale(frames: np.ndarray, short_side: int | None) -> np.ndarray:
    """u8 [T, H, W, 3], scaled down so that the shorter side is `short_side` pixels, if it is longer."""
    height, width = frames.shape[1:3]
    size = scaled_size(height, width, short_side)
    if size == (height, width):
        return frames
    scaled = TF.resize(rearrange(torch.from_numpy(frames), "t h w c -> t c h w"), list(size), antialias=True)
    return np.ascontiguousarray(rearrange(scaled, "t c h w -> t h w c").numpy())


def draw_color(jitter: ColorJitter) -> ColorDraws:
    """Draws from torch's global generator, as torchvision's ColorJitter and RandomGrayscale do."""
    params = None
    if torch.rand(1) < jitter.p:
        color = v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        params = color.make_params([])
    grayscale = bool(torch.rand(1) < jitter.grayscale_p)
    if params is None:
        return ColorDraws((), grayscale)
    factors = [params[f"{name}_factor"] for name in COLOR_CHANGES]
    drawn = [(COLOR_CHANGES[i], factors[i]) for i in params["fn_idx"].tolist() if factors[i] is not None]
    return ColorDraws(tuple(drawn), grayscale)


def change_color(clip: Tensor, draws: ColorDraws) -> Tensor:
    """u8 [3, T, H, W] -> the same."""
    frames = rearrange(clip, "c t h w -> t c h w")
    for name, factor in draws.changes:
        frames = getattr(TF, f"adjust_{name}")(frames, factor)
    if draws.grayscale:
        frames = TF.rgb_to_grayscale(frames, num_output_channels=3)
    return rearrange(frames, "t c h w -> c t h w").contiguous()


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


def erase_canvas(seed: int, size: int, frames: int, mode: str) -> Tensor:
    """f32 [3, frames, size, size]: what timm's RandomErasing writes into a normalised clip, NaN elsewhere.

    frames: of noise in the mode "pixel"; 1 for a colour, which is the same in all frames.
    """
    canvas = torch.full((3 * frames, size, size), torch.nan)
    with seeded(seed):
        RandomErasing(1.0, mode=mode, device="cpu")(canvas)
    return rearrange(canvas, "(c t) h w -> c t h w", c=3)


def _erase(clip: Tensor, seed: int, mode: str) -> Tensor:
    """u8 [3, T, S, S] -> the same with one box overwritten in all frames, by timm's RandomErasing.

    Its area is 2 % to a third of the frame's and its ratio 0.3 to 1 / 0.3. timm erases normalised clips: 0 is
    the mean colour, and noise has the standard deviation of the pixels; in uint8 it is clipped at black and
    white.
    """
    noise = erase_canvas(seed, clip.shape[-1], clip.shape[1] if mode == "pixel" else 1, mode)
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

    def draw_flip(self, rng: np.random.Generator) -> bool:
        return bool(rng.uniform() < self.flip)

    def draw_after_windows(self, windows: tuple[Window, ...], rng: np.random.Generator) -> ClipDraws:
        randaugment_seed = draw_seed(rng) if self.randaugment is not None else None
        color = None
        if self.color_jitter is not None:
            with seeded_torch(draw_seed(rng)):
                color = draw_color(self.color_jitter)
        erases = bool(self.random_erasing) and rng.uniform() < self.random_erasing
        return ClipDraws(windows, randaugment_seed, color, draw_seed(rng) if erases else None)

    def apply_after_crop(self, frames: np.ndarray, draws: ClipDraws) -> Tensor:
        """u8 [T, S, S, 3] -> u8 [3, T, S, S]."""
        if self.randaugment is not None and draws.randaugment_seed is not None:
            frames = _rand_augment(frames, self.randaugment, draws.randaugment_seed)
        clip = _channels_first(frames)
        if draws.color is not None:
            clip = change_color(clip, draws.color)
        if draws.erase_seed is not None:
            clip = _erase(clip, draws.erase_seed, self.random_erasing_mode)
        return clip


class ClipCrop:
    """What a crop says of the clips that it makes."""

    @property
    def one_frame(self) -> bool:
        """Whether a clip is made of a single frame, by one window for each frame of the clip."""
        return False

    def for_clip(self, frames: int, is_image: bool) -> Self:
        """What makes a clip of `frames` frames, of an image or of a video."""
        return self


@dataclass(frozen=True)
class TrainingCrop(ClipCrop, Augmentations, ABC):
    """A random box of the frame, resized to a square of `size` pixels, and what follows."""

    size: PositiveInt  # pixels, height and width of the clip

    @abstractmethod
    def draw_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """Draws a box within a frame of height x width pixels."""

    def draw(self, height: int, width: int, rng: np.random.Generator) -> ClipDraws:
        """Makes all draws of a clip whose frames have height x width pixels."""
        box = self.draw_box(height, width, rng)
        return self.draw_after_windows((Window(*box, self.draw_flip(rng)),), rng)

    def apply(self, frames: np.ndarray, draws: ClipDraws) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        return self.apply_after_crop(show_windows(frames, draws.windows, self.size), draws)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        return self.apply(frames, self.draw(height, width, rng))


def draw_area(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draws a box of torchvision's RandomResizedCrop from torch's global generator. scale: fraction of the
    area of height x width; ratio: width over height."""
    frame = torch.empty(1).expand(3, height, width)  # only its size is read
    return Box(*RandomResizedCrop.get_params(frame, list(scale), list(ratio)))


@dataclass(frozen=True)
class RandomCrop(TrainingCrop):
    """torchvision's RandomResizedCrop (Inception's crop), one box per clip; V-JEPA,
    app/vjepa/transforms.py.
    """

    scale: Range = (0.3, 1.0)  # fraction of the frame's area
    ratio: Range = (0.75, 1.35)  # width over height

    def draw_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        with seeded_torch(draw_seed(rng)):
            return draw_area(height, width, self.scale, self.ratio)


@dataclass(frozen=True)
class MultiScaleCrop(TrainingCrop):
    """A crop of one of a few sizes at one of 13 offsets, the same box for all frames.

    A side is a fraction of the frame's short side; the two sides of a box are neighbours in the list of
    scales. There are five positions along each axis; the offsets are the corners, the centre, and the
    midpoints of edges and of quarters. Source: VideoMAE, transforms.py (GroupMultiScaleCrop; as used in
    pre-training, without a flip).
    """

    # of the short side
    scales: Annotated[tuple[SideFraction, ...], Field(min_length=1)] = (1.0, 0.875, 0.75, 0.66)
    max_distort: NonNegativeInt = 1  # largest distance in the list between the scales of width and height

    def draw_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        boxes = self.box_sizes(min(height, width))
        u, v = rng.uniform(size=2)
        h, w = boxes[int(u * len(boxes))]
        right, down = BOX_OFFSETS[int(v * len(BOX_OFFSETS))]
        return Box(down * ((height - h) // 4), right * ((width - w) // 4), h, w)

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
class CropPair(TrainingCrop):
    """A clip of two frames made of one: a crop of it, and a smaller crop of that crop.

    Both are resized to `size` pixels, the second one from the pixels of the frame; its box is drawn within
    the first one as it is shown, so that a ratio is one of the clip. Flips are drawn apart. Source: CropMAE
    (arXiv 2403.17823; data/util/CropMAEStrategies.py, GlobalToLocal), which resizes the second crop twice.
    """

    scale: Range = (0.1, 1.0)  # of the first crop: fraction of the frame's area
    local_scale: Range = (0.3, 0.6)  # of the second crop: fraction of the first one's area
    ratio: Range = (0.75, 1.3333)  # of both: width over height

    @property
    def one_frame(self) -> bool:
        return True

    def draw_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        with seeded_torch(draw_seed(rng)):
            return draw_area(height, width, self.scale, self.ratio)

    def draw(self, height: int, width: int, rng: np.random.Generator) -> ClipDraws:
        outer = self.draw_box(height, width, rng)
        with seeded_torch(draw_seed(rng)):
            inner = draw_area(self.size, self.size, self.local_scale, self.ratio)
        boxes = [outer, box_within(outer, inner, self.size)]
        windows = tuple(Window(*box, self.draw_flip(rng)) for box in boxes)
        return self.draw_after_windows(windows, rng)


def box_within(outer: Box, inner: Box, size: int) -> tuple[float, float, float, float]:
    """Returns top, left, height and width in the frame of a box in a crop `outer` that is shown at `size`
    pixels."""
    top, bottom, left, right = _edges(inner)
    rows = [round(PARTS * (outer.top + edge * outer.height / size)) for edge in (top, bottom)]
    columns = [round(PARTS * (outer.left + edge * outer.width / size)) for edge in (left, right)]
    return part_of(*rows, *columns)


def part_of(top: float, bottom: float, left: float, right: float) -> tuple[float, float, float, float]:
    """Returns top, left, height and width in pixels; the edges are whole PARTS of a pixel."""
    return top / PARTS, left / PARTS, (bottom - top) / PARTS, (right - left) / PARTS


def _edges(box: Box) -> tuple[int, int, int, int]:
    """Top, bottom, left and right."""
    return box.top, box.top + box.height, box.left, box.left + box.width


@dataclass(frozen=True)
class MovingCrop(RandomCrop):
    """Clips of images: the crop moves, grows or shrinks evenly from one random box to another.

    Each box is that of RandomCrop, the first one of the first frame, the second one of the last. Videos are
    cut as RandomCrop cuts them.
    """

    moves: Literal["images", "all"] = "images"  # all: clips of videos are made of one of their frames, too

    def for_clip(self, frames: int, is_image: bool) -> "MovingCrop":
        return _ClipOfWindows(**vars(self), frames=frames, is_still=is_image or self.moves == "all")


@dataclass(frozen=True, kw_only=True)
class _ClipOfWindows(MovingCrop):
    """Has a window for each frame of images and videos alike, which a batch on a device may mix."""

    frames: int
    is_still: bool

    @property
    def one_frame(self) -> bool:
        return self.is_still

    def draw(self, height: int, width: int, rng: np.random.Generator) -> ClipDraws:
        first = self.draw_box(height, width, rng)
        last = self.draw_box(height, width, rng) if self.is_still else first
        flip = self.draw_flip(rng)
        edges = np.linspace(_edges(first), _edges(last), self.frames)
        windows = [Window(*part_of(*row), flip) for row in (edges * PARTS).round().tolist()]
        return self.draw_after_windows(tuple(windows), rng)


@dataclass(frozen=True)
class CenterCrop(ClipCrop):
    """The central square, resized to `size` pixels: the crop of evaluation."""

    size: PositiveInt

    def draw(self, height: int, width: int, rng: np.random.Generator | None = None) -> ClipDraws:
        side = min(height, width)
        return ClipDraws((Window((height - side) // 2, (width - side) // 2, side, side),))

    def apply(self, frames: np.ndarray, draws: ClipDraws) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        return _channels_first(show_windows(frames, draws.windows, self.size))

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """u8 [T, H, W, 3] -> u8 [3, T, size, size]."""
        height, width = frames.shape[1:3]
        return self.apply(frames, self.draw(height, width, rng))


AUGMENTS = {
    "random_crop": RandomCrop,
    "multi_scale_crop": MultiScaleCrop,
    "center_crop": CenterCrop,
    "crop_pair": CropPair,
    "moving_crop": MovingCrop,
}

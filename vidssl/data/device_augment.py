"""The augmentation of `augment.py`, applied on a device to a batch of clips of unequal sizes.

Crop, resize and flip of a clip are two matrices: the rows and the columns of its frames become those of the
clip by weighted sums, with the triangle filter of torchvision's antialiased resize. Colour conversion is
linear, so it comes after the resize. Planes of colour with half the rows or columns of the brightness are
read as the host's conversion reads them: two pixels share a sample, so their weights are added.

The result differs from the host's by the rounding between its steps, below half a grey level on average.
Erased noise has the same box and distribution, but other numbers: the host's generator cannot run on a
device.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from vidssl.core.color import COLOR_CHANGES, adjust_color, grey
from vidssl.core.constants import upload
from vidssl.core.pixels import channel_statistics
from vidssl.core.resampling import apply_weights, triangle_weights
from vidssl.core.rng import KeyedRNG
from vidssl.data.augment import ClipDraws, ColorDraws, TrainingCrop, erase_canvas
from vidssl.data.decoding.planes import Box, PixelFormat, plane_shapes, split_planes

MAX_PASS = 1 << 27  # numbers of padded planes that are converted at once
NUMBERS = 6 + 6 + 12 + len(COLOR_CHANGES)  # of a clip: its two axes, the matrix, the changes of colour


class Axis(NamedTuple):
    """Rows or columns of a clip, in pixels.

    start, extent: the box, in frames of `scaled` pixels, to which those of `full` pixels are scaled down
    before the crop. offset: first pixel of the full frame that the planes hold.
    """

    start: float
    extent: float
    offset: float
    full: float
    scaled: float
    flip: float  # 1: reversed


class Erase(NamedTuple):
    """A box that is overwritten. color: in grey levels; None: noise that `seed` gives."""

    box: Box
    color: tuple[float, ...] | None
    seed: int


class ClipLayout(NamedTuple):
    """What turns the planes of a clip into the clip.

    side: pixels, height and width of the clip. frames: of the planes. size: (height, width) of what the
    planes hold of a frame. rows, columns: of all frames, or of the first one; others: of the frames after it.
    """

    side: int
    frames: int
    size: tuple[int, int]
    rows: Axis
    columns: Axis
    format: PixelFormat
    color: ColorDraws | None
    erase: Erase | None
    others: tuple[tuple[Axis, Axis], ...] = ()

    def windows(self) -> list["ClipLayout"]:
        """The layouts of the frames that are cut apart; of a clip that is cut as a whole, this one."""
        if not self.others:
            return [self]
        axes = [(self.rows, self.columns), *self.others]
        return [self._replace(frames=1, rows=r, columns=c, others=()) for r, c in axes]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return plane_shapes(self.format.chroma, self.frames, *self.size)

    def numbers(self) -> list[float]:
        changes = dict(self.color.changes) if self.color else {}
        factors = [changes.get(name, 1.0) for name in COLOR_CHANGES]
        return [*self.rows, *self.columns, *self.format.matrix, *factors]


class ClipPlanes(NamedTuple):
    """A clip as decoded."""

    pixels: Tensor  # u8 [n], plane after plane
    layout: ClipLayout


@dataclass(frozen=True)
class PlaneBatch:
    """Clips as decoded, in one tensor: the numbers of their windows f32 [B * windows, NUMBERS], then their
    planes."""

    data: Tensor  # u8 [n]
    layouts: list[ClipLayout]

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """Makes the clips u8 [B, 3, T, S, S] on a device, where finished clips would only be copied."""
        return make_clips(replace(self, data=self.data.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> "PlaneBatch":
        """For the loader's thread that pins batches."""
        return replace(self, data=self.data.pin_memory())


def layout_clip(
    draws: ClipDraws,
    augment: TrainingCrop,
    frames: int,
    full: tuple[int, int],
    scaled: tuple[int, int],
    region: Box,
    format: PixelFormat,
) -> ClipLayout:
    """full: (height, width) of a frame as decoded; scaled: after data.short_side; region: what the planes
    hold of it."""
    axes = [
        (
            Axis(window.top, window.height, region.top, full[0], scaled[0], 0),
            Axis(window.left, window.width, region.left, full[1], scaled[1], window.flip),
        )
        for window in draws.windows
    ]
    erase = None if draws.erase_seed is None else find_erased(augment, draws.erase_seed)
    size = region.height, region.width
    return ClipLayout(augment.size, frames, size, *axes[0], format, draws.color, erase, tuple(axes[1:]))


def find_erased(augment: TrainingCrop, seed: int) -> Erase | None:
    """The box (None: no box fitted) and colour that the host would erase."""
    mode = augment.random_erasing_mode
    is_noise = mode == "pixel"
    canvas = erase_canvas(seed, augment.size, 1, "const" if is_noise else mode)[:, 0]
    inside = ~canvas[0].isnan()
    rows, columns = (inside.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    if not rows:
        return None
    box = Box(rows[0], columns[0], len(rows), len(columns))
    mean, std = channel_statistics(canvas)
    color = 255 * (mean.flatten() + std.flatten() * canvas[:, rows[0], columns[0]])
    return Erase(box, None if is_noise else tuple(color.round().clamp(0, 255).tolist()), seed)


def collate_planes(clips: Sequence[ClipPlanes]) -> PlaneBatch:
    """One tensor of all clips; in a loader worker in the shared memory that the training process reads."""
    numbers = window_numbers([clip.layout for clip in clips])
    parts = [torch.from_numpy(numbers).flatten().view(torch.uint8), *(clip.pixels for clip in clips)]
    total = sum(len(part) for part in parts)
    data = torch.empty(0, dtype=torch.uint8)
    if torch.utils.data.get_worker_info() is not None:
        data = data.new(data.untyped_storage()._new_shared(total, device="cpu"))
    data.resize_(total)
    torch.cat(parts, out=data)
    return PlaneBatch(data, [clip.layout for clip in clips])


def window_numbers(layouts: Sequence[ClipLayout]) -> np.ndarray:
    """f32 [B * windows, NUMBERS]."""
    return np.array([w.numbers() for layout in layouts for w in layout.windows()], np.float32)


def make_clips(batch: PlaneBatch) -> Tensor:
    """Makes the clips u8 [B, 3, T, S, S] on the device of the batch. Waits for nothing on the device."""
    layouts = batch.layouts
    windows = [window for layout in layouts for window in layout.windows()]
    head = 4 * NUMBERS * len(windows)
    numbers = batch.data[:head].view(torch.float32).view(-1, NUMBERS)
    sizes = [sum(math.prod(shape) for shape in layout.shapes) for layout in layouts]
    clips: list[list[Tensor]] = []  # one for each window
    for pixels, layout in zip(batch.data[head:].split(sizes), layouts, strict=True):
        clips += frames_of_windows(split_planes(pixels, layout.shapes), layout)
    largest = [max(layout.size[axis] for layout in layouts) for axis in (0, 1)]
    at_once = max(1, MAX_PASS // (3 * windows[0].frames * math.prod(largest)))
    parts = [slice(i, i + at_once) for i in range(0, len(windows), at_once)]
    video = torch.cat([resize_planes(clips[p], windows[p], numbers[p]) for p in parts])
    return finish_clips(video, layouts, numbers)


def frames_of_windows(planes: list[Tensor], layout: ClipLayout) -> list[list[Tensor]]:
    """The planes [T, h, w, ...] of a clip -> those that each of its windows shows."""
    if not layout.others:
        return [planes]
    last = layout.frames - 1  # shown by all windows, if it is the only one
    return [[plane[min(i, last)][None] for plane in planes] for i in range(1 + len(layout.others))]


def finish_clips(video: Tensor, layouts: Sequence[ClipLayout], numbers: Tensor) -> Tensor:
    """Joins the frames of clips that are cut apart, u8 [B * windows, 3, T, S, S] -> u8
    [B, 3, T * windows, S, S], then makes the changes of colour and erases."""
    each = len(video) // len(layouts)
    joined = rearrange(video, "(b w) c t h w2 -> b c (w t) h w2", w=each).contiguous()
    return change_pixels(joined, layouts, numbers[::each])


def resize_planes(clips: Sequence[list[Tensor]], layouts: Sequence[ClipLayout], numbers: Tensor) -> Tensor:
    """Planes -> u8 [B, 3, T, S, S]: scaled, cropped, flipped and converted to RGB.

    numbers: f32 [B, NUMBERS].
    """
    dtype = product_type(numbers)
    size = layouts[0].side
    if not any(any(layout.format.chroma) for layout in layouts):
        whole = pad_planes([rearrange(clip[0], "t h w c -> c t h w") for clip in clips], dtype)
        return resize_padded(whole, layouts, numbers)
    height, width = (padded_length(layout.size[axis] for layout in layouts) for axis in (0, 1))
    rows = axis_weights(numbers[:, :6], [layout.rows for layout in layouts], size, height)
    columns = axis_weights(numbers[:, 6:12], [layout.columns for layout in layouts], size, width)
    luma, chroma = zip(*(split_luma(clip) for clip in clips), strict=True)
    y = apply_weights(pad_planes(luma, dtype), rows.to(dtype), columns.to(dtype))
    uv = pad_planes(chroma, dtype)
    factors = [[max(1, layout.format.chroma[axis]) for layout in layouts] for axis in (0, 1)]
    rows = share_samples(rows, factors[0], uv.shape[-2])
    columns = share_samples(columns, factors[1], uv.shape[-1])
    return to_rgb(y, apply_weights(uv, rows.to(dtype), columns.to(dtype)), numbers[:, 12:24])


def resize_padded(frames: Tensor, layouts: Sequence[ClipLayout], numbers: Tensor) -> Tensor:
    """RGB frames [B, 3, T, H, W], zero beyond a smaller clip -> u8 [B, 3, T, S, S]. numbers: f32
    [B, NUMBERS]."""
    size = layouts[0].side
    dtype = product_type(numbers)
    height, width = frames.shape[-2:]
    rows = axis_weights(numbers[:, :6], [layout.rows for layout in layouts], size, height)
    columns = axis_weights(numbers[:, 6:12], [layout.columns for layout in layouts], size, width)
    resized = apply_weights(frames.to(dtype), rows.to(dtype), columns.to(dtype))
    return resized.float().round().clamp(0, 255).to(torch.uint8)


def augment_padded(frames: Tensor, layouts: Sequence[ClipLayout], numbers: Tensor) -> Tensor:
    """RGB frames u8 [B, 3, T, H, W], zero beyond a smaller clip -> u8 [B, 3, T, S, S], augmented as drawn.
    numbers: f32 [B * windows, NUMBERS]; a clip of several windows has as many frames."""
    windows = [window for layout in layouts for window in layout.windows()]
    if len(windows) > len(layouts):
        frames = rearrange(frames, "b c t h w -> (b t) c 1 h w")
    at_once = max(1, MAX_PASS // frames[0].numel())
    parts = [slice(i, i + at_once) for i in range(0, len(windows), at_once)]
    video = torch.cat([resize_padded(frames[p], windows[p], numbers[p]) for p in parts])
    return finish_clips(video, layouts, numbers)


def product_type(numbers: Tensor) -> torch.dtype:
    """fp16 on GPUs: it holds grey levels exactly and weights to 2^-11, and products are summed in fp32."""
    return torch.float16 if numbers.is_cuda else torch.float32


def split_luma(planes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Planes -> the first one u8 [1, T, H, W], the other two u8 [2, T, h, w]; (Y, UV) or (R, GB)."""
    if len(planes) == 1:
        channels = rearrange(planes[0], "t h w c -> c t h w")
        return channels[:1], channels[1:]
    return planes[0][None], torch.stack(planes[1:])


def padded_length(lengths: Iterable[int]) -> int:
    """The largest length, rounded up: tensor cores want rows of a multiple of 16 bytes."""
    return -(-max(lengths) // 8) * 8


def pad_planes(clips: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """u8 [C, T, h, w] of unequal sizes -> [B, C, T, H, W], zero beyond the clips."""
    height, width = (padded_length(clip.shape[axis] for clip in clips) for axis in (2, 3))
    padded = clips[0].new_zeros((len(clips), *clips[0].shape[:2], height, width), dtype=dtype)
    for row, clip in zip(padded, clips, strict=True):
        row[..., : clip.shape[2], : clip.shape[3]] = clip
    return padded


def axis_weights(axes: Tensor, known: Sequence[Axis], size: int, length: int) -> Tensor:
    """Weights f32 [B, size, length] of the pixels of the planes for those of the clip.

    axes: f32 [B, 6], the same as `known`, which is on the host.
    """
    start, extent, offset, full, scaled, flip = axes.T[..., None, None]
    place = torch.arange(size, device=axes.device, dtype=torch.float32)[:, None]
    place = torch.where(flip > 0, size - 1 - place, place)
    pixel = offset + torch.arange(length, device=axes.device, dtype=torch.float32)
    outputs = torch.full_like(extent, size)
    if all(axis.full == axis.scaled for axis in known):
        return triangle_weights(start, extent, outputs, place, pixel)
    middle = torch.arange(int(max(axis.scaled for axis in known)), device=axes.device, dtype=torch.float32)
    crop = triangle_weights(start, extent, outputs, place, middle)
    return crop @ triangle_weights(torch.zeros_like(full), full, scaled, middle[:, None], pixel)


def share_samples(weights: Tensor, factors: Sequence[int], length: int) -> Tensor:
    """[B, S, L] -> [B, S, length]: weights for planes in which `factors` (1 or 2) pixels share a sample."""
    count = weights.shape[-1]
    added = F.pad(weights, (0, count % 2)).unflatten(-1, (-1, 2)).sum(-1)
    if set(factors) == {2}:
        return F.pad(added, (0, length - added.shape[-1]))
    each = [(added if factor == 2 else weights)[i] for i, factor in enumerate(factors)]
    return torch.stack([F.pad(w, (0, length - w.shape[-1])) for w in each])


def to_rgb(y: Tensor, uv: Tensor, matrix: Tensor) -> Tensor:
    """y [B, 1, T, S, S], uv [B, 2, T, S, S], matrix f32 [B, 12] -> u8 [B, 3, T, S, S]."""
    y, u, v = (plane.float() for plane in (y[:, 0], uv[:, 0], uv[:, 1]))
    rows = rearrange(matrix, "b (i j) -> i j b 1 1 1", i=3)
    channels = [(a * y + b * u + c * v + d).round_().clamp_(0, 255) for a, b, c, d in rows]
    return torch.stack([channel.to(torch.uint8) for channel in channels], 1)


def change_pixels(video: Tensor, layouts: Sequence[ClipLayout], numbers: Tensor) -> Tensor:
    """u8 [B, 3, T, S, S] -> the same after jitter and erasing."""
    video = change_colors(video, [layout.color for layout in layouts], numbers[:, 24:])
    for clip, layout in zip(video, layouts, strict=True):
        if layout.erase is not None:
            erase_box(clip, layout.erase)
    return video


def change_colors(video: Tensor, draws: Sequence[ColorDraws | None], factors: Tensor) -> Tensor:
    """Makes the drawn changes of colour: those that are first in their clips, then the second ones, ...

    factors: f32 [B, 4], in the order of COLOR_CHANGES.
    """
    changes = [[name for name, _ in d.changes] if d else [] for d in draws]
    rounds = range(max(map(len, changes)))
    steps = [
        (i, [b for b, names in enumerate(changes) if names[r : r + 1] == [name]])
        for r in rounds
        for i, name in enumerate(COLOR_CHANGES)
    ]
    steps.append((-1, [b for b, d in enumerate(draws) if d and d.grayscale]))
    for i, chosen in steps:
        if chosen:
            index = upload(torch.tensor(chosen), video.device)
            clips = video[index].float()
            factor = factors[index, i].view(-1, 1, 1, 1, 1)
            changed = (
                adjust_color(clips, COLOR_CHANGES[i], factor) if i >= 0 else grey(clips).expand_as(clips)
            )
            # torchvision rounds down after each change
            video[index] = changed.to(torch.uint8)
    return video


def erase_box(clip: Tensor, erase: Erase) -> None:
    """Overwrites a box in all frames of u8 [3, T, S, S]."""
    top, left, height, width = erase.box
    part = clip[:, :, top : top + height, left : left + width]
    if erase.color is not None:
        for channel, level in zip(part, erase.color, strict=True):
            channel.fill_(level)
        return
    rng = KeyedRNG(erase.seed, 0, torch.zeros(1, dtype=torch.int64, device=clip.device))
    noise = math.sqrt(2) * torch.erfinv(2 * rng.rand(*part.shape)[0] - 1)
    mean, std = channel_statistics(noise)
    part.copy_((255 * (mean + std * noise)).round().clamp(0, 255))

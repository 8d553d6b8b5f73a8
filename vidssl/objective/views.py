"""Views of clips: random crops with changes of colour, made on the device as a function of each clip's keys.

A view is alike in all frames. The changes are those of torchvision on 8-bit frames: crop, flip, jitter, grey,
blur, solarisation, in this order. The four parts of the jitter follow one another in an order that is that
of the step and view, for all clips; torchvision draws it for each clip. What is not drawn for a clip leaves
it as it is, so nothing is read from the device.
"""

import itertools
import math

import torch
from torch import Tensor

from vidssl.core.color import COLOR_CHANGES, adjust_color, grey
from vidssl.core.pixels import channel_statistics
from vidssl.core.precision import without_autocast
from vidssl.core.resampling import apply_weights, triangle_weights
from vidssl.core.rng import KeyedRNG
from vidssl.objective.view_schema import ColorChange, ViewGroup

TRIES = 10  # draws of a crop, as torchvision's RandomResizedCrop makes; then it is cut to fit
ORDERS = list(itertools.permutations(COLOR_CHANGES))
NO_BLUR = 1e-3  # a sigma, in pixels, that mixes nothing


def cut_view(video: Tensor, group: ViewGroup, rng: KeyedRNG, index: int) -> Tensor:
    """Returns a view f32 [B, 3, T, S, S] of normalised clips f32 [B, 3, T, H, W]. index: of the view."""
    size = group.size or video.shape[-1]
    mean, std = channel_statistics(video)
    with without_autocast(video.device):
        rows, columns = crop_weights(group, size, (video.shape[-2], video.shape[-1]), rng)
        x = apply_weights(video.float(), rows, columns)
        if group.color or group.grey or group.blur or group.solarise:
            x = (255 * (x * std + mean)).round().clamp(0, 255)
            x = change_view_colors(x, group, rng, ORDERS[(7 * rng.step + index) % len(ORDERS)])
            x = (x / 255 - mean) / std
    return x


def still(video: Tensor, frames: int, rng: KeyedRNG) -> Tensor:
    """A frame of each clip [B, 3, T, H, W], drawn for it, as `frames` frames."""
    b, c, t, h, w = video.shape
    drawn = (rng.rand(1, 1, 1, 1) * t).long().clamp(max=t - 1)
    return video.gather(2, drawn.expand(b, c, frames, h, w))


def crop_weights(group: ViewGroup, size: int, frame: tuple[int, int], rng: KeyedRNG) -> tuple[Tensor, Tensor]:
    """Draws crops of frames of (height, width) pixels and whether they are flipped. Returns the weights of
    rows f32 [B, size, height] and columns f32 [B, size, width]."""
    box = draw_boxes(group, frame[1] / frame[0], rng)
    place = torch.arange(size, device=box.device, dtype=torch.float32)[:, None]
    flipped = rng.rand(1, 1) < group.flip
    columns = torch.where(flipped, size - 1 - place, place)

    def along(start: Tensor, extent: Tensor, length: int, outputs: Tensor) -> Tensor:
        start, extent = (x[:, None, None] * length for x in (start, extent))
        pixel = torch.arange(length, device=box.device, dtype=torch.float32)
        return triangle_weights(start, extent, torch.full_like(extent, size), outputs, pixel)

    top, left, height, width = box
    return along(top, height, frame[0], place), along(left, width, frame[1], columns)


def draw_boxes(group: ViewGroup, frame_aspect: float, rng: KeyedRNG) -> Tensor:
    """f32 [4, B]: top, left, height and width of a crop, as parts of the frame's height or width.

    The area is uniform and the aspect log-uniform in their ranges, as in torchvision's RandomResizedCrop.
    """
    area, aspect = rng.rand(2, TRIES).unbind(1)
    area = group.scale[0] + (group.scale[1] - group.scale[0]) * area
    low, high = map(math.log, group.aspect)
    aspect = (low + (high - low) * aspect).exp() / frame_aspect
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()])  # [2, B, TRIES]
    first = (sides <= 1).all(0).int().argmax(-1)
    sides = sides.gather(2, first.expand(2, -1)[..., None])[..., 0].clamp(max=1)
    return torch.cat([rng.rand(2).T * (1 - sides), sides])


def change_view_colors(x: Tensor, group: ViewGroup, rng: KeyedRNG, order: tuple[str, ...]) -> Tensor:
    """Grey levels f32 [B, 3, T, S, S] -> the same after jitter, greyscale, blur and solarisation."""

    def chosen(probability: float) -> Tensor:
        return rng.rand(1, 1, 1, 1) < probability

    if group.color:
        factors = draw_color_factors(group.color, rng)
        for name in order:
            x = adjust_color(x, name, factors[name]).floor()  # torchvision rounds down after each change
    if group.grey:
        x = torch.where(chosen(group.grey), grey(x), x)
    if group.blur:
        weights = blur_weights(x.shape[-1], group, rng)
        x = apply_weights(x, weights, weights)
    if group.solarise:
        x = torch.where(chosen(group.solarise) & (x >= 128), 255 - x, x)
    return x


def draw_color_factors(color: ColorChange, rng: KeyedRNG) -> dict[str, Tensor]:
    """A factor [B, 1, 1, 1, 1] for each change, of the hue a shift; those of a clip that is not changed leave
    it as it is."""
    is_changed = rng.rand(1, 1, 1, 1) < color.p
    factors = {}
    for name in COLOR_CHANGES:
        largest = getattr(color, name)
        u = rng.rand(1, 1, 1, 1)
        lowest = -largest if name == "hue" else max(0.0, 1 - largest)
        highest = largest if name == "hue" else 1 + largest
        neutral = 0.0 if name == "hue" else 1.0
        factors[name] = torch.where(is_changed, lowest + (highest - lowest) * u, neutral)
    return factors


def blur_weights(size: int, group: ViewGroup, rng: KeyedRNG) -> Tensor:
    """f32 [B, size, size]: a Gaussian along an axis, cut at the edges."""
    low, high = group.blur_sigma
    sigma = torch.where(rng.rand(1, 1) < group.blur, low + (high - low) * rng.rand(1, 1), NO_BLUR)
    place = torch.arange(size, device=sigma.device, dtype=torch.float32)
    weights = (-((place - place[:, None]) / sigma).square() / 2).exp()
    return weights / weights.sum(-1, keepdim=True)

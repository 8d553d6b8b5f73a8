"""Pixel statistics: the per-channel mean and deviation with which clips are normalised."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidssl.core.constants import constant

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of pixels in [0, 1]
STD = (0.229, 0.224, 0.225)


def channel_statistics(
    video: Tensor, pixels: Sequence[Sequence[float]] = (MEAN, STD)
) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each f32 [3, 1, 1, 1], on the device of the video. pixels: (mean, std)."""
    mean, std = (constant(tuple(values), video.device).view(3, 1, 1, 1) for values in pixels)
    return mean, std


def renormalise(video: Tensor, pixels: Sequence[Sequence[float]]) -> Tensor:
    """Maps a video f32 [B, 3, T, H, W] that `normalise` made to one of other statistics (mean, std)."""
    if [list(values) for values in pixels] == [list(MEAN), list(STD)]:
        return video
    mean, std = channel_statistics(video)
    other_mean, other_std = channel_statistics(video, pixels)
    return (video * std + mean - other_mean) / other_std


def normalise(video: Tensor, pixels: Sequence[Sequence[float]] = (MEAN, STD)) -> Tensor:
    """Maps u8 [B, 3, T, H, W] to f32, every channel minus its mean and divided by its deviation. pixels:
    (mean, std)."""
    mean, std = channel_statistics(video, pixels)
    return video.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)

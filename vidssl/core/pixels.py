"""Pixel statistics: the per-channel mean and deviation that clips are normalised with."""

from collections.abc import Sequence

import torch
from torch import Tensor

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's; a clip is normalised with these on the device


def channel_statistics(
    video: Tensor, pixels: Sequence[Sequence[float]] = (MEAN, STD)
) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each f32 [3, 1, 1, 1], where the video is."""
    mean, std = (torch.tensor(v, device=video.device).view(3, 1, 1, 1) for v in pixels)
    return mean, std


def normalise(video: Tensor, pixels: Sequence[Sequence[float]] = (MEAN, STD)) -> Tensor:
    """u8 [B, 3, T, H, W] -> f32, with the mean and deviation of each colour taken out."""
    mean, std = channel_statistics(video, pixels)
    return (video.float() / 255 - mean) / std

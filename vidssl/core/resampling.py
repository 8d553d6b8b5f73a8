"""Resizing of frames on a device: rows and columns of the result are weighted sums of those of the input,
with the triangle filter of torchvision's antialiased resize."""

from einops import rearrange
from torch import Tensor


def triangle_weights(start: Tensor, extent: Tensor, outputs: Tensor, place: Tensor, pixel: Tensor) -> Tensor:
    """Weights of the pixels from start to start + extent, resized to `outputs`: [B, 1, 1] each.

    place [B, n, 1]: which of the outputs; pixel [B, 1, m]: which pixels. Returns f32 [B, n, m].
    """
    step = extent / outputs
    centre = start + (place + 0.5) * step
    weights = (1 - (pixel + 0.5 - centre).abs() / step.clamp_min(1)).clamp_min(0)
    weights = weights * ((pixel >= start.floor()) & (pixel < (start + extent).ceil()))
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)


def apply_weights(planes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """planes [B, C, T, H, W], rows [B, S, H], columns [B, S, W] -> [B, C, T, S, S]."""
    channels, frames = planes.shape[1:3]
    narrow = columns @ rearrange(planes, "b c t h w -> b w (c t h)")
    small = rearrange(narrow, "b s (n h) -> b (s n) h", h=rows.shape[2]) @ rows.mT
    return rearrange(small, "b (w c t) h -> b c t h w", c=channels, t=frames)

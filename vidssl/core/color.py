"""Changes of colour of clips on a device, as torchvision makes them in 8-bit frames."""

import torch
from torch import Tensor

# in the order in which torchvision numbers them
COLOR_CHANGES = ("brightness", "contrast", "saturation", "hue")
GREY = (0.2989, 0.587, 0.114)  # as torchvision weighs colours


def grey(clips: Tensor) -> Tensor:
    """f32 [B, 3, T, S, S] -> f32 [B, 1, T, S, S], rounded down."""
    red, green, blue = clips.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue).floor()[:, None]


def adjust_color(clips: Tensor, name: str, factor: Tensor) -> Tensor:
    """Grey levels f32 [B, 3, T, S, S] -> the same; factor [B, 1, 1, 1, 1]. As torchvision's adjust_`name`."""
    if name == "hue":
        return shift_hue(clips / 255, factor) * 255.999
    if name == "brightness":
        other = torch.zeros((), device=clips.device)
    else:
        other = grey(clips)
        if name == "contrast":
            other = other.mean((-2, -1), keepdim=True)
    return (factor * clips + (1 - factor) * other).clamp(0, 255)


def shift_hue(clips: Tensor, shift: Tensor) -> Tensor:
    """RGB in 0..1 [B, 3, T, S, S] -> the same, hues moved by `shift` of the circle."""
    red, green, blue = clips.split(1, dim=1)
    value = clips.amax(1, keepdim=True)
    chroma = value - clips.amin(1, keepdim=True)
    divisor = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    corner = 5 - 2 * torch.arange(3, device=clips.device).view(3, 1, 1, 1)
    k = (corner + sixth + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

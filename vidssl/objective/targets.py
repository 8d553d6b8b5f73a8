"""Targets: what is predicted at a token. A target maps the whole clip to [B, N, K]; `width` is K."""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidssl.model.grid import patchify
from vidssl.model.vit import Encoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's; a clip is normalised with these on the device


def colour_statistics(video: Tensor) -> tuple[Tensor, Tensor]:
    """MEAN and STD, each f32 [3, 1, 1, 1], where the video is."""
    mean, std = (torch.tensor(v, device=video.device).view(3, 1, 1, 1) for v in (MEAN, STD))
    return mean, std


def normalise(video: Tensor) -> Tensor:
    """u8 [B, 3, T, H, W] -> f32, ImageNet-normalised."""
    mean, std = colour_statistics(video)
    return (video.float() / 255 - mean) / std


class Pixels(nn.Module):
    """The pixels of a patch, in (frame, row, column, colour) order; K = tubelet * patch * patch * 3.

    norm "channel": every colour of a patch has mean 0 and (unbiased) deviation 1, as in VideoMAE
    (engine_for_pretraining.py; epsilon 1e-6 outside the root); "none": pixels in [0, 1].
    """

    def __init__(self, encoder: Encoder, norm: Literal["channel", "none"] = "channel"):
        super().__init__()
        self.tubelet, self.patch, self.norm = encoder.tubelet, encoder.patch, norm
        self.width = 3 * encoder.tubelet * encoder.patch**2

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        mean, std = colour_statistics(video)
        x = rearrange(patchify(video.float() * std + mean, self.tubelet, self.patch), "b n c u p q -> b n (u p q) c")
        if self.norm == "channel":
            x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True).sqrt() + 1e-6)
        return x.flatten(2)


class Ema(nn.Module):
    """Layer-normed features of a momentum encoder that sees the whole clip; K = the encoder's width.

    Source: V-JEPA (arXiv 2404.08471), section 3.1, app/vjepa/train.py.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.net = copy.deepcopy(encoder).requires_grad_(False)
        self.width = encoder.dim

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        return F.layer_norm(self.net(video), (self.width,))

    @torch.no_grad()
    def update(self, encoder: Encoder, momentum: float) -> None:
        """net <- momentum * net + (1 - momentum) * encoder."""
        torch._foreach_lerp_(list(self.net.parameters()), list(encoder.parameters()), 1 - momentum)


TARGETS = {"pixels": Pixels, "ema": Ema}

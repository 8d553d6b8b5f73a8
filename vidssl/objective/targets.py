"""Targets: what is predicted at a token. A target maps the whole clip to [B, N, K]; `width` is K."""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidssl.config import Count
from vidssl.core.errors import UserError
from vidssl.core.pixels import channel_statistics
from vidssl.model.grid import patchify
from vidssl.model.vit import Encoder
from vidssl.pretrained.files import load_encoder


class Pixels(nn.Module):
    """The pixels of a patch, in (frame, row, column, colour) order; K = frames * patch * patch * 3.

    norm "channel": every colour of a patch has mean 0 and (unbiased) deviation 1, as in VideoMAE
    (engine_for_pretraining.py; epsilon 1e-6 outside the root); "patch": all of a patch together, as in MAE and MAE-ST
    (models_mae.py; epsilon inside the root); "none". space: pixels in [0, 1] ("rgb", VideoMAE) or as the encoder gets
    them ("normalised", MAE and MAE-ST). per_tubelet: frames of each tubelet that are to be predicted, evenly chosen
    over the clip (MAE-ST: 1 of 2); None: all.
    """

    def __init__(
        self,
        encoder: Encoder,
        norm: Literal["channel", "patch", "none"] = "channel",
        space: Literal["rgb", "normalised"] = "rgb",
        per_tubelet: Count | None = None,
    ):
        super().__init__()
        self.tubelet, self.patch, self.norm, self.space = encoder.tubelet, encoder.patch, norm, space
        self.frames = per_tubelet or encoder.tubelet
        if self.frames > encoder.tubelet:
            raise UserError(f"method.target.per_tubelet: {self.frames} of {encoder.tubelet} frames")
        self.width = 3 * self.frames * encoder.patch**2

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        eps: float | Tensor = 1e-6
        if self.space == "rgb":
            mean, std = channel_statistics(video)
            if self.norm == "channel":  # then what a colour is multiplied with is of no account but here
                eps = eps / std.view(3, 1)
            else:
                video = video.float() * std + mean
        if self.frames < self.tubelet:
            count = video.shape[2] // self.tubelet * self.frames
            video = video[:, :, torch.linspace(0, video.shape[2] - 1, count).long()]
        x = rearrange(patchify(video.float(), self.frames, self.patch), "b n c u p q -> b n c (u p q)")
        if self.norm != "none":
            over = -1 if self.norm == "channel" else (2, 3)
            x = x - x.mean(over, keepdim=True)
            squares = torch.linalg.vector_norm(
                x, dim=over, keepdim=True
            ).square()  # CPUs are quicker at it than at var
            variance = squares / (x[0, 0].numel() // squares[0, 0].numel() - 1)
            x = x.div_(variance.sqrt() + eps if self.norm == "channel" else (variance + eps).sqrt())
        return rearrange(x, "b n c k -> b n (k c)")


def level_norm(features: Tensor, dim: int) -> Tensor:
    """[B, N, levels * dim], every level layer-normed by itself, without weights."""
    return F.layer_norm(features.unflatten(-1, (-1, dim)), (dim,)).flatten(2)


class Ema(nn.Module):
    """Layer-normed features of a momentum encoder that sees the whole clip; K = the encoder's width, all its levels.

    Source: V-JEPA (arXiv 2404.08471), section 3.1, app/vjepa/train.py; levels: V-JEPA 2.1, app/vjepa_2_1/train.py.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.encoder.blocks.set_drop_path(0.0)
        self.width = encoder.width

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        features = self.encoder(video, full=True)
        return level_norm(features[:, int(self.encoder.class_token is not None) :], self.encoder.dim)

    @torch.no_grad()
    def update(self, encoder: Encoder, momentum: float) -> None:
        """self.encoder <- momentum * self.encoder + (1 - momentum) * encoder."""
        torch._foreach_lerp_(list(self.encoder.parameters()), list(encoder.parameters()), 1 - momentum)


class Teacher(nn.Module):
    """Layer-normed last features of a frozen, larger encoder: distillation (V-JEPA 2.1's ViT-B and ViT-L).

    The teacher is read from `path` at every start and is not part of the checkpoints. It must cut a clip into the same
    tokens.
    """

    def __init__(self, encoder: Encoder, path: str):
        super().__init__()
        net = load_encoder(path).encoder
        if (net.tubelet, net.patch) != (encoder.tubelet, encoder.patch):
            raise UserError(
                f"method.target.path: {path} cuts tokens of {net.tubelet} frames x {net.patch} px, this model of "
                f"{encoder.tubelet} x {encoder.patch}"
            )
        self.hidden = [net]  # in a list, so that it is no sub-module
        self.width = net.dim

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        self.hidden[0] = self.hidden[0].to(video.device)
        return level_norm(self.hidden[0](video), self.width)


TARGETS = {"pixels": Pixels, "ema": Ema, "teacher": Teacher}

"""The target of self-distillation: features of an exponential moving average of the encoder."""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vidssl.config import Fraction
from vidssl.model.vit import Encoder
from vidssl.objective.target_base import Target

FeatureNorm = Literal["layer", "instance", "none"]


def normalise_features(features: Tensor, dim: int, norm: FeatureNorm) -> Tensor:
    """features [B, N, levels * dim]. layer: every token and level has mean 0 and deviation 1; instance: every
    dimension has, over the tokens of a clip."""
    if norm == "layer":
        return level_norm(features, dim)
    if norm == "instance":
        return F.instance_norm(features.float().transpose(1, 2)).transpose(1, 2)
    return features


def without_class_token(encoder: Encoder, features: Tensor) -> Tensor:
    """features [B, (1 +) N, D] to [B, N, D]."""
    return features[:, int(encoder.class_token is not None) :]


def level_norm(features: Tensor, dim: int) -> Tensor:
    """Layer-norms every level of features [B, N, levels * dim] by itself, without weights."""
    return F.layer_norm(features.unflatten(-1, (-1, dim)), (dim,)).flatten(2)


class Ema(Target):
    """Layer-normed features of an EMA encoder that sees the whole clip; K = the width of all its levels.

    Source: V-JEPA (arXiv 2404.08471), section 3.1, app/vjepa/train.py; levels: V-JEPA 2.1,
    app/vjepa_2_1/train.py.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, momentum: tuple[Fraction, Fraction] = (0.998, 1.0)):
        super().__init__(encoder.feature_width, momentum)
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        features = self.encoder(video, return_levels=True)
        return level_norm(without_class_token(self.encoder, features), self.encoder.dim)

    @torch.no_grad()
    def update(self, encoder: Encoder, momentum: float) -> None:
        """self.encoder = momentum * self.encoder + (1 - momentum) * encoder."""
        torch._foreach_lerp_(list(self.encoder.parameters()), list(encoder.parameters()), 1 - momentum)

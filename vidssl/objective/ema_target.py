"""The target of self-distillation: features of an exponential moving average of the encoder."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from vidssl.config import Fraction, PositiveInt
from vidssl.core.errors import UserError
from vidssl.model.prediction import Encoded
from vidssl.model.vit import Encoder
from vidssl.objective.averages import average_of, update_averages
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
    """Features of an EMA encoder that sees the whole clip, layer-normed; K = the width of all its levels.

    Source: V-JEPA (arXiv 2404.08471), section 3.1, app/vjepa/train.py; levels: V-JEPA 2.1,
    app/vjepa_2_1/train.py; layers: data2vec 2.0 (arXiv 2212.07525; fairseq, make_targets); sees: Latent MIM
    (arXiv 2407.15837; models_lmim.py).
    """

    encoder: Encoder

    def __init__(
        self,
        encoder: Encoder,
        momentum: tuple[Fraction, Fraction] = (0.998, 1.0),
        layers: PositiveInt | None = None,
        which: Literal["output", "mlp"] = "output",
        layer_norm: FeatureNorm = "instance",
        norm: FeatureNorm = "layer",
        sees: Literal["whole", "hidden"] = "whole",
    ):
        """layers: the mean of so many last blocks is the target, of their outputs or (mlp) of their MLPs'
        before the residual; null: the encoder's output. layer_norm: of each of these layers; norm: of the
        target; both see normalise_features. sees: the whole clip, or the hidden tokens alone."""
        super().__init__(encoder.feature_width if layers is None else encoder.dim, momentum)
        if layers is not None and layers > len(encoder.blocks):
            raise UserError(f"method.target.layers: {layers} of an encoder with {len(encoder.blocks)} blocks")
        self.encoder = average_of(encoder)
        self.layers = layers
        self.which: Literal["output", "mlp"] = which
        self.layer_norm: FeatureNorm = layer_norm
        self.norm: FeatureNorm = norm
        self.per_mask = sees == "hidden"

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        return self.features(video)

    @torch.no_grad()
    def features(self, video: Tensor, ids: Tensor | None = None) -> Tensor:
        """[B, N, K]; of ids i64 [B, n], which alone are seen, [B, n, K]."""
        if self.layers is None:
            features = self.encoder(video, ids, return_levels=True)
            return normalise_features(
                without_class_token(self.encoder, features), self.encoder.dim, self.norm
            )
        features = self.encoder(video, ids, all_layers="mlp" if self.which == "mlp" else True)
        features = without_class_token(self.encoder, features)
        chosen = features.unflatten(-1, (-1, self.encoder.dim))[:, :, -self.layers :].unbind(2)
        normed = [normalise_features(layer, self.encoder.dim, self.layer_norm) for layer in chosen]
        return normalise_features(torch.stack(normed).mean(0), self.encoder.dim, self.norm)

    def for_mask(self, encoded: Encoded) -> Tensor:
        """[B, M, Nt, K]: each group of targets is seen by itself."""
        groups = encoded.mask.target.shape[1]
        video = repeat(encoded.video, "b ... -> (b m) ...", m=groups)
        return self.features(video, encoded.mask.target.flatten(0, 1)).unflatten(0, (-1, groups))

    def update(self, encoder: Encoder, momentum: float) -> None:
        update_averages([self.encoder], [encoder], momentum)

"""Errors: how a prediction is compared with its target.

`scale` multiplies an error: data2vec 2.0 has sums over the K dimensions divided by sqrt(K), which is the mean
times sqrt(K).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vidssl.config import PositiveFloat
from vidssl.core.precision import without_autocast
from vidssl.objective.feature_targets import SwappedClusters

ErrorFunction = Callable[[Tensor, Tensor], Tensor]  # prediction and target [B, M, Nt, K] to [B, M, Nt]


def l1(scale: PositiveFloat = 1.0) -> ErrorFunction:
    """Mean absolute difference over K: V-JEPA."""
    return lambda pred, target: scale * (pred - target).abs().mean(-1)


def l2(scale: PositiveFloat = 1.0) -> ErrorFunction:
    """Mean squared difference over K: MAE, VideoMAE."""
    return lambda pred, target: scale * F.mse_loss(pred, target, reduction="none").mean(-1)


def smooth_l1(scale: PositiveFloat = 1.0, beta: PositiveFloat = 1.0) -> ErrorFunction:
    """Mean of Huber's loss over K: I-JEPA. beta: below it the error is squared."""
    return lambda pred, target: scale * F.smooth_l1_loss(pred, target, reduction="none", beta=beta).mean(-1)


def cross_entropy(temperature: PositiveFloat = 0.1, scale: PositiveFloat = 1.0) -> ErrorFunction:
    """Cross-entropy of softmax(prediction / temperature) with the probabilities of the target: CAPI, iBOT."""
    return lambda pred, target: -scale * (target * (pred / temperature).log_softmax(-1)).sum(-1)


def nce(
    temperature: PositiveFloat = 0.2, standardise: bool = True, scale: PositiveFloat = 1.0
) -> ErrorFunction:
    """Which hidden token of the same clip and group a prediction belongs to, by softmax of cosine /
    temperature.

    standardise: predictions have mean 0 and deviation 1 in each dimension over the tokens first.
    Source: Latent MIM (arXiv 2407.15837, section 3; models_lmim.py, infonce_patches), whose scale is 2 *
    temperature.
    """

    def error(pred: Tensor, target: Tensor) -> Tensor:
        if standardise:
            pred = (pred - pred.mean(2, keepdim=True)) / (pred.std(2, keepdim=True) + 1e-4)
        with without_autocast(pred.device):
            cosines = F.normalize(pred, dim=-1) @ F.normalize(target, dim=-1).transpose(-1, -2)
        right = (cosines / temperature).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
        return -scale * right

    return error


def weighted_l2(scale: PositiveFloat = 1.0) -> ErrorFunction:
    """Sum over K of weight * squared error; the target is [B, M, Nt, 2 K]: K values, then K weights."""

    def error(pred: Tensor, target: Tensor) -> Tensor:
        values, weights = target.chunk(2, -1)
        return scale * ((pred - values).square() * weights).sum(-1)

    return error


ERRORS: dict[str, Callable[..., ErrorFunction]] = {
    "l1": l1,
    "l2": l2,
    "weighted_l2": weighted_l2,
    "smooth_l1": smooth_l1,
    "cross_entropy": cross_entropy,
    "nce": nce,
    "swapped_clusters": SwappedClusters,
}

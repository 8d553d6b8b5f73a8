"""Auxiliary losses of features: they keep the tokens of a method without a teacher apart."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vidssl.config import Fraction, NonNegativeFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.schedules import cosine
from vidssl.model.prediction import Predicted
from vidssl.model.vit import Encoder
from vidssl.objective.auxiliary_base import Auxiliary
from vidssl.objective.embedding_losses import covariance, random_directions, sigreg, variance_hinge
from vidssl.objective.global_batch import mean_over_processes

Features = Literal["target", "prediction", "context", "changes"]
OF_TARGET = ("target", "changes")  # which move nothing where the target has no gradients


def features_of(predicted: Predicted, tokens: Features) -> Tensor:
    """The hidden tokens' targets or predictions, the tokens that the encoder saw, or how the targets of all
    tokens change within a clip: less their mean over time at each place; [B, n, D] each."""
    if tokens == "context":
        return predicted.encoded.z
    if tokens == "changes":
        assert predicted.features is not None
        slices = predicted.features.unflatten(1, (predicted.encoded.grid.t, -1))
        return (slices - slices.mean(1, keepdim=True)).flatten(1, 2)
    return (predicted.target if tokens == "target" else predicted.prediction.target).flatten(1, 2)


class FeatureSigreg(Auxiliary):
    """SIGReg: how far tokens of all clips together are from N(0, I), times the number of clips.

    Source: LeJEPA (arXiv 2511.08544), whose embeddings are one for each view.
    """

    couples_clips = True

    def __init__(self, weight: NonNegativeFloat, tokens: Features = "target", directions: PositiveInt = 256):
        """tokens: of which it is (changes: over time at each place, of the targets); directions: on which
        they are projected, new ones in each step."""
        super().__init__(weight)
        self.tokens = tokens
        self.reads_class = tokens == "context"
        self.directions = directions

    def forward(self, predicted: Predicted) -> Tensor:
        tokens = features_of(predicted, self.tokens)
        directions = random_directions(predicted.encoded.rng, tokens.shape[-1], self.directions)
        return sigreg(tokens.flatten(0, 1)[None], directions) / tokens.shape[1]


class FeatureVarianceCovariance(Auxiliary):
    """VICReg's variance and covariance of tokens of all clips together (arXiv 2105.04906, eq. 1 and 3)."""

    couples_clips = True

    def __init__(
        self,
        weight: NonNegativeFloat,
        tokens: Features = "target",
        variance: NonNegativeFloat = 25.0,
        covariance: NonNegativeFloat = 1.0,
    ):
        """tokens: of which it is (changes: over time at each place, of the targets); variance, covariance:
        weights of the two terms, those of VICReg."""
        super().__init__(weight)
        self.tokens = tokens
        self.reads_class = tokens == "context"
        self.variance = variance
        self.covariance = covariance

    def forward(self, predicted: Predicted) -> Tensor:
        tokens = features_of(predicted, self.tokens).flatten(0, 1)[None]
        return self.variance * variance_hinge(tokens) + self.covariance * covariance(tokens)


class ClassMean(Auxiliary):
    """Squared error between the encoder's class token and the mean target of all tokens of the clip.

    Source: data2vec 2.0 (arXiv 2212.07525; fairseq, data2vec2.py, cls_loss), whose sum over the clips and
    masks of a device, divided by the root of the width, is this times their number and that root.
    """

    reads_class = True

    def __init__(self, weight: NonNegativeFloat, encoder: Encoder, target_width: int):
        super().__init__(weight)
        if encoder.class_token is None or target_width != encoder.dim:
            raise UserError(
                "method.aux: class_mean needs model.class_token, and a target as wide as the encoder"
            )

    def forward(self, predicted: Predicted) -> Tensor:
        assert predicted.features is not None
        return F.mse_loss(predicted.encoded.z[:, 0].float(), predicted.features.float().mean(1))


class Similarity(Auxiliary):
    """Squared distance of the mean cosine of all pairs of tokens of a clip, over all clips, from a wanted
    one; of the predictions and of the tokens that the encoder saw, summed.

    Source: Latent MIM (arXiv 2407.15837; models_lmim.py, avg_pairwise_sim), where the wanted similarity falls
    from 0.75 to 0.25 with half a cosine.
    """

    couples_clips = True

    def __init__(
        self,
        weight: NonNegativeFloat,
        wanted: tuple[Fraction, Fraction] = (0.75, 0.25),
        steps: PositiveInt = 1,
    ):
        """wanted: mean cosine at the first step and from step `steps` on."""
        super().__init__(weight)
        self.wanted = wanted
        self.steps = steps

    def forward(self, predicted: Predicted) -> Tensor:
        encoded = predicted.encoded
        seen = encoded.z[:, -encoded.mask.context.shape[1] :]
        wanted = cosine(*self.wanted, min(1.0, encoded.rng.step / self.steps))
        of_predictions = mean_pair_cosine(predicted.prediction.target.flatten(0, 1))
        return (of_predictions - wanted).square() + (mean_pair_cosine(seen) - wanted).square()


def mean_pair_cosine(tokens: Tensor) -> Tensor:
    """Mean cosine of all pairs of tokens [B, n, K] of a clip, a token and itself included, over the clips of
    all processes."""
    total = F.normalize(tokens.float(), dim=-1).sum(1) / tokens.shape[1]
    return mean_over_processes(total.square().sum(-1).mean())

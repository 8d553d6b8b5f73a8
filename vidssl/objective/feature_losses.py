"""Auxiliary losses of features: they keep the tokens of a method without a teacher apart."""

from typing import Literal

from torch import Tensor

from vidssl.config import NonNegativeFloat, PositiveInt
from vidssl.model.prediction import Predicted
from vidssl.objective.auxiliary_base import Auxiliary
from vidssl.objective.embedding_losses import covariance, random_directions, sigreg, variance_hinge

Features = Literal["target", "prediction", "context"]


def features_of(predicted: Predicted, on: Features) -> Tensor:
    """The hidden tokens' targets or predictions, or the tokens that the encoder saw, [B, n, D] each."""
    if on == "context":
        return predicted.encoded.z
    return (predicted.target if on == "target" else predicted.prediction.target).flatten(1, 2)


class FeatureSigreg(Auxiliary):
    """SIGReg: how far tokens of all clips together are from N(0, I), times the number of clips.

    Source: LeJEPA (arXiv 2511.08544), whose embeddings are one for each view.
    """

    couples_clips = True

    def __init__(self, weight: NonNegativeFloat, on: Features = "target", directions: PositiveInt = 256):
        """on: which tokens; directions: on which they are projected, new ones in each step."""
        super().__init__(weight)
        self.on = on
        self.directions = directions

    def forward(self, predicted: Predicted) -> Tensor:
        tokens = features_of(predicted, self.on)
        directions = random_directions(predicted.encoded.rng, tokens.shape[-1], self.directions)
        return sigreg(tokens.flatten(0, 1)[None], directions) / tokens.shape[1]


class FeatureVarianceCovariance(Auxiliary):
    """VICReg's variance and covariance of tokens of all clips together (arXiv 2105.04906, eq. 1 and 3)."""

    couples_clips = True

    def __init__(
        self,
        weight: NonNegativeFloat,
        on: Features = "target",
        variance: NonNegativeFloat = 25.0,
        covariance: NonNegativeFloat = 1.0,
    ):
        """on: which tokens; variance, covariance: weights of the two terms, those of VICReg."""
        super().__init__(weight)
        self.on = on
        self.variance = variance
        self.covariance = covariance

    def forward(self, predicted: Predicted) -> Tensor:
        tokens = features_of(predicted, self.on).flatten(0, 1)[None]
        return self.variance * variance_hinge(tokens) + self.covariance * covariance(tokens)

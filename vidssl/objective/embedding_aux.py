"""Losses that keep the embeddings of views apart, added to their agreement with a weight (method.agree.aux).

A part maps embeddings [V, B, K] of the online views, their cosines with the prototypes [V, B, P] (None where
there are none) and the rng of the clips to a scalar.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vidssl.config import NonNegativeFloat, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.objective.embedding_losses import (
    covariance,
    entropy_gap,
    koleo,
    random_directions,
    sigreg,
    variance_hinge,
)


class EmbeddingAux(Protocol):
    """A part of the table."""

    @property
    def weight(self) -> float: ...

    def __call__(self, embeddings: Tensor, cosines: Tensor | None, rng: KeyedRNG) -> Tensor: ...


@dataclass(frozen=True)
class SigRegAux:
    """SIGReg along new directions in each step. Its value is near 1.05 where embeddings are N(0, I), and
    0.402 times the clips of the global batch where all are 0; so its pull grows with the batch."""

    weight: NonNegativeFloat = 0.02
    directions: PositiveInt = 1024
    points: PositiveInt = 17  # of the characteristic function
    largest: PositiveFloat = 3.0  # point

    def __call__(self, embeddings: Tensor, cosines: Tensor | None, rng: KeyedRNG) -> Tensor:
        directions = random_directions(rng, embeddings.shape[-1], self.directions)
        return sigreg(embeddings, directions, self.points, self.largest)


@dataclass(frozen=True)
class VarianceCovarianceAux:
    """VICReg's terms of variance and covariance."""

    weight: NonNegativeFloat = 1.0
    variance: NonNegativeFloat = 25.0
    covariance: NonNegativeFloat = 1.0

    def __call__(self, embeddings: Tensor, cosines: Tensor | None, rng: KeyedRNG) -> Tensor:
        return self.variance * variance_hinge(embeddings) + self.covariance * covariance(embeddings)


@dataclass(frozen=True)
class KoLeoAux:
    """KoLeo of the embeddings; DINOv2 applies it to the class token instead."""

    weight: NonNegativeFloat = 0.1

    def __call__(self, embeddings: Tensor, cosines: Tensor | None, rng: KeyedRNG) -> Tensor:
        return koleo(embeddings)


@dataclass(frozen=True)
class MeanEntropyAux:
    """MSN's mean entropy maximisation: 0 where all prototypes are used evenly."""

    weight: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 0.1

    def __call__(self, embeddings: Tensor, cosines: Tensor | None, rng: KeyedRNG) -> Tensor:
        if cosines is None:
            raise UserError("method.agree.aux: me_max needs prototypes, as agreement.kind=cross_entropy has")
        return entropy_gap((cosines / self.temperature).softmax(-1))


EMBEDDING_AUX = {
    "sigreg": SigRegAux,
    "variance_covariance": VarianceCovarianceAux,
    "koleo": KoLeoAux,
    "me_max": MeanEntropyAux,
}

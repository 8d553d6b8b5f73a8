"""Auxiliary losses, added to the loss of a masked prediction with a weight."""

from collections.abc import Callable

from vidssl.objective.auxiliary_base import Auxiliary
from vidssl.objective.feature_losses import (
    ClassMean,
    FeatureSigreg,
    FeatureVarianceCovariance,
    Similarity,
)

AUX: dict[str, Callable[..., Auxiliary]] = {
    "sigreg": FeatureSigreg,
    "variance_covariance": FeatureVarianceCovariance,
    "class_mean": ClassMean,
    "similarity": Similarity,
}

"""Auxiliary losses, added to the loss of a masked prediction with a weight."""

from collections.abc import Callable

from vidssl.objective.auxiliary_base import Auxiliary
from vidssl.objective.feature_losses import FeatureSigreg, FeatureVarianceCovariance

AUX: dict[str, Callable[..., Auxiliary]] = {
    "sigreg": FeatureSigreg,
    "variance_covariance": FeatureVarianceCovariance,
}

"""Products that are divided by a small temperature are made in f32 under autocast, too."""

import pytest
import torch
from torch import Tensor

from vidssl.model.cosine import WeightNormedCosine
from vidssl.model.vit import Encoder
from vidssl.objective.errors import ERRORS
from vidssl.objective.feature_targets import Clusters
from vidssl.objective.projector import Prototypes


def clusters(x: Tensor) -> Tensor:
    """Of the same tokens, whatever the encoder is computed in."""
    target = Clusters(Encoder(2, 8, 8, 32, 1, 2, patch=8), clusters=64)
    target.encoder.forward = lambda video: x[:, 0]  # type: ignore[method-assign]
    return target.logits(x)


CASES = {
    "prototypes": lambda x: Prototypes(32, 64)(x),
    "head": lambda x: WeightNormedCosine(32, 64)(x),
    "clusters": clusters,
    "swapped_clusters": lambda x: ERRORS["swapped_clusters"](width=32, clusters=64)(x, x.flip(0)),
    "nce": lambda x: ERRORS["nce"]()(x, x + 0.1 * x.flip(0)),
}


@pytest.mark.parametrize("kind", CASES)
def test_autocast_rounds_no_cosine(kind):
    found = []
    for enabled in (False, True):
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(2, 1, 6, 32, generator=rng)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(CASES[kind](x))
    assert found[1].dtype == torch.float32 and torch.equal(*found)

"""Errors by hand on a few tokens."""

import math

import pytest
import torch

from vidssl.objective.errors import ERRORS

PRED = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(1))


def test_smooth_l1_is_squared_below_beta():
    error = ERRORS["smooth_l1"](beta=2.0, scale=3.0)
    pred = torch.tensor([[[[1.0, 5.0]]]])
    assert error(pred, torch.zeros_like(pred)).item() == pytest.approx(3 * (0.5 * 1 / 2 + 5 - 1) / 2)


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1", "nce", "cross_entropy"])
def test_scale_multiplies(kind):
    torch.testing.assert_close(ERRORS[kind](scale=2.5)(PRED, TARGET), 2.5 * ERRORS[kind]()(PRED, TARGET))


def test_cross_entropy_of_soft_targets():
    target = TARGET.softmax(-1)
    found = ERRORS["cross_entropy"](temperature=0.5)(PRED, target)
    for clip in range(2):
        for token in range(3):
            weights = [math.exp(v / 0.5) for v in PRED[clip, 0, token]]
            want = -sum(
                t * math.log(w / sum(weights)) for t, w in zip(target[clip, 0, token], weights, strict=True)
            )
            assert found[clip, 0, token].item() == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("standardise", [True, False])
def test_nce_asks_for_the_token_of_the_same_clip(standardise):
    found = ERRORS["nce"](temperature=0.2, standardise=standardise, scale=0.4)(PRED, TARGET)
    for clip in range(2):
        pred = PRED[clip, 0]
        if standardise:
            pred = (pred - pred.mean(0)) / (pred.std(0) + 1e-4)
        cosine = torch.cosine_similarity(pred[:, None], TARGET[clip, 0][None], dim=-1) / 0.2
        for token in range(3):
            want = -0.4 * (cosine[token, token] - cosine[token].exp().sum().log())
            torch.testing.assert_close(found[clip, 0, token], want)

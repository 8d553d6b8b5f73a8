"""Losses of embeddings on cases whose values are known."""

import math

import pytest
import torch

from vidssl.core.rng import KeyedRNG
from vidssl.objective import embedding_losses
from vidssl.objective.embedding_losses import entropy_gap, koleo, random_directions, sigreg
from vidssl.objective.pair_losses import NCE, ClusterCrossEntropy

PAIRS = [(0, 1), (1, 0)]


def directions_of_step(step: int) -> torch.Tensor:
    return random_directions(KeyedRNG(0, step, torch.arange(4)), 64, 48)


@pytest.mark.parametrize("clips", [64, 512])
def test_sigreg_of_normal_samples_is_near_its_expectation_and_of_a_constant_is_not(clips):
    x = torch.randn(32, clips, 64, generator=torch.Generator().manual_seed(0))
    assert sigreg(x, directions_of_step(0)) == pytest.approx(1.05, rel=0.1)
    assert sigreg(0 * x, directions_of_step(0)) == pytest.approx(0.402 * clips, rel=1e-3)


def test_directions_are_those_of_the_step():
    drawn = directions_of_step(1)
    torch.testing.assert_close(drawn.norm(dim=0), torch.ones(48))
    assert not torch.equal(drawn, directions_of_step(2))
    assert torch.equal(drawn, random_directions(KeyedRNG(0, 1, torch.arange(9)), 64, 48))
    assert drawn.mean().abs() < 0.05


def test_nce_of_equal_views():
    """Orthogonal embeddings: the right answer has cosine 1, every wrong one 0."""
    x = torch.eye(5)[None].expand(2, 5, 5)
    for own_view, wrong in ((False, 4), (True, 8)):
        loss = NCE(0.5, own_view)(3 * x, x, PAIRS)
        assert loss.item() == pytest.approx(math.log(1 + wrong * math.exp(-2)), rel=1e-5)


def test_koleo_grows_as_neighbours_come_near():
    x = torch.eye(4)[None]
    assert koleo(x).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-5)
    assert koleo(x + 0.5) > koleo(x)


def test_entropy_gap_is_of_the_mean_assignment():
    one_hot = torch.eye(4)[None]
    assert entropy_gap(one_hot).item() == pytest.approx(0, abs=1e-6)
    assert entropy_gap(one_hot[:, :1]).item() == pytest.approx(math.log(4))


def test_centre_and_temperature_of_the_targets_move_with_the_steps():
    loss = ClusterCrossEntropy(3, 0.1, 0.04, 0.07, temperature_warmup=10)
    assert [round(loss.temperature_at(step), 4) for step in (0, 5, 10, 99)] == [0.04, 0.055, 0.07, 0.07]
    cosines = torch.rand(2, 4, 3)
    loss(cosines, cosines, PAIRS)
    assert loss.centre.tolist() == [0, 0, 0]
    loss.update(None, 0.0)
    torch.testing.assert_close(loss.centre, 0.1 * cosines.mean((0, 1)))
    loss.update(None, 0.0)
    torch.testing.assert_close(loss.centre, 0.1 * cosines.mean((0, 1)))


def test_the_centre_is_that_of_all_forward_passes_of_a_step():
    """Of every stream by its rows; those of a skipped step do not count."""
    loss = ClusterCrossEntropy(3)
    skipped, *streams = torch.rand(2, 4, 3), torch.rand(2, 4, 3), torch.rand(2, 1, 3)
    loss(skipped, skipped, PAIRS, step=1)
    for cosines in streams:
        loss(cosines, cosines, PAIRS, step=2)
    loss.update(None, 0.0)
    torch.testing.assert_close(loss.centre, 0.1 * torch.cat([c.flatten(0, 1) for c in streams]).mean(0))


def test_sigreg_in_parts_is_that_at_once(monkeypatch):
    """Value and gradients; what is kept for the backward pass does not grow with the number of points."""
    x = torch.randn(1, 40, 64, requires_grad=True)
    found, kept = [], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += tensor.numel()
        return tensor

    for limit in (10**9, 40 * 17 * 5):
        monkeypatch.setattr(embedding_losses, "MAX_ANGLES", limit)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sigreg(x, directions_of_step(0))
        found.append([loss, *torch.autograd.grad(loss, x)])
    torch.testing.assert_close(*found)
    assert kept[0] > 40 * 48 * 17 * 2 and kept[1] < kept[0] / 4

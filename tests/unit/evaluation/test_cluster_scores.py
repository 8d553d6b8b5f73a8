"""Cluster learnability and intrinsic dimension on points whose answer is known."""

import math

import pytest
import torch

from vidssl.evaluation.cluster_scores import cluster_learnability, intrinsic_dimension, kmeans


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_kmeans_finds_clusters_far_apart():
    truth = torch.arange(200) % 4
    x = 20 * torch.nn.functional.one_hot(truth, 8).float() + normal(200, 8)
    labels = kmeans(x.double(), 4, torch.Generator().manual_seed(1))
    assert len(set(zip(truth.tolist(), labels.tolist(), strict=True))) == 4


def test_clusters_apart_are_learned_and_noise_is_not():
    apart = 50 * torch.nn.functional.one_hot(torch.arange(400) % 20, 20).float() + normal(400, 20)
    noise = normal(400, 300)
    # each of 20 clusters is wrong at its first row at most
    assert cluster_learnability(apart) >= 1 - 20 / 399
    assert cluster_learnability(noise) < 0.5


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_the_dimension_of_a_flat_sheet_in_many_dimensions(dimension):
    sheet = torch.rand(1500, dimension, generator=torch.Generator().manual_seed(0))
    assert intrinsic_dimension(sheet @ normal(dimension, 40)) == pytest.approx(dimension, rel=0.15)


@pytest.mark.parametrize("rows", [torch.zeros(10, 3), torch.zeros(1, 3).repeat(4, 1)])
def test_collapsed_features_have_no_dimension_and_end_quietly(rows):
    assert math.isnan(intrinsic_dimension(rows))
    assert 0 <= cluster_learnability(rows) <= 1

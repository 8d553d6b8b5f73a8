"""Keyed random numbers: uniform, independent of the batch, a function of (seed, step, position) only."""

import pytest
import torch

from vidssl.core.rng import GOLDEN_RATIO, KeyedRNG, splitmix64

BATCH = 20000


def test_splitmix64_known_values():
    """The first outputs of the reference generator seeded with 0 (Vigna, splitmix64.c)."""
    states = torch.tensor([1, 2]) * GOLDEN_RATIO
    outputs = [x % 2**64 for x in splitmix64(states).tolist()]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_numbers_are_uniform_and_uncorrelated():
    u = KeyedRNG(0, 0, torch.arange(BATCH)).rand(3)
    assert u.shape == (BATCH, 3) and u.dtype == torch.float32
    assert u.min() >= 0 and u.max() < 1
    assert ((u.mean(0) - 0.5).abs() < 5 * (1 / 12 / BATCH) ** 0.5).all()
    neighbour = u[:, 0].roll(1)  # the same draw of the sample before
    table = torch.stack([u[1:, 0], u[1:, 1], u[1:, 2], neighbour[1:]])
    assert (torch.corrcoef(table).triu(1).abs() < 0.04).all()


def test_numbers_depend_on_seed_and_position_only():
    rng = KeyedRNG(0, 0, torch.arange(100))
    first = rng.rand(3)
    assert not rng.rand(3).equal(first)  # the next draw
    assert KeyedRNG(0, 0, torch.tensor([17])).rand(3).equal(first[17:18])
    assert KeyedRNG(0, 9, torch.tensor([17])).rand(3).equal(first[17:18])
    assert not KeyedRNG(1, 0, torch.tensor([17])).rand(3).equal(first[17:18])


def test_shared_numbers_depend_on_seed_and_step_only():
    first = KeyedRNG(0, 5, torch.tensor([1])).shared(2)
    assert first.equal(KeyedRNG(0, 5, torch.tensor([2, 3])).shared(2))
    assert not first.equal(KeyedRNG(0, 6, torch.tensor([1])).shared(2))
    assert not first.equal(KeyedRNG(1, 5, torch.tensor([1])).shared(2))


def test_streams_do_not_shift_each_other():
    one, other = (KeyedRNG(0, 0, torch.arange(4)) for _ in range(2))
    one.shared(7)
    assert one.rand(5).equal(other.rand(5))


def test_normal_numbers():
    x = KeyedRNG(0, 0, torch.arange(200)).normal(500)
    assert x.shape == (200, 500) and x.isfinite().all()
    n = x.numel()
    for power, want, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert x.pow(power).mean() == pytest.approx(want, abs=4 * (spread / n) ** 0.5)
    assert x[7:9].equal(KeyedRNG(0, 0, torch.tensor([7, 8])).normal(500))

"""Properties that every mask must have, over many seeds and small grids."""

import pytest
import torch

from vidssl.draws import Draws
from vidssl.errors import UserError
from vidssl.model.grid import Grid
from vidssl.objective.masks import BlockGroup, Blocks, Future, Random, Tube, hidden_places, kept_counts

GRIDS = [Grid(1, 2, 2), Grid(2, 2, 3), Grid(4, 4, 4), Grid(2, 7, 5), Grid(8, 14, 14)]
MASKERS = [
    Random(0.75),
    Tube(0.75),
    Blocks(),
    Blocks(truncate="raster"),
    Blocks((BlockGroup(1, 0.9),)),
    Blocks((BlockGroup(8, 0.5),), truncate="raster"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("masker", MASKERS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'truncate', '')}")
def test_context_and_target_are_disjoint_sorted_in_range_and_never_empty(masker, grid):
    for seed in range(10):
        for mask in masker(None, grid, Draws(seed, seed, torch.arange(6))):
            for context, target in zip(mask.context, mask.target, strict=True):
                assert len(context) > 0
                assert target.numel() > 0
                for ids in (context, *target):
                    assert (ids.diff() > 0).all()  # ascending, so no repeats either
                    assert 0 <= ids[0] <= ids[-1] < grid.n
                assert not set(context.tolist()) & set(target.flatten().tolist())


def test_random_and_tube_counts():
    grid = Grid(8, 14, 14)
    (mask,) = Random(0.9)(None, grid, Draws(0, 0, torch.arange(2)))
    assert mask.target.shape == (2, 1, int(0.9 * 1568))
    (mask,) = Tube(0.9)(None, grid, Draws(0, 0, torch.arange(2)))
    assert mask.context.shape == (2, 20 * 8)  # VideoMAE: int(0.9 * 196) = 176 hidden in a slice, 160 tokens visible
    places = mask.context.reshape(2, 8, 20) % 196
    assert (places == places[:, :1]).all()


@pytest.mark.parametrize("grid", [Grid(2, 2, 3), Grid(4, 4, 4), Grid(8, 3, 5)], ids=str)
def test_future_hides_one_whole_slice_and_shows_only_what_came_before(grid):
    places, ends = grid.h * grid.w, set()
    for step in range(60):
        (mask,) = Future(visible=0.5, past=1)(None, grid, Draws(0, step, torch.arange(3)))
        now = int(mask.target[0, 0, 0]) // places
        ends.add(now)
        assert (mask.target == torch.arange(now * places, (now + 1) * places)).all()
        assert mask.context.shape == (3, max(1, round(0.5 * now * places)))
        assert (mask.context.diff(dim=1) > 0).all() and mask.context.max() < now * places
        assert not mask.context[0].equal(mask.context[1]) or mask.context.shape[1] < 4
    assert ends == set(range(1, grid.t))
    for past in (grid.t, grid.t + 1):
        with pytest.raises(UserError, match=f"must lie in 1..{grid.t - 1}"):
            Future(past=past)(None, grid, Draws(0, 0, torch.arange(2)))


def test_a_ratio_that_leaves_nothing_is_an_error():
    for ratio in (0.0, 0.1, 1.0):
        with pytest.raises(UserError, match="at least one"):
            Tube(ratio)(None, Grid(2, 2, 2), Draws(0, 0, torch.arange(2)))


@pytest.mark.parametrize("masker", [Random(0.75), Tube(0.75), Future(), Blocks()], ids=lambda m: type(m).__name__)
def test_a_sample_s_mask_does_not_depend_on_its_batch(masker):
    grid = Grid(4, 8, 8)
    together = masker(None, grid, Draws(7, 3, torch.arange(12)))
    for part in (torch.arange(5), torch.arange(5, 12), torch.tensor([11, 2])):
        for whole, alone in zip(together, masker(None, grid, Draws(7, 3, part)), strict=True):
            assert whole.context[part].equal(alone.context)
            assert whole.target[part].equal(alone.target)


@pytest.mark.parametrize("masker", [Random(0.75), Blocks()], ids=lambda m: type(m).__name__)
def test_time_slices_are_treated_alike(masker):
    """Each slice's share of context and of target tokens is 1/t within 5 deviations (4,096 samples)."""
    grid = Grid(8, 6, 6)
    for mask in masker(None, grid, Draws(0, 0, torch.arange(4096))):
        for ids in (mask.context, mask.target.flatten(1)):
            share = torch.stack([(ids // 36 == t).float().mean(1) for t in range(8)], 1)  # [4096, 8]
            error = share.std(0) / 64
            assert ((share.mean(0) - 1 / 8).abs() < 5 * error + 1e-6).all()


def test_raster_truncation_drops_the_end_of_the_clip_as_the_published_sampler_does():
    """At a per-process batch of 24 and 8 x 14 x 14 tokens the last slice is in the context far less than the first."""
    first, last = 0, 0
    for step in range(40):
        positions = torch.arange(24) + 24 * step
        mask = Blocks((BlockGroup(8, 0.15),), truncate="raster")(None, Grid(8, 14, 14), Draws(0, step, positions))[0]
        first += int((mask.context < 196).sum())
        last += int((mask.context >= 7 * 196).sum())
    assert last < 0.15 * first


def test_box_area_and_place():
    """One box of scale 0.25 and aspect 1 on 8 x 8 places covers 4 x 4 of them, every allowed place alike."""
    grid, group = Grid(1, 8, 8), BlockGroup(1, 0.25)
    hidden = hidden_places(group, (1.0, 1.0), grid, Draws(0, 0, torch.arange(10000))).reshape(-1, 8, 8)
    assert (hidden.sum((1, 2)) == 16).all()
    top = hidden.any(2).float().argmax(1)
    share = torch.bincount(top, minlength=5)[:5] / 10000
    assert ((share - 0.2).abs() < 5 * (0.2 * 0.8 / 10000) ** 0.5).all()


def test_kept_counts_are_whole_slices_and_leave_room():
    for grid in GRIDS:
        for group in (BlockGroup(8, 0.15), BlockGroup(2, 0.7)):
            nc, nt = kept_counts(group, (0.75, 1.5), 0.05, grid)
            assert nc % grid.t == 0 and nt % grid.t == 0
            assert nc > 0 and nt > 0 and nc + nt <= grid.n


def test_draws_are_uniform_and_independent_of_the_others_in_the_batch():
    draws = Draws(0, 0, torch.arange(20000))
    u = draws.rand(3)
    assert u.min() >= 0 and u.max() < 1
    assert ((u.mean(0) - 0.5).abs() < 5 * (1 / 12 / 20000) ** 0.5).all()
    assert (
        torch.corrcoef(torch.cat([u.T, u[1:, :1].T.new_tensor(u[:, 0].roll(1).tolist())[None]])).triu(1).abs() < 0.04
    ).all()
    assert not draws.rand(3).equal(u)
    assert Draws(0, 0, torch.tensor([17])).rand(3).equal(u[17:18])
    assert not Draws(1, 0, torch.tensor([17])).rand(3).equal(u[17:18])
    assert Draws(0, 5, torch.tensor([1])).shared(2).equal(Draws(0, 5, torch.tensor([2, 3])).shared(2))
    assert not Draws(0, 5, torch.tensor([1])).shared(2).equal(Draws(0, 6, torch.tensor([1])).shared(2))

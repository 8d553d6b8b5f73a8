"""Masks that are drawn by what stays visible: exact counts, and the published samplers' statistics."""

import json
from pathlib import Path

import pytest
import torch

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.objective.visible_masks import NextFrame, VisibleBox, VisibleBoxes

VECTORS = Path(__file__).parents[2] / "parity" / "vectors"
PUBLISHED = json.loads((VECTORS / "mask_statistics.json").read_text())
MASKERS = {
    "capi_inverse_block": VisibleBox(),
    "capi_inverse_block_no_roll": VisibleBox(roll=False),
    "data2vec2_base": VisibleBoxes(),
    "data2vec2_large": VisibleBoxes(0.75, adjust=0.1),
}
DRAWS = 4000
MAX_STANDARD_ERRORS = 5.0


def draws(n: int, seed: int = 0) -> KeyedRNG:
    return KeyedRNG(seed, 0, torch.arange(n))


def visible_places(masker, grid: Grid, n: int) -> torch.Tensor:
    """bool [n, t, h, w]"""
    context = masker(None, grid, draws(n))[0].context
    return torch.zeros(n, grid.n, dtype=torch.bool).scatter(1, context, True).reshape(n, *grid)


@pytest.mark.parametrize("name", MASKERS)
def test_statistics_are_those_of_the_published_sampler(name):
    want = PUBLISHED[name]
    h, w = want["grid"]
    visible = visible_places(MASKERS[name], Grid(1, h, w), DRAWS)[:, 0]
    assert (visible.flatten(1).sum(1) == want["visible_least"]).all()
    assert want["visible_least"] == want["visible_most"]
    hidden = 1 - visible.float().mean(0)
    for place, p in {
        "centre": hidden[h // 2, w // 2],
        "corner": hidden[0, 0],
        "edge_top": hidden[0, w // 2],
        "edge_left": hidden[h // 2, 0],
    }.items():
        q = want[f"hidden_prob_{place}"]
        error = (q * (1 - q) * (1 / DRAWS + 1 / want["draws"])) ** 0.5
        assert abs(p - q) < MAX_STANDARD_ERRORS * error, place
    for key, a, b in (
        ("row", visible[:, :-1], visible[:, 1:]),
        ("column", visible[:, :, :-1], visible[:, :, 1:]),
    ):
        q = want[f"visible_next_{key}_if_visible"]
        # of a draw, whose neighbours are not independent of one another
        each = (a & b).flatten(1).sum(1) / a.flatten(1).sum(1).clamp_min(1)
        error = each.std() * (1 / DRAWS + 1 / want["draws"]) ** 0.5
        found = (a & b).sum() / a.sum()
        assert abs(found - q) < MAX_STANDARD_ERRORS * error, key


@pytest.mark.parametrize("size", [(2, 16), (16, 2), (1, 9), (3, 5)])
def test_a_visible_box_fits_every_grid(size):
    grid = Grid(2, *size)
    visible = visible_places(VisibleBox(roll=False), grid, 50)
    assert (visible.flatten(2).sum(2) == size[0] * size[1] - int(0.65 * size[0] * size[1])).all()
    assert torch.equal(visible[:, 0], visible[:, 1])


def test_boxes_of_a_number_of_slices_move_through_time():
    grid = Grid(4, 6, 6)
    visible = visible_places(VisibleBoxes(0.8, slices=2), grid, 50)
    assert (visible.flatten(1).sum(1) == int(grid.n * (1 - 0.8))).all()
    assert not torch.equal(visible[:, 0], visible[:, 1])
    beside = (visible[:, 1:] & visible[:, :-1]).sum() / visible[:, 1:].sum()
    assert beside > 0.3


def test_next_frame_shows_the_first_slice_and_a_few_places_of_the_next():
    grid = Grid(2, 14, 14)
    for ratio, shown in ((0.95, 9), (0.985, 2)):  # CropMAE: 2 of 196
        visible = visible_places(NextFrame(ratio), grid, 20)
        assert visible[:, 0].all()
        assert (visible[:, 1].flatten(1).sum(1) == shown).all()
        assert not torch.equal(visible[0], visible[1])
    mask = NextFrame()(None, grid, draws(3))[0]
    assert mask.target.shape == (3, 1, 187)
    with pytest.raises(UserError, match="two or more time slices"):
        NextFrame()(None, Grid(1, 14, 14), draws(3))


@pytest.mark.parametrize("masker", [VisibleBox(0.01), VisibleBoxes(0.999), NextFrame(0.999)])
def test_masks_that_hide_all_or_nothing_are_refused(masker):
    with pytest.raises(UserError, match=r"method\.mask\.ratio"):
        masker(None, Grid(2, 4, 4), draws(2))

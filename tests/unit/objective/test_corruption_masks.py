"""MaskFeat's boxes against the published sampler."""

import json
from pathlib import Path

import pytest
import torch

from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.objective.corruption_masks import RandomBoxes

VECTORS = Path(__file__).parents[2] / "parity/vectors"


def test_boxes_have_the_statistics_of_the_published_sampler():
    """600 draws; bounds are 4.5 standard errors of the difference. Places are averaged over time."""
    reference = json.loads((VECTORS / "mask_statistics.json").read_text())["maskfeat_cube"]
    grid = Grid(*reference["grid"])
    n = 600
    hidden = RandomBoxes().union(157, grid, KeyedRNG(0, 0, torch.arange(n))).float().reshape(n, *grid)
    slack = 4.5 * (1 / n + 1 / reference["draws"]) ** 0.5
    visible = (1 - hidden).sum((1, 2, 3))
    assert visible.min() >= reference["visible_least"]
    assert visible.mean() == pytest.approx(reference["visible_mean"], abs=slack * reference["visible_std"])
    places = {"centre": (3, 3), "corner": (0, 0), "edge_top": (0, 3), "edge_left": (3, 0)}
    for name, (y, x) in places.items():
        # a clip's slices are alike, so its mean over time is one draw
        per_clip = hidden[:, :, y, x].mean(1)
        want = reference[f"hidden_prob_{name}"]
        assert per_clip.mean() == pytest.approx(want, abs=slack * float(per_clip.std())), name
    for axis, name in enumerate(("slice", "row", "column"), 1):
        first = 1 - hidden.narrow(axis, 0, grid[axis - 1] - 1)
        both = first * (1 - hidden.narrow(axis, 1, grid[axis - 1] - 1))
        ratio = float(both.sum() / first.sum())
        per_clip = (both - ratio * first).sum((1, 2, 3)) / first.sum((1, 2, 3)).mean()
        want = reference[f"visible_next_{name}_if_visible"]
        assert ratio == pytest.approx(want, abs=slack * float(per_clip.std())), name


@pytest.mark.parametrize("grid", [Grid(8, 14, 14), Grid(1, 14, 14), Grid(4, 2, 2), Grid(1, 1, 2)], ids=str)
def test_exactly_the_ratio_is_hidden(grid):
    (mask,) = RandomBoxes(ratio=0.4)(torch.empty(0), grid, KeyedRNG(0, 0, torch.arange(3)))
    count = max(1, round(0.4 * grid.n))
    assert mask.target.shape == (3, 1, count) and mask.context.shape == (3, grid.n - count)
    both = torch.cat([mask.context, mask.target[:, 0]], 1).sort(1)[0]
    assert both.equal(torch.arange(grid.n).expand(3, -1))
    (alone,) = RandomBoxes(ratio=0.4)(torch.empty(0), grid, KeyedRNG(0, 5, torch.tensor([2])))
    assert alone.target.equal(mask.target[2:])

"""Properties that every mask must have, over many seeds and small grids, and the published samplers'
statistics."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vidssl import config
from vidssl.core.errors import UserError
from vidssl.core.rng import GlobalBatch, KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.objective.block_masks import (
    MultiBlock2D,
    MultiBlock3D,
    SingleBlock,
    box_size,
    kept_counts,
)
from vidssl.objective.masks import (
    MASKS,
    Causal,
    Frame,
    Future,
    Quadrants,
    Random,
    RunningCell,
    Tube,
    count_cut_groups,
    dual_mask,
    running_cell_maps,
)
from vidssl.objective.schema import BlockGroup
from vidssl.objective.selection import indices_of

VECTORS = Path(__file__).parents[2] / "parity" / "vectors"  # of the reference implementations

SIZES = [
    (1, 2, 2),
    (1, 3, 5),
    (1, 4, 4),
    (1, 16, 16),
    (2, 2, 3),
    (2, 4, 4),
    (4, 4, 4),
    (2, 7, 5),
    (8, 14, 14),
]
GRIDS = [Grid(*size) for size in SIZES]
SHORT, LONG = BlockGroup(8, 0.15), BlockGroup(2, 0.7)
OWN = {  # masks of which every sample's is a function of its own key alone
    "random": Random(0.75),
    "tube": Tube(0.75),
    "frame": Frame(0.5),
    "future": Future(past=1),
    "causal": Causal(),
    "quadrants": Quadrants(),
    "running_cell": RunningCell(),
    "running_cell-sparse": RunningCell(0.75, decoder_drop_ratio=0.75),
    "blocks": MultiBlock3D(),
    "blocks-large": MultiBlock3D((BlockGroup(1, 0.9),)),
    "blocks-short in time": MultiBlock3D(temporal_scale=(0.25, 0.75)),
    "blocks-causal": MultiBlock3D(max_temporal_keep=0.5),
    "blocks-complement": MultiBlock3D(complement=True, max_temporal_keep=0.5),
    "block": SingleBlock(),
    "block-whole frame": SingleBlock(3.0),
    "multiblock": MultiBlock2D(),
    "multiblock-large": MultiBlock2D(targets=6, scale=(0.2, 2.0), context_scale=(0.1, 0.3), min_keep=100),
}
SHARED = {  # as published: cut to the smallest of a batch
    "blocks-raster": MultiBlock3D(truncate="raster"),
    "blocks-raster large": MultiBlock3D((BlockGroup(8, 0.5),), truncate="raster", complement=True),
    "blocks-raster causal": MultiBlock3D(truncate="raster", max_temporal_keep=0.3, temporal_scale=(0.2, 0.9)),
    "multiblock-published": MultiBlock2D(reference_quirks=True),
    "multiblock-published large": MultiBlock2D(
        scale=(0.8, 1.0), context_scale=(0.1, 0.3), reference_quirks=True
    ),
}
ALL = OWN | SHARED


def draws(seed: int, n: int, step: int = 0) -> KeyedRNG:
    return KeyedRNG(seed, step, torch.arange(n) + n * step)


def random_video(grid: Grid, samples: int) -> torch.Tensor:
    """f32 [samples, 3, 2 t, 4 h, 4 w]: noise, with tokens of 2 x 4 x 4."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 3, 2 * grid.t, 4 * grid.h, 4 * grid.w, generator=generator)


def possible(masker, grid: Grid) -> bool:
    return grid.t > 1 or not isinstance(masker, Frame | Future | Causal)


def flags(ids: torch.Tensor, grid: Grid) -> torch.Tensor:
    """i64 [B, K] -> bool [B, N]"""
    return torch.zeros(len(ids), grid.n, dtype=torch.bool).scatter(1, ids, True)


def counted(mask: Mask, grid: Grid) -> torch.Tensor:
    """bool [B, N]: the targets that carry loss."""
    weight = torch.ones(mask.target.shape) if mask.weight is None else mask.weight
    return torch.zeros(len(weight), grid.n).scatter_add(1, mask.target.flatten(1), weight.flatten(1)) > 0


def check(mask: Mask, grid: Grid, samples: int, may_overlap: bool = False) -> None:
    """Ids ascend (so none repeats) and are in range; context and counted targets are disjoint and never
    empty."""
    assert (
        mask.context.ndim == 2 and mask.target.ndim == 3 and len(mask.context) == len(mask.target) == samples
    )
    for ids in (mask.context, mask.target):
        assert ids.dtype == torch.int64 and ids.shape[-1] > 0
        assert (ids.diff(dim=-1) > 0).all()
        assert ids.min() >= 0 and ids.max() < grid.n
    assert mask.weight is None or mask.weight.shape == mask.target.shape
    target = counted(mask, grid)
    assert target.any(1).all()
    assert may_overlap or not (target & flags(mask.context, grid)).any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_context_and_target_are_valid(name, grid):
    if possible(ALL[name], grid):
        for seed in range(10):
            for mask in ALL[name](None, grid, draws(seed, 6, seed)):
                check(mask, grid, 6)


@pytest.mark.slow
def test_no_grid_is_too_small_for_boxes():
    """Every frame up to 6 x 6 but that of one place, as an image and as a video, every way of making
    boxes."""
    maskers = [
        masker for name, masker in ALL.items() if name.split("-")[0] in ("blocks", "block", "multiblock")
    ]
    for t, h, w in torch.cartesian_prod(
        torch.tensor([1, 3]), torch.arange(1, 7), torch.arange(1, 7)
    ).tolist():
        for masker in maskers if h * w > 1 else []:
            simulated = (
                isinstance(masker, MultiBlock3D) and masker.truncate == "random"
            )  # slow: counts from many drawings
            if not simulated or (t == 3 and h * w <= 4):
                for mask in masker(None, Grid(t, h, w), draws(h, 5, w)):
                    check(mask, Grid(t, h, w), 5)


@pytest.mark.parametrize("kind", sorted(MASKS.keys() - {"scored"}))  # see test_scores
def test_every_kind_s_defaults_make_masks_on_a_frame_that_is_not_square(kind):
    for grid in (Grid(8, 6, 10), Grid(8, 9, 4)):
        masks = config.build_from_header({"kind": kind}, MASKS)(random_video(grid, 3), grid, draws(0, 3))
        for mask in masks:
            check(mask, grid, 3, may_overlap=kind == "whole")


@pytest.mark.parametrize("grid", [Grid(4, 8, 8), Grid(3, 5, 7), Grid(2, 2, 3)], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_a_sample_s_mask_does_not_depend_on_its_batch(name, grid):
    together = OWN[name](None, grid, KeyedRNG(7, 3, torch.arange(12)))
    for part in (torch.arange(5), torch.arange(5, 12), torch.tensor([11, 2])):
        for whole, alone in zip(together, OWN[name](None, grid, KeyedRNG(7, 3, part)), strict=True):
            assert whole.context[part].equal(alone.context)
            assert whole.target[part].equal(alone.target)
            assert whole.weight is None or whole.weight[part].equal(alone.weight)


@pytest.mark.parametrize(
    ("masker", "size", "message"),
    [
        (
            Tube(0.0),
            (2, 2, 2),
            "method.mask.ratio: 0.0 of 4 places hides 0; at least one must be hidden and one visible",
        ),
        (Tube(0.1), (2, 2, 2), "method.mask.ratio"),
        (Random(1.0), (2, 2, 2), "method.mask.ratio: 1.0 of 8 tokens hides 8"),
        (RunningCell(0.1), (2, 2, 2), "method.mask.ratio"),
        (
            RunningCell(decoder_drop_ratio=1.0),
            (2, 4, 4),
            "method.mask.decoder_drop_ratio: 1.0 leaves nothing to decode",
        ),
        (Frame(), (1, 4, 4), "method.mask.ratio: 0.875 of 1 time slices"),
        (Causal(), (1, 4, 4), "method.mask.kind: .* two or more time slices"),
        (Future(), (1, 4, 4), "method.mask.kind: .* two or more time slices"),
        (Causal(past=3), (3, 4, 4), r"method.mask.past: 3 must lie in 1\.\.2, the clip has 3 slices"),
        (Future(past=5), (3, 4, 4), r"method.mask.past: 5 must lie in 1\.\.2"),
        (Quadrants(), (3, 1, 4), "method.mask.kind: quadrants need 2 x 2 places or more, not 1 x 4"),
        (MultiBlock3D(), (4, 1, 1), "method.mask.kind: blocks cannot split a picture of one token"),
        (MultiBlock2D(), (4, 1, 1), "method.mask.kind: multiblock_2d cannot split a picture of one token"),
    ],
)
def test_what_cannot_be_is_one_clear_error(masker, size, message):
    with pytest.raises(UserError, match=message):
        masker(None, Grid(*size), draws(0, 2))


# Counts, and what each kind promises.


def test_random_tube_and_frame_counts():
    grid = Grid(8, 14, 14)
    (mask,) = Random(0.9)(None, grid, draws(0, 2))
    assert mask.target.shape == (2, 1, int(0.9 * 1568))
    (mask,) = Tube(0.9)(None, grid, draws(0, 2))
    assert mask.context.shape == (
        2,
        20 * 8,
    )  # VideoMAE: int(0.9 * 196) = 176 hidden in a slice, 160 tokens visible
    places = mask.context.reshape(2, 8, 20) % 196
    assert (places == places[:, :1]).all()
    (mask,) = Frame()(None, grid, draws(0, 2))
    assert mask.context.shape == (2, 196) and mask.target.shape == (2, 1, 7 * 196)
    assert (mask.context % 196 == torch.arange(196)).all()


@pytest.mark.parametrize("grid", [Grid(2, 2, 3), Grid(4, 4, 4), Grid(8, 3, 5)], ids=str)
def test_future_hides_one_whole_slice_and_shows_only_what_came_before(grid):
    places = grid.h * grid.w
    ends = set()
    for step in range(60):
        (mask,) = Future(visible=0.5, past=1)(None, grid, KeyedRNG(0, step, torch.arange(3)))
        now = int(mask.target[0, 0, 0]) // places
        ends.add(now)
        assert (mask.target == torch.arange(now * places, (now + 1) * places)).all()
        assert mask.context.shape == (3, max(1, round(0.5 * now * places)))
        assert mask.context.max() < now * places
        assert not mask.context[0].equal(mask.context[1]) or mask.context.shape[1] < 4
    assert ends == set(range(1, grid.t))


def test_causal_parts_the_clip_at_a_slice_that_is_drawn_once_a_step():
    ends = []
    for step in range(300):
        (mask,) = Causal(past=2)(None, Grid(5, 2, 3), draws(0, 3, step))
        assert torch.cat([mask.context, mask.target[:, 0]], 1).equal(torch.arange(30).expand(3, -1))
        ends.append(mask.context.shape[1] / 6)
    share = torch.bincount(torch.tensor(ends).long(), minlength=6)[2:] / 300
    assert set(ends) == {2, 3, 4}
    assert ((share[:3] - 1 / 3).abs() < 5 * (2 / 9 / 300) ** 0.5).all()


@pytest.mark.parametrize("grid", [Grid(2, 4, 6), Grid(3, 5, 7)], ids=str)
def test_quadrants_are_the_four_corners_each_the_context_as_often(grid):
    (mask,) = Quadrants()(None, grid, draws(0, 4000))
    h, w = grid.h // 2, grid.w // 2
    assert mask.context.shape == (4000, grid.t * h * w) and mask.target.shape == (4000, 3, grid.t * h * w)
    seen = flags(mask.context, grid).reshape(-1, *grid)
    corners = [seen[:, :, y, x].all(1) for y in (0, -1) for x in (0, -1)]
    assert (torch.stack(corners).sum(0) == 1).all()
    assert ((torch.stack(corners).float().mean(1) - 0.25).abs() < 5 * (3 / 16 / 4000) ** 0.5).all()
    assert seen[corners[0]][:, :, :h, :w].all() and seen[corners[3]][:, :, -h:, -w:].all()
    assert seen[corners[1]][:, :, :h, -w:].all() and seen[corners[2]][:, :, -h:, :w].all()


def test_block_is_one_box_through_all_of_time_and_nothing_is_cut():
    grid = Grid(3, 14, 12)
    sizes = set()
    for step in range(30):
        (mask,) = SingleBlock()(None, grid, draws(0, 4, step))
        assert mask.context.shape[1] + mask.target.shape[2] == grid.n
        box = flags(mask.target[:, 0], grid).reshape(4, *grid)
        assert (box == box[:, :1]).all()
        h, w = box[:, 0].any(2).sum(1), box[:, 0].any(1).sum(1)
        assert (h * w * 3 == mask.target.shape[2]).all() and (h == h[0]).all()
        sizes.add((int(h[0]), int(w[0])))
    assert len(sizes) > 3 and all(0.55 < h * w / 168 < 0.66 for h, w in sizes)


# Dual masking.


def test_running_cell_and_dual_mask_match_the_reference():
    reference = load_file(VECTORS / "videomaev2_pretrain.safetensors")
    given = json.loads((VECTORS / "videomaev2_pretrain.json").read_text())["given"]
    reference |= {name: torch.tensor(values, dtype=torch.bool) for name, (_, values) in given.items()}
    maps = running_cell_maps(Grid(2, 4, 4), 0.5)
    assert maps.equal(reference["all_running_cell_masks"].flatten(1))
    mask = dual_mask(reference["mask"], reference["decode_mask"])
    for sample in range(2):
        assert mask.context[sample].equal((~reference["mask"][sample]).nonzero()[:, 0])
        assert mask.target[sample, 0].equal((~reference["decode_mask"][sample]).nonzero()[:, 0])
        assert mask.weight[sample, 0].equal(reference["mask"][sample][mask.target[sample, 0]].float())
    error = (reference["prediction"] - reference["target"]).square().mean(-1)[:, None]  # in order of decoding
    loss = (error * mask.weight).sum() / mask.weight.sum()
    assert loss == pytest.approx(float(reference["loss"]), rel=1e-5)


def test_running_cell_drops_whole_quarters_of_every_cell_and_runs_on_with_time():
    grid = Grid(4, 6, 8)
    for ratio, dropped in ((0.0, 0), (0.3, 1), (0.5, 2), (0.75, 3)):
        maps = running_cell_maps(grid, ratio).reshape(4, 4, 3, 2, 4, 2)
        assert (maps.sum((3, 5)) == dropped).all()
        assert (maps == maps[:, :, :1, :, :1]).all()
        assert (maps.sum(1) == dropped).all()  # over four slices every place is dropped as often
        assert maps[1:, :-1].equal(maps[:-1, 1:])
    odd = running_cell_maps(Grid(2, 3, 5), 0.5).reshape(4, 2, 3, 5)
    assert odd.equal(running_cell_maps(Grid(2, 4, 6), 0.5).reshape(4, 2, 4, 6)[:, :, :3, :5])


def test_running_cell_decodes_one_of_its_maps_and_counts_what_the_tube_hides():
    grid = Grid(8, 14, 14)
    maps = running_cell_maps(grid, 0.5)
    (mask,) = RunningCell()(None, grid, draws(0, 400))
    assert mask.context.shape == (400, 160) and mask.target.shape == (400, 1, 784)
    assert mask.context.equal(Tube(0.9)(None, grid, draws(0, 400))[0].context)
    decoded = flags(mask.target[:, 0], grid)
    seen = flags(mask.context, grid)
    starts = (decoded[:, None] == ~maps).all(2)
    assert (starts.sum(1) == 1).all()
    assert ((starts.float().mean(0) - 0.25).abs() < 5 * (3 / 16 / 400) ** 0.5).all()
    assert mask.weight[:, 0].equal(1 - seen.gather(1, mask.target[:, 0]).float())
    (mask,) = RunningCell()(
        None, Grid(1, 3, 5), draws(0, 50)
    )  # an odd frame: equal counts, still of one of the maps
    decoded = flags(mask.target[:, 0], Grid(1, 3, 5))
    assert mask.target.shape[2] == (~running_cell_maps(Grid(1, 3, 5), 0.5)).sum(1).min()
    assert (decoded[:, None] <= ~running_cell_maps(Grid(1, 3, 5), 0.5)).all(2).any(1).all()


# Uniform in time and space.


@pytest.mark.parametrize("name", ["random", "frame", "running_cell", "blocks", "multiblock"])
def test_time_slices_are_treated_alike(name):
    """Each slice's share of context and of counted targets is 1/t within 5 deviations (4,096 samples)."""
    grid = Grid(8, 6, 6)
    for mask in OWN[name](None, grid, draws(0, 4096)):
        for chosen in (flags(mask.context, grid), counted(mask, grid)):
            share = chosen.reshape(-1, 8, 36).sum(2) / chosen.sum(1, keepdim=True)
            error = share.std(0) / 64
            assert ((share.mean(0) - 1 / 8).abs() < 5 * error + 1e-6).all()


@pytest.mark.parametrize("name", ["random", "tube", "running_cell"])
def test_places_are_treated_alike(name):
    """Each place's share of context and of counted targets is 1/(h*w) within 5 deviations (4,096 samples)."""
    grid = Grid(4, 4, 6)
    (mask,) = OWN[name](None, grid, draws(0, 4096))
    for chosen in (flags(mask.context, grid), counted(mask, grid)):
        share = chosen.reshape(-1, 4, 24).sum(1) / chosen.sum(1, keepdim=True)
        assert ((share.mean(0) - 1 / 24).abs() < 5 * share.std(0) / 64 + 1e-6).all()


@pytest.mark.parametrize(("group", "bound"), [(SHORT, 0.02), (LONG, 0.06)], ids=["short", "long"])
def test_random_truncation_leaves_the_context_where_it_was(group, bound):
    """Given a sample's boxes, every visible token stays context alike: the mean over 1,536 samples is the
    expected one.

    Over samples, the context lies where the uncut one lies, but for what samples with much context lose and
    samples with too little gain: total variation between the two 0.011 short, 0.045 long (bounds 0.02, 0.06).
    Raster truncation at this batch of 24 moves 0.30 and 0.45.
    """
    grid = Grid(8, 14, 14)
    got = []
    expected = []
    visible = []
    raster = []
    masker = MultiBlock3D((group,))
    published = MultiBlock3D((group,), truncate="raster")
    nc, _ = kept_counts(masker, group, grid)
    for step in range(64):
        hidden = masker.hidden(group, grid, draws(0, 24, step)).float()
        there = (1 - hidden).sum(1, keepdim=True)
        short = (nc - there).clamp(min=0) / (grid.n - there)
        visible.append(1 - hidden)
        expected.append((1 - hidden) * (nc / there).clamp(max=1) + hidden * short)
        got.append(flags(masker(None, grid, draws(0, 24, step))[0].context, grid).float())
        raster.append(flags(published(None, grid, draws(0, 24, step))[0].context, grid).float())
    p = torch.cat(expected)
    error = (p * (1 - p)).sum(0).sqrt() / len(p)
    assert ((torch.cat(got) - p).mean(0).abs() < 5 * error + 1e-6).all()
    where = [torch.cat(x).sum(0) / torch.cat(x).sum() for x in (visible, got, raster)]
    assert (where[1] - where[0]).abs().sum() / 2 < bound
    assert (where[2] - where[0]).abs().sum() / 2 > 0.25


# V-JEPA's multi-block masks.


def test_box_sizes_are_those_of_the_published_sampler():
    """The area is a whole number of places before the root: 29 of 29.4 at 14 x 14 and scale 0.15."""
    grid = Grid(8, 14, 14)
    assert box_size(29, 0.75, grid) == (5, 6)
    assert box_size(29, 1.035, grid) == (5, 5)  # 29.4 places would give 6 rows
    assert box_size(137, 1.5, grid) == (14, 10)
    assert box_size(137, 0.75, grid) == (10, 14)
    assert box_size(0, 1.0, grid) == (1, 1)
    assert box_size(60, 1.0, Grid(1, 4, 20)) == (4, 8)


def test_box_place():
    """One box of scale 0.25 and aspect 1 on 8 x 8 places covers 4 x 4 of them, every allowed place alike."""
    grid = Grid(1, 8, 8)
    group = BlockGroup(1, 0.25)
    hidden = MultiBlock3D((group,), (1.0, 1.0)).hidden(group, grid, draws(0, 10000)).reshape(-1, 8, 8)
    assert (hidden.sum((1, 2)) == 16).all()
    for side in (2, 1):
        first = hidden.any(side).float().argmax(1)
        share = torch.bincount(first, minlength=5)[:5] / 10000
        assert ((share - 0.2).abs() < 5 * (0.2 * 0.8 / 10000) ** 0.5).all()


def test_boxes_may_be_short_in_time_and_the_context_may_end_early():
    grid = Grid(8, 6, 6)
    group = BlockGroup(1, 0.25)
    masker = MultiBlock3D((group,), (1.0, 1.0), temporal_scale=(0.5, 0.5))
    hidden = masker.hidden(group, grid, draws(0, 5000)).reshape(-1, 8, 36)
    assert (hidden.sum((1, 2)) == 4 * 9).all() and (hidden.any(2).sum(1) == 4).all()
    start = torch.bincount(hidden.any(2).float().argmax(1), minlength=5) / 5000
    assert ((start - 0.2).abs() < 5 * (0.16 / 5000) ** 0.5).all()
    lengths = set()
    for step in range(60):
        masker = MultiBlock3D((group,), temporal_scale=(0.25, 0.75))
        lengths |= set(masker.hidden(group, grid, draws(0, 2, step)).reshape(2, 8, 36).any(2).sum(1).tolist())
    assert lengths == {2, 3, 4, 5}  # int of the drawn length, as the reference counts
    for truncate in ("random", "raster"):
        causal = MultiBlock3D((SHORT,), max_temporal_keep=0.75, truncate=truncate)
        for step in range(20):
            (mask,) = causal(None, grid, draws(0, 8, step))
            assert mask.context.max() < 6 * 36 <= mask.target.max()
        assert causal.hidden(SHORT, grid, draws(0, 8)).reshape(8, 8, 36)[:, 6:].all()


@pytest.mark.parametrize("truncate", ["random", "raster"])
def test_complement_predicts_all_that_is_not_context(truncate):
    grid = Grid(4, 7, 7)
    for part, whole in zip(
        MultiBlock3D(truncate=truncate)(None, grid, draws(0, 8)),
        MultiBlock3D(truncate=truncate, complement=True)(None, grid, draws(0, 8)),
        strict=True,
    ):
        assert part.context.equal(whole.context)
        assert (flags(whole.target[:, 0], grid) == ~flags(whole.context, grid)).all()
        assert part.target.shape[2] < whole.target.shape[2]


def test_kept_counts_are_whole_slices_and_leave_room():
    for grid in GRIDS:
        for group in (SHORT, LONG):
            nc, nt = kept_counts(MultiBlock3D(), group, grid)
            assert nc % grid.t == 0 and nt % grid.t == 0
            assert nc > 0 and nt > 0 and nc + nt <= grid.n


@pytest.mark.parametrize("size", [14, 16])
@pytest.mark.parametrize("group", [SHORT, LONG], ids=["short", "long"])
def test_uncut_masks_have_the_statistics_of_the_published_sampler(group, size):
    """1,500 draws at batch 1 on both sides; bounds are 4.5 standard errors of their difference."""
    name = f"16f_{size * 16}px_{'short' if group is SHORT else 'long'}"
    reference = json.loads((VECTORS / "vjepa_mask_statistics.json").read_text())[name]
    n = reference["draws"]
    grid = Grid(8, size, size)
    masker = MultiBlock3D((group,))
    hidden = torch.cat([masker.hidden(group, grid, draws(0, 1, step)) for step in range(n)]).float()
    ratio = 1 - hidden.mean(1)
    slack = 4.5 * (2 / n) ** 0.5
    spread = reference["context_ratio_std"]
    assert ratio.mean() == pytest.approx(reference["context_ratio_mean"], abs=slack * spread)
    fourth = ((ratio - ratio.mean()) / ratio.std()).pow(4).mean()
    assert ratio.std() == pytest.approx(spread, abs=slack * spread * float((fourth - 1) / 4) ** 0.5)
    for level, value in zip(
        (0.05, 0.25, 0.5, 0.75, 0.95), reference["context_ratio_q05_25_50_75_95"], strict=True
    ):
        room = slack * (level * (1 - level)) ** 0.5
        assert (
            (ratio < value - 1e-6).float().mean() - room
            <= level
            <= (ratio <= value + 1e-6).float().mean() + room
        )
    centre = hidden[:, (size // 2) * (size + 1)]
    corner = hidden[:, 0]
    for got, key in ((centre, "masked_prob_centre"), (corner, "masked_prob_corner")):
        p = min(reference[key], 1 - 1 / n)
        assert got.mean() == pytest.approx(reference[key], abs=slack * (p * (1 - p)) ** 0.5)


# The published sampler, measured: per-process batch, tokens of a side, then for each group: context kept,
# targets kept, last / first time slice of the context, share of the context in the second half of the clip.
TABLE = [
    (1, 14, (0.372, 0.628, 1.00, 0.50), (0.183, 0.817, 1.00, 0.50)),
    (4, 14, (0.292, 0.562, 0.29, 0.38), (0.122, 0.727, 0.25, 0.31)),
    (24, 14, (0.231, 0.474, 0.03, 0.21), (0.067, 0.708, 0.05, 0.09)),
    (24, 16, (0.251, 0.476, 0.05, 0.25), (0.061, 0.706, 0.03, 0.07)),
]


@pytest.mark.parametrize(
    ("batch", "size", "short", "long"), TABLE, ids=lambda v: str(v) if isinstance(v, int) else ""
)
def test_raster_truncation_is_that_of_the_published_sampler(batch, size, short, long):
    """The table was measured on 20 to 200 steps; taken as 20. Here 100 steps. The spread from step to step
    is measured here; bounds are 4 standard errors of the difference, and half a unit of the table's last
    digit."""
    grid = Grid(8, size, size)
    steps = 100
    masker = MultiBlock3D(truncate="raster")
    rows = ([], [])
    for step in range(steps):
        for mask, row in zip(masker(None, grid, draws(0, batch, step)), rows, strict=True):
            slices = flags(mask.context, grid).reshape(batch, 8, -1).sum((0, 2))
            row.append([*slices.tolist(), mask.target.numel()])
    for row, (kept, predicted, last_first, last_half) in zip(rows, (short, long), strict=True):
        table = torch.tensor(row, dtype=torch.float64)
        all_tokens = torch.full((steps,), batch * grid.n, dtype=torch.float64)
        total = table[:, :8].sum(1)
        for above, below, want, digit in (
            (total, all_tokens, kept, 0.001),
            (table[:, 8], all_tokens, predicted, 0.001),
            (table[:, 7], table[:, 0], last_first, 0.01),
            (table[:, 4:8].sum(1), total, last_half, 0.01),
        ):
            ratio = float(above.sum() / below.sum())
            deviation = float((above - ratio * below).std() / below.mean())
            assert ratio == pytest.approx(want, abs=4 * deviation * (1 / steps + 1 / 20) ** 0.5 + digit / 2)


# I-JEPA's multi-block masks.


def box_sizes(published: bool, steps: int) -> set[tuple[int, int]]:
    """(height, width) of the target blocks of some steps at 14 x 14; each sample's four are boxes of that
    size."""
    grid = Grid(1, 14, 14)
    sizes = set()
    for step in range(steps):
        (mask,) = MultiBlock2D(reference_quirks=published)(None, grid, draws(0, 3, step))
        box = flags(mask.target.flatten(0, 1), grid).reshape(12, 14, 14)
        h, w = box.any(2).sum(1), box.any(1).sum(1)
        assert (h == h[0]).all() and (w == w[0]).all() and (h * w == mask.target.shape[2]).all()
        assert mask.target.shape[1] == 4
        sizes.add((int(h[0]), int(w[0])))
    return sizes


def test_multiblock_sizes():
    """29 to 39 places, aspect 0.75 to 1.5. Published: both from one number, so that large blocks are tall."""
    u = torch.linspace(0, 1, 2000, dtype=torch.float64).tolist()
    areas = [int(196 * (0.15 + 0.05 * v)) for v in u]
    aspects = [0.75 + 0.75 * v for v in u]

    def size(area: int, aspect: float) -> tuple[int, int]:
        return round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)

    one = {size(a, r) for a, r in zip(areas, aspects, strict=True)}
    free = {size(a, r) for a in set(areas) for r in aspects[::10]}
    assert box_sizes(True, 150) <= one
    assert box_sizes(False, 150) <= free
    assert len(box_sizes(False, 150) - one) >= 3


@pytest.mark.parametrize("published", [True, False])
def test_multiblock_places(published):
    """The published sampler never covers the last row and column with a target; ours treats both sides
    alike."""
    grid = Grid(1, 14, 14)
    steps = 150
    per_step = []
    for step in range(steps):
        (mask,) = MultiBlock2D(reference_quirks=published)(None, grid, draws(1, 24, step))
        often = flags(mask.target.flatten(0, 1), grid).reshape(-1, 14, 14).float().mean(0)
        per_step.append(
            torch.stack([often.mean(1) - often.mean(1).flip(0), often.mean(0) - often.mean(0).flip(0)])
        )
        assert not published or (not often[-1].any() and not often[:, -1].any())
    odd = torch.stack(per_step)  # first minus last, second minus last but one, ...
    alike = odd.mean(0).abs() <= 5 * odd.std(0) / steps**0.5
    assert alike.all() != published


@pytest.mark.parametrize("grid", [Grid(1, 14, 14), Grid(3, 10, 14)], ids=str)
def test_multiblock_context_is_its_box_without_the_targets(grid):
    """The context never leaves a box of the context's size; its count is the same in every batch of a
    step."""
    masker = MultiBlock2D(context_scale=(0.6, 0.6))
    for step in range(30):
        (mask,) = masker(None, grid, draws(0, 16, step))
        seen = flags(mask.context, grid).reshape(-1, *grid)
        h, w = box_size(int(grid.h * grid.w * 0.6), 1.0, grid)
        for side, most in ((seen.any(3), h), (seen.any(2), w)):
            at = side.any(1).float()
            first = at.argmax(1)
            last = at.shape[1] - 1 - at.flip(1).argmax(1)
            assert (last - first < most).all()
        (other,) = masker(None, grid, KeyedRNG(0, step, torch.arange(900, 903)))
        assert mask.context.shape[1] == other.context.shape[1] and mask.context.shape[1] % grid.t == 0
        target = flags(mask.target.flatten(0, 1), grid).reshape(-1, *grid)
        assert (target == target[:, :1]).all()


def test_multiblock_min_keep():
    """Contexts of `min_keep` places or fewer are drawn again; here most are, since the context block is
    small."""
    grid = Grid(1, 14, 14)
    for published in (True, False):
        for min_keep in (1, 12):
            masker = MultiBlock2D(context_scale=(0.15, 0.15), min_keep=min_keep, reference_quirks=published)
            least = min(masker(None, grid, draws(0, 32, step))[0].context.shape[1] for step in range(20))
            assert least > min_keep
            assert min_keep == 12 or least < 12


def test_published_multiblock_is_cut_in_raster_order_to_the_smallest_of_the_batch():
    grid = Grid(1, 14, 14)
    masker = MultiBlock2D(reference_quirks=True)
    for step in range(10):
        (together,) = masker(None, grid, KeyedRNG(0, step, torch.arange(16)))
        alone = [masker(None, grid, KeyedRNG(0, step, torch.tensor([i])))[0].context[0] for i in range(16)]
        kept = min(len(ids) for ids in alone)
        assert together.context.equal(torch.stack([ids[:kept] for ids in alone]))
        assert kept < max(len(ids) for ids in alone)


CUT = {
    "blocks": MultiBlock3D(truncate="raster", truncate_over=4),
    "blocks short in time": MultiBlock3D(temporal_scale=(0.25, 0.75), truncate="raster", truncate_over=4),
    "blocks complement": MultiBlock3D(truncate="raster", complement=True, truncate_over=4),
    "multiblock": MultiBlock2D(reference_quirks=True, truncate_over=4),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("first", [0, 48, 10**9 + 16])
def test_a_cut_is_over_the_declared_clips_whatever_is_at_hand(name, first):
    """Of 16 clips in 4 groups: any part of a group has the masks of the whole group computed together."""
    grid = Grid(4, 8, 8)
    masker = CUT[name]
    sizes = set()
    for group in range(4):
        members = first + torch.arange(group, 16, 4)
        whole = masker(None, grid, KeyedRNG(3, 7, members))
        sizes.add(tuple(mask.context.shape[1] for mask in whole))
        for rows in ([0], [3], [1, 2], [2, 0, 3], [0, 1, 2, 3]):
            rng = KeyedRNG(3, 7, members[rows], GlobalBatch(first, 16))
            for mask, part in zip(whole, masker(None, grid, rng), strict=True):
                assert part.context.equal(mask.context[rows]) and part.target.equal(mask.target[rows])
    assert len(sizes) > 1
    with pytest.raises(ValueError, match="several groups"):
        masker(None, grid, KeyedRNG(3, 7, first + torch.arange(2), GlobalBatch(first, 16)))


def test_without_a_number_or_with_a_larger_one_all_clips_of_a_step_are_cut_together():
    grid = Grid(4, 8, 8)
    for over in (None, 16, 1000):
        masker = MultiBlock3D(truncate="raster", truncate_over=over)
        whole = masker(None, grid, draws(0, 16))
        rng = KeyedRNG(0, 0, torch.tensor([5, 1]), GlobalBatch(0, 16))
        for mask, part in zip(whole, masker(None, grid, rng), strict=True):
            assert part.context.equal(mask.context[[5, 1]])


@pytest.mark.parametrize("over, clips, words", [(24, 64, "16 or 32"), (5, 16, "4 or 8"), (7, 11, "1 or 11")])
def test_a_number_that_does_not_divide_the_batch_is_refused(over, clips, words):
    for masker in (
        MultiBlock3D(truncate="raster", truncate_over=over),
        MultiBlock2D(reference_quirks=True, truncate_over=over),
    ):
        with pytest.raises(UserError, match=f"truncate_over {over}: does not divide the {clips}.*{words}$"):
            count_cut_groups(masker, clips)
    assert count_cut_groups(MultiBlock3D(truncate_over=over), clips) == 1  # random: nothing is cut


def test_rows_of_unequal_counts_are_no_mask():
    """Two and four tokens of two rows would fill two rows of three."""
    chosen = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    with pytest.raises(AssertionError, match="not 3 tokens in each row"):
        indices_of(chosen, 3)

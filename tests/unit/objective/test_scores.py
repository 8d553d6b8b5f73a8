"""Masks that are made from scores: the rules of selection, each score, and the losses of their methods in
longhand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.model.vit import Encoder
from vidssl.objective.loss_score import rank_loss
from vidssl.objective.noise_score import ColorNoise
from vidssl.objective.scored_mask import Scored
from vidssl.objective.scores import SCORES
from vidssl.objective.warp_score import gaussian_map, warp_from_middle

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from given_networks import ColourFlow, MeanFlow, write_network
from test_methods import small

GRID = Grid(2, 3, 4)
RULES = [
    Scored(),
    Scored(0.5, "show"),
    Scored(0.75, "sample"),
    Scored(0.9, neither=0.5, share=(0.0, 0.0)),
    Scored(0.5, per_slice=True),
    Scored(0.75, "sample", per_slice=True),
    Scored(0.75, share=(0.25, 0.75), share_steps=10),
]


def keys(n: int, step: int = 0) -> KeyedRNG:
    return KeyedRNG(0, step, torch.arange(n) + n * step)


def scores_of(n: int, grid: Grid = GRID) -> Tensor:
    return torch.rand(n, grid.n, generator=torch.Generator().manual_seed(0))


def tiny_encoder() -> Encoder:
    return Encoder(4, 16, 16, dim=24, depth=1, heads=2, patch=4)


def sets(ids: Tensor) -> list[set[int]]:
    return [set(row) for row in ids.flatten(1).tolist()]


@pytest.mark.parametrize("masker", RULES, ids=str)
def test_each_rule_parts_the_tokens_and_does_not_depend_on_the_batch(masker):
    scores = scores_of(6)
    (mask,) = masker.from_scores(scores, GRID, KeyedRNG(0, 4, torch.arange(6)))
    for ids in (mask.context, mask.target):
        assert (ids.diff(dim=-1) > 0).all() and ids.min() >= 0 and ids.max() < GRID.n
    both = [c | t for c, t in zip(sets(mask.context), sets(mask.target), strict=True)]
    kept = round(GRID.n * (1 - masker.neither))
    assert [len(b) for b in both] == [kept] * 6 == [mask.context.shape[1] + mask.target.shape[2]] * 6
    part = torch.tensor([4, 1])
    (alone,) = masker.from_scores(scores[part], GRID, KeyedRNG(0, 4, part))
    assert mask.context[part].equal(alone.context) and mask.target[part].equal(alone.target)


def test_the_highest_scores_are_hidden_or_shown():
    scores = scores_of(5)
    order = scores.argsort(1)
    (hidden,) = Scored(0.75).from_scores(scores, GRID, keys(5))
    assert sets(hidden.target) == sets(order[:, 6:])
    (shown,) = Scored(0.75, "show").from_scores(scores, GRID, keys(5))
    assert sets(shown.context) == sets(order[:, 18:])
    (neither,) = Scored(0.75, neither=0.5, share=(0.0, 0.0)).from_scores(scores, GRID, keys(5))
    assert sets(torch.cat([neither.context, neither.target[:, 0]], 1)) == sets(order[:, 12:])
    assert sets(neither.context) != sets(order[:, 18:]) != sets(neither.target[:, 0])  # at random among them
    (per_slice,) = Scored(0.75, "show", per_slice=True).from_scores(scores, GRID, keys(5))
    best = scores.unflatten(1, (2, 12)).topk(3)[1] + torch.tensor([[0], [12]])
    assert sets(per_slice.context) == sets(best)


def test_counts_are_those_of_the_published_code():
    assert Scored(0.95).counts(1568) == (78, 1490)  # AdaMAE: int(1568 * (1 - 0.95))
    assert Scored(0.9).counts(196) == (19, 177)  # MGMAE
    assert Scored(0.9, neither=0.7).counts(1568) == (156, 314)  # EVEREST
    assert Scored(0.9).counts(10) == (1, 9)  # in floating point 10 * (1 - 0.9) is below 1


def test_a_share_is_by_score_and_the_rest_at_random():
    scores = torch.arange(24.0).expand(4000, -1)
    masker = Scored(0.5, share=(0.0, 0.5), share_steps=10)
    for step, by_score in ((0, 0), (5, 3), (10, 6), (50, 6)):
        (mask,) = masker.from_scores(scores, GRID, KeyedRNG(0, step, torch.arange(4000)))
        frequency = torch.zeros(24).scatter_add(0, mask.target.flatten(), torch.ones(48000)) / 4000
        surely = 24 - by_score
        assert (frequency[surely:] == 1).all()
        assert (frequency[:surely] - (12 - by_score) / surely).abs().max() < 0.05


def test_a_sample_is_drawn_in_proportion_to_the_scores_without_replacement():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    (mask,) = Scored(0.5, "sample").from_scores(p.expand(20000, -1), Grid(1, 2, 2), keys(20000))
    frequency = torch.zeros(4).scatter_add(0, mask.context.flatten(), torch.ones(40000)) / 20000
    expected = p + sum(p[j] * torch.cat([p[:j], torch.zeros(1), p[j + 1 :]]) / (1 - p[j]) for j in range(4))
    assert (frequency - expected).abs().max() < 0.015
    (mask,) = Scored(0.5, "sample").from_scores(torch.tensor([[0.0, 0.5, 0.0, 0.5]]), Grid(1, 2, 2), keys(1))
    assert mask.context.tolist() == [[1, 3]]


def test_equal_scores_are_ordered_at_random():
    for masker in (Scored(0.5), Scored(0.5, "show"), Scored(0.75, neither=0.5)):
        (mask,) = masker.from_scores(torch.zeros(3000, 24), GRID, keys(3000))
        frequency = torch.zeros(24).scatter_add(0, mask.target.flatten(), torch.ones(mask.target.numel()))
        assert (frequency / frequency.mean() - 1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Scored()(torch.zeros(1), GRID, keys(1)), "name one with method.score.kind"),
        (lambda: Scored(0.99).from_scores(scores_of(1), GRID, keys(1)), "leave 0 to see and 24 to predict"),
        (lambda: Scored(0.5, neither=0.6).counts(20), "leave 10 to see and -2 to predict"),
        (lambda: Scored(rule="sample", share=(0.0, 1.0)), "goes with the rules hide and show"),
        (lambda: ColorNoise(tiny_encoder(), sigmas=(2.0, 1.0)), "give the smaller one first"),
        (
            lambda: SCORES["change"](tiny_encoder())(
                torch.zeros(1, 3, 2, 16, 16), Grid(1, 4, 4), keys(1), tiny_encoder()
            ),
            "two or more time slices",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_error(call, words):
    with pytest.raises(UserError) as e:
        call()
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("grid", [Grid(1, 16, 16), Grid(16, 16, 16)], ids=str)
def test_noise_has_the_spectrum_of_its_color(grid):
    """The mean power at low, middle and high frequencies, in cycles a token."""
    power = {}
    axes = torch.meshgrid(*(torch.fft.fftfreq(n).abs() for n in grid), indexing="ij")
    frequency = torch.stack(axes).norm(dim=0)
    low = (frequency < 0.08) & (frequency > 0)
    high = frequency > 0.4
    middle = (frequency > 0.12) & (frequency < 0.25)
    # Without a window the jump at the borders would add power at all frequencies.
    windows = [torch.hann_window(n) if n > 1 else torch.ones(1) for n in grid]
    window = torch.einsum("t,h,w->thw", *windows)
    for color in ("red", "green", "blue", "purple"):
        score = ColorNoise(tiny_encoder(), color)
        scores = score(torch.empty(0), grid, keys(8), tiny_encoder()).reshape(8, *grid)
        spectrum = torch.fft.fftn(scores * window, dim=(1, 2, 3)).abs().square().mean(0)
        power[color] = [float(spectrum[band].mean()) for band in (low, middle, high)]
    red, green, blue, purple = power.values()
    assert red[0] > 3 * red[1] and red[1] > 3 * red[2]
    assert green[1] > 2 * max(green[0], green[2])
    assert blue[2] > 3 * blue[1] and blue[1] > 3 * blue[0]
    assert purple[1] < 0.5 * min(purple[0], purple[2])


def test_noise_may_be_one_map_for_all_slices():
    scores = ColorNoise(tiny_encoder(), same_in_time=True)(torch.empty(0), GRID, keys(3), tiny_encoder())
    by_slice = scores.unflatten(1, (2, 12))
    assert by_slice[:, 0].equal(by_slice[:, 1]) and not by_slice[0].equal(by_slice[1])


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    score = ColorNoise(tiny_encoder())
    whole = score(torch.empty(0), Grid(8, 14, 14), keys(5), tiny_encoder())
    alone = score(torch.empty(0), Grid(8, 14, 14), KeyedRNG(0, 0, torch.tensor([3])), tiny_encoder())
    assert whole[3:4].equal(alone)


def test_change_is_highest_where_something_moves():
    encoder = tiny_encoder()
    video = torch.zeros(1, 3, 4, 16, 16)
    video[:, :, 2:, 4:8, 8:12] = 1.0  # place (1, 2) changes
    for of in ("embedding", "pixels"):
        scores = SCORES["change"](encoder, of=of)(video, Grid(2, 4, 4), keys(1), encoder)
        assert not scores.requires_grad
        assert scores.nonzero()[:, 1].tolist() == [6, 22]
    assert scores[0, 22] == pytest.approx(96**0.5)  # the pixels: 3 * 2 * 4 * 4 differences of 1


def longhand_pixel_errors(objective, video: Tensor, mask, norm: str) -> Tensor:
    """f32 [B, Nt]: of VideoMAE and MAE, from the outputs of encoder and predictor."""
    encoder = objective.encoder
    z = encoder(video, mask.context, return_levels=True)
    pred = objective.predictor(z, mask, objective.query.tokens[0], encoder.grid).target[:, 0]
    grid = encoder.grid
    t = encoder.tubelet
    p = encoder.patch
    errors = torch.empty(mask.target.shape[0], mask.target.shape[2])
    for b in range(len(video)):
        for i, token in enumerate(mask.target[b, 0].tolist()):
            s = token // (grid.h * grid.w)
            y = token // grid.w % grid.h
            x = token % grid.w
            cube = video[b, :, t * s : t * s + t, p * y : p * y + p, p * x : p * x + p]
            cube = cube.permute(1, 2, 3, 0).reshape(-1, 3)
            if norm == "channel":
                cube = cube * torch.tensor(STD) + torch.tensor(MEAN)
                cube = (cube - cube.mean(0)) / (cube.var(0) ** 0.5 + 1e-6)
            if norm == "patch":
                cube = (cube - cube.mean()) / (cube.var() + 1e-6).sqrt()
            errors[b, i] = (pred[b, i] - cube.flatten()).square().mean()
    return errors


def build_method(name: str, *more: str):
    """(objective with weights that are all in use, a video, the masks and scores of step 0)."""
    cfg = small(name, *more)
    objective = cfg.build_objective()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    video = torch.randn(2, 3, cfg.data.frames, 32, 32, generator=generator)
    masks, scores = objective.make_masks(video, keys(2))
    return objective, video, masks[0], scores


def test_colormae_loss_longhand():
    objective, video, mask, scores = build_method("colormae")
    assert scores is not None and sets(mask.context) == sets(scores.topk(4)[1])
    errors = longhand_pixel_errors(objective, video, mask, "patch")
    assert objective(video, keys(2))["loss"].item() == pytest.approx(errors.mean().item(), rel=1e-5)
    # They look at no pixels, so they are drawn ahead, on the host.
    (ahead,) = objective.draw_masks(video.shape, keys(2))
    assert ahead.context.equal(mask.context)


def test_everest_loss_longhand():
    objective, video, mask, scores = build_method("everest")
    weight = objective.encoder.patch_embed.proj
    tokens = weight(video).flatten(3)  # [2, D, 4, 16]
    change = (tokens[:, :, 1:] - tokens[:, :, :-1]).square().sum(1).sqrt()
    longhand = torch.cat([change[:, :1], change], 1).flatten(1)
    assert torch.allclose(scores, longhand, rtol=1e-4)
    for row, context, target in zip(longhand, sets(mask.context), sets(mask.target), strict=True):
        lowest = min(row[i].item() for i in context | target)
        assert len(context | target) == 19 and (row > lowest * (1 + 1e-4)).sum() < 19
    errors = longhand_pixel_errors(objective, video, mask, "channel")
    assert errors.shape == (2, 13) and mask.context.shape == (2, 6)
    assert objective(video, keys(2))["loss"].item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_adamae_loss_longhand():
    objective, video, mask, scores = build_method("adamae")
    score = objective.score
    tokens = objective.encoder.patch_embed.proj(video).flatten(2).mT + score.positions.table
    (block,) = score.blocks
    p = torch.softmax(block(tokens) @ score.proj.weight[0], -1)
    assert torch.allclose(scores, p, rtol=1e-4)
    errors = longhand_pixel_errors(objective, video, mask, "channel")
    sampling = sum(-p[b, mask.target[b, 0]].log() @ errors[b].detach() / 61 for b in range(2)) / 2
    found = objective(video, keys(2))
    assert found["aux_sampler_0"].item() == pytest.approx(1e-4 * sampling.item(), rel=1e-4)
    assert found["loss"].item() == pytest.approx((errors.mean() + 1e-4 * sampling).item(), rel=1e-5)


def test_only_the_sampler_s_loss_reaches_the_sampler_and_only_with_detach_nothing_else():
    objective, video, _, _ = build_method("adamae")
    for detach in (False, True):
        objective.score.detach = detach
        objective.score.weight = 1.0
        with_loss = gradients_of(objective, video)
        objective.score.weight = 0.0
        without = gradients_of(objective, video)
        reached = {name for name, g in with_loss.items() if not g.equal(without[name])}
        assert all(not g.any() for name, g in without.items() if name.startswith("score."))
        sampler = {name for name in with_loss if name.startswith("score.")}
        embedding = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
        assert reached == (sampler if detach else sampler | embedding)


def test_the_sampler_of_an_image_reads_its_own_patch_embedding():
    made = Encoder(4, 16, 16, dim=12, depth=1, heads=2, patch=8, image_tokenizer=True)
    image = torch.randn(2, 3, 1, 16, 16)
    scores = SCORES["sampler"](made, heads=2)(image, made.grid_of(image), keys(2), made)
    scores.square().sum().backward()
    assert scores.shape == (2, 4) and made.patch_embed_img.proj.weight.grad.any()
    assert made.patch_embed.proj.weight.grad is None


def gradients_of(objective, video: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    objective(video, keys(2))["loss"].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def test_hpm_loss_longhand():
    objective, video, mask, scores = build_method("hpm")
    score = objective.score
    errors = longhand_pixel_errors(objective, video, mask, "none")
    z = objective.encoder(video, mask.context, return_levels=True)
    p = score.predictor(z, mask, score.query.tokens[0], objective.encoder.grid).target[:, 0, :, 0]
    total = 0.0
    for b in range(2):
        pairs = [(i, j) for i in range(12) for j in range(12) if errors[b, i] > errors[b, j]]
        total += sum(-torch.log(torch.sigmoid(p[b, i] - p[b, j]) + 1e-6) for i, j in pairs) / len(pairs) / 2
    found = objective(video, keys(2))
    assert found["aux_rank_0"].item() == pytest.approx(total.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx((errors.mean() + total).item(), rel=1e-5)
    # The EMA sees the whole clip, and none of it before: the decoder has no mask tokens then.
    tokens = score.average_encoder(video, return_levels=True)
    x = score.average_predictor.embed(tokens)
    x[:, 1:] += score.average_predictor.positions.table
    (block,) = score.average_predictor.blocks
    x = score.average_predictor.norm(block(x))
    assert torch.allclose(scores, score.average_predictor.proj(x)[:, 1:, 0], atol=1e-5)


def test_hpm_averages_encoder_and_loss_predictor():
    objective = build_method("hpm")[0]
    score = objective.score
    pairs = ((score.average_encoder, objective.encoder), (score.average_predictor, score.predictor))
    before = [[p.clone() for p in average.parameters()] for average, _ in pairs]
    assert objective.momentum == (0.999, 0.9999)
    score.momentum = (0.5, 1.0)
    objective.update(0.5)
    for (average, module), old in zip(pairs, before, strict=True):
        for a, m, o in zip(average.parameters(), module.parameters(), old, strict=True):
            assert torch.allclose(a, 0.75 * o + 0.25 * m, atol=1e-6)
    assert objective.eval_encoder is objective.encoder


def test_each_average_has_its_own_momentum():
    """An EMA encoder as target beside HPM's: neither has that of the other."""
    ema = ("method.target={kind: ema, momentum: [0.9, 0.9]}", "method.score.momentum=[0.5, 0.7]")
    constant = ("optim.lr_decay=constant", "method.score.momentum=[0.6, 0.6]")
    assert not small("hpm", *ema, constant[0]).is_open_ended
    assert small("hpm", *ema, *constant).is_open_ended
    objective = small("hpm", *ema).build_objective()
    averages = objective.target.encoder.norm.weight, objective.score.average_encoder.norm.weight
    with torch.no_grad():
        objective.encoder.norm.weight.add_(1.0)
    objective.update(0.5)
    assert [a[0].item() for a in averages] == pytest.approx([1.1, 1.4])


def test_mgmae_loss_longhand(tmp_path):
    flow = write_network(ColourFlow(), tmp_path / "flow.pt")
    objective, video, mask, scores = build_method("mgmae", f"method.score.flow={flow}")
    for s in range(4):  # one token of 16 in each time slice
        tokens = scores.unflatten(1, (4, 16))[:, s].argmax(1) + 16 * s
        assert mask.context[:, s].equal(tokens)
    errors = longhand_pixel_errors(objective, video, mask, "channel")
    assert objective(video, keys(2))["loss"].item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_gaussians_of_places_are_joined_by_their_maximum():
    places = torch.tensor([[0, 7]])
    found = gaussian_map(places, Grid(1, 2, 4), 4)[0]
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(16.0), indexing="ij")
    each = [torch.exp(-((y - a) ** 2 + (x - b) ** 2) / 16) for a, b in ((1.5, 1.5), (5.5, 13.5))]
    largest = torch.maximum(*each)
    assert torch.allclose(found, largest / largest.max(), atol=1e-6)


def test_a_map_follows_the_flow_and_holes_keep_the_first_map():
    first = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    asked = []

    def flow(a: int, b: int) -> Tensor:
        asked.append((a, b))
        return torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 5, 6)

    maps = warp_from_middle(first, 4, flow, as_published=False)[0]
    assert asked == [(1, 2), (0, 1), (3, 2)]
    assert maps[2].equal(first[0])
    for frame, before in ((1, 2), (0, 1), (3, 2)):
        expected = first[0].clone()
        expected[:-1, :-2] = maps[before, 1:, 2:]
        assert torch.allclose(maps[frame], expected, atol=1e-5)
    asked.clear()
    published = warp_from_middle(first, 4, flow, as_published=True)
    assert asked == [(2, 1), (1, 0), (3, 2)]  # before the middle the flow of the opposite direction
    assert not torch.allclose(published[0], maps, atol=1e-3)  # displacements are too short


def test_matched_patches_carry_the_map_along():
    """A texture that moves 2 pixels a frame to the right: so do the scores."""
    encoder = Encoder(4, 32, 32, dim=24, depth=1, heads=2, patch=8, tubelet=1)
    noise = torch.randn(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    video = torch.cat([noise.roll(2 * t, -1) for t in range(4)], 2)
    score = SCORES["warp"](encoder, flow="blocks", ratio=0.94, as_published=False)
    scores = score(video, Grid(4, 4, 4), keys(1), encoder).view(4, 4, 4)
    centre = (scores.sum(1) * torch.arange(4.0)).sum(1) / scores.sum((1, 2))
    assert (centre.diff() > 0.05).all()


def test_a_flow_of_another_shape_is_refused(tmp_path):
    path = write_network(MeanFlow(), tmp_path / "flow.pt")
    encoder = tiny_encoder()
    score = SCORES["warp"](encoder, flow=path)
    with pytest.raises(UserError, match=r"gives \[1, 2, 4, 4\] for two \[1, 3, 16, 16\]"):
        score(torch.zeros(1, 3, 4, 16, 16), Grid(2, 4, 4), keys(1), encoder)


def moving_square() -> Tensor:
    """f32 [1, 3, 8, 32, 32]: a square of 8 pixels that moves 3 pixels a frame to the right, then is still."""
    video = torch.zeros(1, 3, 8, 32, 32)
    for t in range(8):
        x = 3 * min(t, 5)
        video[:, :, t, 20:28, x : x + 8] = 1.0
    return video


def centres(scores: Tensor, grid: Grid) -> list[tuple[int, int]]:
    """(row, column) of the highest score in each time slice of the first sample."""
    best = scores[0].view(grid.t, -1).argmax(1).tolist()
    return [(i // grid.w, i % grid.w) for i in best]


def test_the_box_follows_what_moves_and_stays_where_it_ends():
    encoder = Encoder(8, 32, 32, dim=24, depth=1, heads=2, patch=4)
    grid = Grid(4, 8, 8)
    scores = SCORES["motion_box"](encoder)(moving_square(), grid, keys(1), encoder)
    found = centres(scores, grid)
    assert {row for row, _ in found} <= {5, 6}
    columns = [column for _, column in found]
    assert columns == sorted(columns) and columns[0] <= 2 and columns[2] >= 3 and columns[3] == columns[2]
    (mask,) = Scored(0.75, per_slice=True).from_scores(scores, grid, keys(1))
    hidden = torch.zeros(64, dtype=torch.bool).scatter(0, mask.target[0, 0, :48], True).view(8, 8)
    rows = hidden.any(1).nonzero().flatten().tolist()
    assert rows == list(range(rows[0], rows[-1] + 1)) and hidden[5:7, :3].all()


def test_the_box_follows_the_motion_vectors_of_the_codec():
    encoder = Encoder(8, 32, 32, dim=24, depth=1, heads=2, patch=4)
    grid = Grid(4, 8, 8)
    score = SCORES["motion_box"](encoder, of="vectors")
    assert score.needs_motion and not score.needs_video
    vectors = torch.zeros(1, 2, 8, 4, 4, dtype=torch.float16)
    for t in range(8):
        vectors[0, :, t, 2, t // 2] = 3.0  # one cell of 8 pixels moves
    found = centres(score(vectors, grid, keys(1), encoder), grid)
    assert [column // 2 for _, column in found] == [0, 1, 2, 3] and {row // 2 for row, _ in found} == {2}


def test_a_box_without_motion_starts_anywhere_and_stays():
    encoder = Encoder(8, 32, 32, dim=24, depth=1, heads=2, patch=4)
    grid = Grid(4, 8, 8)
    scores = SCORES["motion_box"](encoder)(torch.zeros(200, 3, 8, 32, 32), grid, keys(200), encoder)
    by_slice = scores.unflatten(1, (4, 64))
    assert (by_slice == by_slice[:, :1]).all()
    assert len(by_slice[:, 0].argmax(1).unique()) > 50


def test_motion_box_loss_longhand():
    objective, video, mask, scores = build_method("mgm_motion_box")
    highest = scores.unflatten(1, (4, 16)).topk(12)[1] + 16 * torch.arange(4)[:, None]
    nearest = [len(h & t) for h, t in zip(sets(highest), sets(mask.target), strict=True)]
    assert mask.context.shape == (2, 16) and min(nearest) >= 40  # equal distances are ordered at random
    errors = longhand_pixel_errors(objective, video, mask, "channel")
    assert objective(video, keys(2))["loss"].item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_rank_loss_of_ties_is_zero_and_of_the_right_order_small():
    error = torch.tensor([[1.0, 2.0, 3.0]])
    assert rank_loss(torch.randn(1, 3), torch.ones(1, 3)) == 0
    assert rank_loss(10 * error, error) < 1e-3 < 5 < rank_loss(-10 * error, error)

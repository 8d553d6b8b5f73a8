"""The cross-attention predictor and the queries: what each option means, apart from the references
(tests/parity)."""

import pytest
import torch
import torch.nn.functional as F

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.cross_predictor import CrossPredictor
from vidssl.model.grid import Mask, gather_tokens, patchify
from vidssl.model.prediction import Encoded
from vidssl.model.predictor import JointPredictor
from vidssl.model.queries import ContextMean, Noise, Noised, signal_shares
from vidssl.model.vit import Encoder

B, HIDDEN = 2, 5
SIZES = {"width": 24, "depth": 2, "heads": 2}


def small(**options) -> Encoder:
    torch.manual_seed(0)
    return Encoder(4, 16, 16, **{"dim": 48, "depth": 2, "heads": 3, "patch": 8, **options})


ENCODER = small()
GRID = ENCODER.grid  # 2 x 2 x 2


def mask_of(context: int, groups: int = 1) -> Mask:
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(GRID.n, generator=generator) for _ in range(B)])
    hidden = order[:, context:]
    targets = [hidden[:, [i, (i + 1) % hidden.shape[1]]] for i in range(groups)]
    return Mask(order[:, :context], torch.stack(targets, 1))


def encoded(mask: Mask, seed: int = 0, encoder: Encoder = ENCODER, video=None) -> Encoded:
    video = torch.randn(B, 3, 4, 16, 16) if video is None else video
    rng = KeyedRNG(seed, 0, torch.arange(B))
    z = encoder(video, mask.context, return_levels=True)
    return Encoded(video, video, encoder.grid, 0, mask, rng, z, None)


OPTIONS = {
    "crossmae": {"memory": "mix"},
    "latent mim": {
        "self_attention": "before",
        "embed": True,
        "memory_positions": True,
        "memory_norm": True,
        "class_query": True,
    },
    "siammae": {"self_attention": "after", "embed": True, "visible_too": True, "norm": "post"},
    "capi": {"positions": "rope", "norm_kind": "rms", "bias": False, "head": "cosine", "final_norm": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_order_of_context_tokens_and_other_groups_do_not_matter(name):
    encoder = small(final_norm=name != "crossmae", positions="rope" if name == "capi" else "sincos_uniform")
    predictor = CrossPredictor(encoder, 10, **SIZES, **OPTIONS[name])
    mask = mask_of(4, groups=3)
    video = torch.randn(B, 3, 4, 16, 16)
    z = encoder(video, mask.context, True, all_layers=predictor.needs_all_layers)
    query = torch.randn(B, 3, 2, 24)
    found = predictor(z, mask, query, GRID).target
    assert found.shape == (B, 3, 2, 10)
    order = torch.tensor([2, 0, 3, 1])
    permuted = mask._replace(context=mask.context[:, order])
    torch.testing.assert_close(predictor(z[:, order], permuted, query, GRID).target, found)
    one = Mask(mask.context, mask.target[:, 1:2])
    torch.testing.assert_close(predictor(z, one, query[:, 1:2], GRID).target, found[:, 1:2])
    moved = predictor(z, mask._replace(context=mask.context.flip(1)), query, GRID).target
    has_positions = name in ("latent mim", "siammae", "capi")
    assert torch.allclose(moved, found, atol=1e-6) != has_positions


def test_a_memory_of_the_first_slice_leaves_the_others_to_the_queries():
    """Changing a visible token of the second slice changes what is predicted only as a query does."""
    first = torch.arange(4).expand(B, -1)
    context = torch.cat([first, torch.tensor([[5], [6]])], 1)
    mask = Mask(context, torch.tensor([[[4, 6, 7]], [[4, 5, 7]]]))
    options = {"embed": True, "visible_too": True, "memory_slices": "first"}
    z = torch.randn(B, 5, 48)
    changed = torch.cat([z[:, :4], torch.randn(B, 1, 48)], 1)
    query = torch.randn(24)
    for self_attention in ("none", "after"):
        predictor = CrossPredictor(ENCODER, 10, **SIZES, **options, self_attention=self_attention)
        a, b = (predictor(tokens, mask, query, GRID).target for tokens in (z, changed))
        assert torch.equal(a, b) == (self_attention == "none")
    with pytest.raises(UserError, match="next_frame"):
        predictor(z[:, :4], Mask(first, mask.target), query, GRID)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visible_too": True}, "need embed: true"),
        ({"memory": "mix", "embed": True}, "mix needs embed: false"),
        ({"memory": "mix"}, "final_norm: false"),
        ({"class_query": True, "positions": "rope"}, "class_query"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CrossPredictor(ENCODER, 10, **SIZES, **options)


def test_noise_goes_through_the_predictor_s_embedding_or_not():
    predictor = JointPredictor(ENCODER, 10, **SIZES)
    given = encoded(mask_of(4, groups=2))
    noise = KeyedRNG(0, 0, torch.arange(B)).normal(2, 2, 48)
    found = Noise(24, ENCODER, std=0.5, through_embed=True)(given, predictor)
    want = 0.5 * noise @ predictor.embed.weight.T + predictor.embed.bias
    torch.testing.assert_close(found, want)
    direct = Noise(24, ENCODER, std=0.01)(encoded(mask_of(4, groups=2)), predictor)
    assert direct.shape == (B, 2, 2, 24)
    assert direct.std().item() == pytest.approx(0.01, rel=0.3)
    with pytest.raises(UserError, match="embed: true"):
        Noise(24, ENCODER, through_embed=True)(given, CrossPredictor(ENCODER, 10, **SIZES))


def test_context_mean_weighs_visible_tokens_by_the_similarity_of_positions():
    predictor = JointPredictor(ENCODER, 10, **SIZES)
    mask = mask_of(3, groups=2)
    given = encoded(mask)
    query = ContextMean(24)
    query.token.data.normal_()
    found = query(given, predictor)
    table = predictor.positions.table
    for clip in range(B):
        z = predictor.embed(given.z[clip])
        for group in range(2):
            for i, token in enumerate(mask.target[clip, group]):
                scores = torch.stack([table[token] @ table[c] for c in mask.context[clip]]) / 24**0.5
                weights = scores.exp() / scores.exp().sum()
                want = query.token + sum(w * v for w, v in zip(weights, z, strict=True))
                torch.testing.assert_close(found[clip, group, i], want)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_diffusion_keeps_everything_at_first_and_nothing_at_last(schedule):
    shares = signal_shares(schedule, 1000)
    assert shares[0] == 1
    assert shares[-1] < 1e-4
    assert (shares.diff() <= 0).all()
    if schedule == "linear":  # DDPM
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        torch.testing.assert_close(shares[1:], (1 - betas).cumprod(0).float())
    else:
        assert shares[500].item() == pytest.approx(0.5, abs=0.02)


def test_a_noised_query_carries_the_target_at_first_and_only_noise_at_last():
    mask = mask_of(3)
    query = Noised(24, ENCODER, schedule="cosine")
    video = torch.randn(B, 3, 4, 16, 16)
    steps = {t: torch.full((B, 1), t) for t in (0, 500, 1000)}
    found = {t: query.noised_patches(encoded(mask, video=video), at) for t, at in steps.items()}
    scale = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
    patches = gather_tokens(patchify(2 * (video * scale + mean) - 1, 2, 8), mask.target)
    clean = patches.movedim(3, -1).flatten(3)
    torch.testing.assert_close(found[0], clean)
    noise = KeyedRNG(0, 0, torch.arange(B)).normal(*clean.shape[1:])
    torch.testing.assert_close(found[1000], noise, atol=2e-3, rtol=0)
    share = signal_shares("cosine", 1000)[500]
    torch.testing.assert_close(found[500], share.sqrt() * clean + (1 - share).sqrt() * noise)
    assert F.mse_loss(query(encoded(mask), ENCODER), query(encoded(mask, 1), ENCODER)) > 0


def test_less_noise_with_a_smaller_exponent():
    plain, less = (Noised(24, ENCODER, exponent=rho).shares for rho in (1.0, 0.8))
    torch.testing.assert_close(less, plain**0.8)

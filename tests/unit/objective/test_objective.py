"""The formula against longhand."""

import pytest
import torch
import torch.nn.functional as F

from vidssl.core.pixels import MEAN, STD
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, gather_tokens, patchify
from vidssl.model.heads import AttentiveHead
from vidssl.model.positions import sincos_3d, sincos_flat
from vidssl.model.predictor import JointPredictor, MaskToken
from vidssl.model.vit import Encoder
from vidssl.objective.ema_target import Ema
from vidssl.objective.errors import ERRORS
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.masks import RunningCell
from vidssl.objective.targets import Pixels


class Fixed:
    """A masker that returns given masks."""

    def __init__(self, *masks: Mask):
        self.masks = list(masks)

    def __call__(self, video, grid, draws):
        return self.masks


def draws(n: int) -> KeyedRNG:
    return KeyedRNG(0, 0, torch.arange(n))


def small(**options) -> Encoder:
    return Encoder(8, 32, 32, dim=48, depth=2, heads=3, patch=8, **options)


def test_patchify_order():
    video = torch.arange(2 * 3 * 4 * 4 * 8).float().reshape(2, 3, 4, 4, 8)
    patches = patchify(video, tubelet=2, patch=2)  # grid 2 x 2 x 4
    assert patches.shape == (2, 16, 3, 2, 2, 2)
    t, h, w = 1, 0, 3
    assert patches[1, (t * 2 + h) * 4 + w].equal(video[1, :, 2:4, 0:2, 6:8])


def test_gather_tokens():
    x = torch.randn(2, 5, 3)
    ids = torch.tensor([[[4, 0]], [[1, 1]]])
    got = gather_tokens(x, ids)
    assert got.shape == (2, 1, 2, 3)
    assert got[0, 0, 0].equal(x[0, 4])
    assert got[1, 0, 1].equal(x[1, 1])


def test_encoder_equals_convolution_then_selection():
    torch.manual_seed(0)
    encoder = small()
    video = torch.randn(2, 3, 8, 32, 32)
    ids = torch.stack([torch.randperm(64)[:10], torch.randperm(64)[:10]])
    x = encoder.patch_embed.proj(video).flatten(2).transpose(1, 2) + sincos_3d(Grid(4, 4, 4), 48, True)
    x = gather_tokens(x, ids)
    for block in encoder.blocks:
        x = block(x)
    assert torch.allclose(encoder(video, ids), encoder.norm(x), atol=1e-5)


def test_videomae_loss_longhand():
    torch.manual_seed(0)
    encoder = small(positions="sincos_flat", init="xavier")
    predictor = JointPredictor(
        encoder, 384, width=24, depth=2, heads=3, embed_bias=False, positions="sincos_flat"
    )
    video = torch.randn(2, 3, 8, 32, 32)
    order = torch.stack([torch.randperm(64), torch.randperm(64)])
    mask = Mask(order[:, :16], order[:, None, 16:])
    token = MaskToken(24)
    objective = MaskedPrediction(encoder, Fixed(mask), Pixels(encoder), token, predictor, ERRORS["l2"]())
    got = objective(video, draws(2))["loss"]

    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    total, count = 0.0, 0
    pos = sincos_flat(Grid(4, 4, 4), 24)
    for b in range(2):
        z = encoder(video[b : b + 1], mask.context[b : b + 1])[0]
        seen = z @ predictor.embed.weight.T + pos[mask.context[b]]
        hidden = token.tokens[0] + pos[mask.target[b, 0]]
        x = torch.cat([seen, hidden])[None]
        for block in predictor.blocks:
            x = block(x)
        out = predictor.proj(predictor.norm(x))[0, 16:]
        for i, token_id in enumerate(mask.target[b, 0].tolist()):
            t = token_id // 16
            h = token_id // 4 % 4
            w = token_id % 4
            cube = video[b, :, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
            pixels = (cube.permute(1, 2, 3, 0) * std + mean).reshape(-1, 3)
            normed = (pixels - pixels.mean(0)) / (pixels.var(0, unbiased=True) ** 0.5 + 1e-6)
            total = total + (out[i] - normed.reshape(-1)).pow(2).sum()
            count += 384
    assert abs((got - total / count).item()) < 1e-6


def test_vjepa_loss_longhand():
    torch.manual_seed(0)
    encoder = small()
    target = Ema(encoder)
    with torch.no_grad():
        for p in target.encoder.parameters():
            p.add_(0.02 * torch.randn_like(p))
    predictor = JointPredictor(encoder, 48, width=24, depth=2, heads=3)
    token = MaskToken(24, groups=2)
    video = torch.randn(2, 3, 8, 32, 32)
    order = torch.stack([torch.randperm(64), torch.randperm(64)])
    masks = Mask(order[:, :16], order[:, None, 16:48]), Mask(order[:, 40:48], order[:, None, :35])
    objective = MaskedPrediction(encoder, Fixed(*masks), target, token, predictor, ERRORS["l1"]())
    got = objective(video, draws(2))["loss"]

    features = target.encoder(video)
    centred = features - features.mean(-1, keepdim=True)
    want = centred / (features.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    pos = sincos_3d(Grid(4, 4, 4), 24, True)
    losses = []
    for i, m in enumerate(masks):
        each = []
        for b in range(2):
            z = encoder(video[b : b + 1], m.context[b : b + 1])[0]
            hidden = token.tokens[i] + pos[m.target[b, 0]]
            x = torch.cat([predictor.embed(z) + pos[m.context[b]], hidden])[None]
            for block in predictor.blocks:
                x = block(x)
            out = predictor.proj(predictor.norm(x))[0, m.context.shape[1] :]
            each.append((out - want[b, m.target[b, 0]]).abs().mean())
        losses.append(sum(each) / 2)
    assert abs((got - sum(losses) / 2).item()) < 1e-6
    got.backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for n, p in objective.named_parameters() if p.requires_grad)


def test_target_groups_are_independent():
    torch.manual_seed(0)
    encoder = small()
    predictor = JointPredictor(encoder, 7, width=24, depth=1, heads=3)
    z = torch.randn(2, 8, 48)
    ids = torch.stack([torch.randperm(64), torch.randperm(64)])
    both = Mask(ids[:, :8], ids[:, 8:32].reshape(2, 2, 12))
    query = torch.randn(24)
    got = predictor(z, both, query, encoder.grid).target
    for m in range(2):
        alone = predictor(z, Mask(both.context, both.target[:, m : m + 1]), query, encoder.grid).target
        assert torch.allclose(got[:, m], alone[:, 0], atol=1e-6)


@pytest.mark.parametrize("positions", ["sincos_uniform", "rope"])
def test_last_block_computes_only_outputs(positions):
    encoder = small()
    predictor = JointPredictor(encoder, 7, width=24, depth=2, heads=2, positions=positions)
    z = torch.randn(2, 3, encoder.dim)
    mask = Mask(torch.tensor([[0, 3, 5], [1, 2, 7]]), torch.tensor([[[1, 2, 4]], [[0, 3, 4]]]))
    query = torch.randn(24)
    sizes = []
    hook = predictor.blocks[-1].mlp.register_forward_hook(lambda _, x, y: sizes.append(y.shape[1]))
    said = [
        predictor.forward_tokens(z, mask, query, encoder.grid, everywhere) for everywhere in (False, True)
    ]
    hook.remove()
    assert sizes == [3, 6] and said[1].shape[2] == 6
    assert torch.allclose(said[0], said[1][:, :, 3:], atol=1e-6)


def test_weighted_reduction():
    error = torch.rand(2, 1, 4)
    weight = torch.tensor([[[1.0, 0, 0, 1]], [[0, 0, 0, 2]]])
    want = ((error[0, 0, 0] + error[0, 0, 3]) / 2 + error[1, 0, 3]) / 2  # each clip counts the same
    empty = torch.empty(0)
    assert torch.allclose(MaskedPrediction.weighted_mean(error, Mask(empty, empty, weight)), want)
    assert torch.allclose(MaskedPrediction.weighted_mean(error, Mask(empty, empty)), error.mean())


@pytest.mark.parametrize("grid", [Grid(2, 4, 4), Grid(3, 4, 4), Grid(5, 6, 3), Grid(1, 7, 5)], ids=str)
@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_the_loss_of_a_batch_is_the_mean_of_that_of_its_parts(grid, ratio):
    """Also where clips have different numbers of targets: slices that are no multiple of the cell's turn."""
    clips = 12
    mask = RunningCell(ratio)(torch.empty(clips, 0), grid, KeyedRNG(0, 0, torch.arange(clips)))[0]
    error = torch.rand(mask.target.shape)
    whole = MaskedPrediction.weighted_mean(error, mask)
    for part in (1, 3, 4):
        losses = [
            MaskedPrediction.weighted_mean(e, Mask(mask.context, mask.target, w))
            for e, w in zip(error.split(part), mask.weight.split(part), strict=True)
        ]
        torch.testing.assert_close(torch.stack(losses).mean(), whole)


def test_ema_update():
    torch.manual_seed(0)
    encoder = small()
    target = Ema(encoder)
    before = [p.clone() for p in target.encoder.parameters()]
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(1.0)
    target.update(encoder, 0.9)
    for old, new in zip(before, target.encoder.parameters(), strict=True):
        assert torch.allclose(new, old + 0.1, atol=1e-5)


def test_cross_attention_longhand():
    torch.manual_seed(0)
    head = AttentiveHead(24, 3, 5)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, tokens = torch.randn(2, 1, 24), torch.randn(2, 7, 24)
    q = head.xattn.q(x).unflatten(-1, (3, 8)).transpose(1, 2)
    k, v = head.xattn.kv(tokens).unflatten(-1, (2, 3, 8)).permute(2, 0, 3, 1, 4)
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(head.xattn(x, tokens), want, atol=1e-5)

"""Networks that are told the noise level of their input; UMD's loss, written out from its paper and code."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD
from vidssl.core.rng import KeyedRNG

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import small

CLIPS = 3


def test_umd():
    """Section 3 and train_ae.py: half of the squared error of x0 at hidden pixels of clean images, and half
    of the mean of noise at visible and x0 at hidden pixels of noised ones; both networks are told t."""
    objective = small("umd").build_objective()
    encoder, decoder = objective.encoder, objective.predictor
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in objective.named_parameters():
            if "modulation" in name:
                p.normal_(std=0.2)
    video = torch.randn(CLIPS, 3, 1, 32, 32)
    rng = KeyedRNG(0, 3, torch.arange(CLIPS))
    masks = objective.draw_masks(video.shape, rng)
    assert [m.context.shape[1] for m in masks] == [4, 10]
    found = objective(video, rng, masks)

    rng = KeyedRNG(0, 3, torch.arange(CLIPS))
    objective.draw_masks(video.shape, rng)
    t = 1 + (rng.rand() * 1000).long()
    noise = rng.normal(3, 32, 32)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    x0 = 2 * (video[:, :, 0] * std + mean) - 1
    kept = (
        torch.cos((t / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    kept = kept.view(-1, 1, 1, 1)
    noised = kept.sqrt() * x0 + (1 - kept).sqrt() * noise

    def run(blocks, x, c, norm):
        for block in blocks:
            s0, f0, g0, s1, f1, g1 = F.linear(c, block.modulation.weight, block.modulation.bias)[
                :, None
            ].chunk(6, -1)
            x = x + g0 * block.attn(
                F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6) * (1 + f0) + s0
            )
            x = x + g1 * block.mlp(
                F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6) * (1 + f1) + s1
            )
        return norm(x)

    def patches(image):
        return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8)

    def predict(image, level, mask):
        waves = level[:, None] * torch.exp(-math.log(10000) / 23 * torch.arange(24))
        level_net = encoder.noise_level
        c = F.silu(level_net.second(F.silu(level_net.first(torch.cat([waves.sin(), waves.cos()], 1)))))
        clip = ((image + 1) / 2 - mean) / std
        weight = rearrange(encoder.patch_embed.proj.weight, "d c 1 p q -> d (p q c)")
        x = F.linear(patches(clip), weight, encoder.patch_embed.proj.bias)
        x = x + encoder.positions.embedding(encoder.grid, None)
        x = torch.stack([row[ids] for row, ids in zip(x, mask.context, strict=True)])
        x = torch.cat([encoder.class_token.expand(CLIPS, 1, -1), x], 1)
        z = decoder.embed(run(encoder.blocks, x, c, encoder.norm))
        hidden = objective.query.tokens[0].expand(CLIPS, 16, -1)
        everywhere = hidden.scatter(1, mask.context[..., None].expand_as(z[:, 1:]), z[:, 1:])
        everywhere = everywhere + decoder.positions.embedding(encoder.grid, None)
        y = run(decoder.blocks, torch.cat([z[:, :1], everywhere], 1), c, decoder.norm)[:, 1:]
        shift, factor = F.linear(c, decoder.modulation.weight, decoder.modulation.bias)[:, None].chunk(2, -1)
        y = y * (1 + factor) + shift
        return decoder.proj(y), decoder.proj_context(y)

    def mean_at(error, ids):
        return torch.stack([row[i].mean() for row, i in zip(error, ids, strict=True)]).mean()

    clean, _ = predict(x0, torch.zeros(CLIPS), masks[0])
    mae = mean_at((clean - patches(x0)).square(), masks[0].target[:, 0])
    image, of_noise = predict(noised, t.float(), masks[1])
    hidden = mean_at((image - patches(x0)).square(), masks[1].target[:, 0])
    visible = mean_at((of_noise - patches(noise)).square(), masks[1].context)
    torch.testing.assert_close(found["loss"], mae / 2 + (hidden + visible) / 4, rtol=1e-5, atol=1e-6)


def test_a_conditioned_encoder_is_told_that_clips_are_clean():
    encoder = small("umd").build_objective().encoder
    with torch.no_grad():
        for block in encoder.blocks:
            block.modulation.weight.normal_(std=0.2)
    video = torch.randn(2, 3, 1, 32, 32)
    levels = [encoder.condition_of(torch.full((2,), level), 2, video.device) for level in (0.0, 500.0)]
    torch.testing.assert_close(encoder(video), encoder(video, condition=levels[0]))
    assert (encoder(video) - encoder(video, condition=levels[1])).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.conditioned=false", "predictor.conditioned needs model.conditioned=true"),
        ("model.block_norm=post", "model.conditioned needs model.block_norm=pre"),
        ("method.mask.ratios=[0.75,0.99]", "0.99 of 16 tokens hides 16"),
    ],
)
def test_mistakes_of_noise_levels_are_named(change, message):
    with pytest.raises(UserError, match=message):
        small("umd", change).build_objective()

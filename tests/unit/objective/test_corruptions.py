"""Corruptions: what they change, and where."""

import pytest
import torch
import torch.nn.functional as F

from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD, normalise
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, patchify
from vidssl.model.vit import Encoder
from vidssl.objective.corruptions import CORRUPTIONS, Blur, Gaussian, Grey, Mix, Token

GRID = Grid(2, 4, 4)
# diffused has tests of its own (test_noise_levels.py): it noises what is visible
PIXEL_KINDS = [kind for kind in CORRUPTIONS if kind not in ("token", "diffused")]


def encoder() -> Encoder:
    return Encoder(4, 32, 32, dim=12, depth=1, heads=2, patch=8)


def rng(n: int = 3) -> KeyedRNG:
    return KeyedRNG(0, 0, torch.arange(n))


def half_hidden(n: int = 3) -> Mask:
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i)) for i in range(n)])
    return Mask(order[:, :16].sort(1)[0], order[:, None, 16:].sort(2)[0])


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_only_hidden_patches_change(kind):
    video = torch.randn(3, 3, 4, 32, 32)
    mask = half_hidden()
    corruption = CORRUPTIONS[kind](where="hidden", **({} if kind == "mix" else {"sees": "all"}))
    seen = corruption(video, mask, GRID, rng())
    changed = (patchify(seen.video, 2, 8) != patchify(video, 2, 8)).flatten(2).any(2)
    for row, context in zip(changed, mask.context, strict=True):
        assert not row[context].any() and row.sum() == 16
    assert seen.replaced is None and corruption.sees_all
    # of a clip's key and pixels alone
    alone = corruption(
        video[1:2], Mask(mask.context[1:2], mask.target[1:2]), GRID, KeyedRNG(0, 9, torch.tensor([1]))
    )
    torch.testing.assert_close(alone.video, seen.video[1:2])


@pytest.mark.parametrize("kind", ["gaussian", "blur", "grey"])
def test_hidden_patches_alone_need_an_encoder_that_sees_them(kind):
    with pytest.raises(UserError, match="where=hidden and sees=context"):
        CORRUPTIONS[kind](where="hidden", sees="context")


def test_token_stands_for_hidden_patches():
    """What is behind the token does not matter; that it is there does."""
    torch.manual_seed(0)
    network = encoder()
    corruption = Token(network)
    video = torch.randn(3, 3, 4, 32, 32)
    mask = half_hidden()
    seen = corruption(video, mask, GRID, rng())
    replaced = seen.replaced
    assert seen.video is video and replaced[0].sum() == 3 * 16
    z = network(video, replaced=replaced)
    noise = Gaussian(where="hidden")(video, mask, GRID, rng()).video
    assert network(noise, replaced=replaced).equal(z)
    z.sum().backward()
    assert corruption.token.grad.abs().min() > 0


def test_noise_has_the_level():
    video = torch.zeros(200, 3, 2, 8, 8)
    fixed = Gaussian(sigma=0.3)(video, half_hidden(200), GRID, rng(200)).video
    assert fixed.std() == pytest.approx(0.3, rel=0.02) and abs(fixed.mean()) < 4e-3
    drawn = Gaussian(levels=True)(video, half_hidden(200), GRID, rng(200)).video
    level = drawn.flatten(1).std(1)
    # sin of a uniform angle: 2 / pi on average
    assert level.mean() == pytest.approx(0.637, abs=4 * 0.31 / 200**0.5)
    kept = Gaussian(levels=True)(video + 1, half_hidden(200), GRID, rng(200)).video - drawn
    torch.testing.assert_close(
        kept[:, 0, 0, 0, 0].square() + level.square(), torch.ones(200), atol=0.3, rtol=0
    )


def test_blur_is_a_convolution():
    video = torch.randn(2, 3, 2, 16, 16)
    corruption = Blur(sigma=0.8)
    offsets = torch.arange(-3, 4.0)
    line = torch.exp(-0.5 * (offsets / 0.8) ** 2)
    kernel = torch.outer(line, line)
    images = F.pad(video.transpose(1, 2).reshape(12, 1, 16, 16), (3, 3, 3, 3), mode="replicate")
    want = F.conv2d(images, (kernel / kernel.sum())[None, None]).reshape(2, 2, 3, 16, 16).transpose(1, 2)
    torch.testing.assert_close(corruption.corrupted(video, GRID, rng(2)), want)
    assert not corruption.sees_all


def test_mix_shows_a_connected_piece_of_the_clip():
    """Every patch is another one of the clip, all the same way off."""
    ids = torch.arange(64.0).reshape(4, 4, 4)
    video = (
        ids.repeat_interleave(2, 0).repeat_interleave(8, 1).repeat_interleave(8, 2).expand(5, 3, 8, 32, 32)
    )
    mixed = Mix().corrupted(video, Grid(4, 4, 4), rng(5))
    shown = patchify(mixed, 2, 8)[:, :, 0].flatten(2)
    assert (shown == shown[:, :, :1]).all()
    for clip in shown[:, :, 0].reshape(5, 4, 4, 4):
        source = clip[0, 0, 0].long()
        shift = [int(source // 16), int(source // 4 % 4), int(source % 4)]
        assert min(shift) >= 1 and clip.equal(ids.roll([-s for s in shift], (0, 1, 2)))


def test_grey_has_the_luminance_of_every_pixel():
    video = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    grey = Grey()(normalise(video), half_hidden(2), GRID, rng(2)).video
    std, mean = (torch.tensor(values)[:, None, None, None] for values in (STD, MEAN))
    pixels = grey * std + mean
    want = sum(w * video[:, c].float() / 255 for c, w in enumerate((0.299, 0.587, 0.114)))
    torch.testing.assert_close(pixels, want[:, None].expand_as(pixels))

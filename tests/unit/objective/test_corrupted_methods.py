"""Losses of methods with corrupted inputs or targets made from pixels, written out from their papers."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD, channel_statistics
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import make_teacher, small

CLIPS = 2


def patches_of(video: Tensor, tubelet: int) -> Tensor:
    """[B, N, tubelet, 8, 8, 3] by plain slicing."""
    frames, height, width = video.shape[2:]
    cut = [
        video[:, :, t : t + tubelet, y : y + 8, x : x + 8].permute(0, 2, 3, 4, 1)
        for t in range(0, frames, tubelet)
        for y in range(0, height, 8)
        for x in range(0, width, 8)
    ]
    return torch.stack(cut, 1)


def pixels(video: Tensor, objective) -> Tensor:
    return patches_of(video, objective.encoder.tubelet).flatten(2)


def normed_pixels(video: Tensor, objective) -> Tensor:
    x = pixels(video, objective)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def histograms(video: Tensor, objective) -> Tensor:
    """Of one cell a patch: nine bins of 20 degrees, by a convolution."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    frames = video[:, :, ::2].transpose(1, 2)  # [B, t, 3, H, W]
    images = F.pad(frames.reshape(-1, 1, *video.shape[3:]), (1, 1, 1, 1), mode="reflect")
    x, y = (F.conv2d(images, k[None, None]).reshape(frames.shape) for k in (kernel, kernel.T))
    # in the border columns it is 0 by reflection, an edge between bins
    x[..., [0, -1]] = 0.0
    degrees = torch.rad2deg(torch.atan2(x, y)) % 180
    strength = (x.square() + y.square()).sqrt()
    angles, strengths = (patches_of(v.transpose(1, 2), 1).squeeze(2) for v in (degrees, strength))
    # an angle just below 0 is rounded to 180
    bins = F.one_hot((angles // 20).long().clamp_max(8), 9)  # [B, N, 8, 8, 3, 9]
    return (bins * strengths[..., None]).sum((2, 3))


def unit_histograms(video: Tensor, objective) -> Tensor:
    found = histograms(video, objective)
    return (found / found.norm(dim=-1, keepdim=True)).flatten(2)


def change(video: Tensor, objective) -> Tensor:
    x = patches_of(video, 2)
    return (x[:, :, 1] - x[:, :, 0]).flatten(2)


def histograms_and_moves(video: Tensor, objective) -> Tensor:
    """Displacements of a clip that rolls one pixel to the left with every frame, in cells of eight pixels."""
    moves = torch.tensor([-1 / 8, 0]).expand(*video.shape[:1], 64, 2)
    return torch.cat([unit_histograms(video, objective), moves], -1)


def red_levels(video: Tensor, objective) -> Tensor:
    red = patches_of(video, 1)[..., 0] * STD[0] + MEAN[0]
    return (red.mean((2, 3, 4)) * 9).round().long()


def same(video: Tensor, hidden: Tensor, rng: KeyedRNG) -> Tensor:
    return video


def noisy(video: Tensor, hidden: Tensor, rng: KeyedRNG) -> Tensor:
    frames = [frame + 0.5 * rng.normal(*frame.shape[1:]) for frame in video.unbind(2)]
    return torch.stack(frames, 2)


def blurred(video: Tensor, hidden: Tensor, rng: KeyedRNG) -> Tensor:
    line = torch.exp(-0.5 * (torch.arange(-4.0, 5) / 1.1) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    images = F.pad(video.reshape(-1, 1, *video.shape[3:]), (4, 4, 4, 4), mode="replicate")
    return F.conv2d(images, kernel[None, None]).reshape(video.shape)


def grey(video: Tensor, hidden: Tensor, rng: KeyedRNG) -> Tensor:
    red, green, blue = (video[:, c] * STD[c] + MEAN[c] for c in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([(luma - MEAN[c]) / STD[c] for c in range(3)], 1)


def mixed(video: Tensor, hidden: Tensor, rng: KeyedRNG) -> Tensor:
    out = video.clone()
    for b, (t, y, x) in enumerate((4 * (0.25 + 0.5 * rng.rand(3))).round().long().tolist()):
        other = video[b].roll((-2 * t, -8 * y, -8 * x), (1, 2, 3))
        where = hidden[b].reshape(4, 4, 4).repeat_interleave(2, 0)
        where = where.repeat_interleave(8, 1).repeat_interleave(8, 2)
        out[b] = torch.where(where, other, video[b])
    return out


def l1(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).abs().mean()


def l2(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).square().mean()


def l2_of_both(pred: Tensor, target: Tensor) -> Tensor:
    return (l2(pred[..., :27], target[..., :27]) + l2(pred[..., 27:], target[..., 27:])) / 2


def cross_entropy(pred: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(pred.flatten(0, -2), target.flatten())


# input of the encoder, target of every token, error
METHODS = {
    "maskfeat": (same, unit_histograms, l2),
    "hog_motion": (same, histograms_and_moves, l2_of_both),
    "frame_difference": (same, change, l2),
    "given_tokens": (same, red_levels, cross_entropy),
    "denoising_autoencoder": (noisy, pixels, l2),
    "deblurring_mae": (blurred, normed_pixels, l2),
    "mixed_blocks": (mixed, pixels, l1),
    "colourisation": (grey, pixels, l2),
    "context_encoder": (same, pixels, l2),
}


def joint_prediction(objective, z: Tensor, context: Tensor, target: Tensor, grid: Grid) -> Tensor:
    predictor = objective.predictor
    z = predictor.embed(z)
    extra = z.shape[1] - context.shape[1]
    seen = z[:, extra:] + predictor.positions.embedding(grid, context)
    asked = objective.query.tokens[0] + predictor.positions.embedding(grid, target)
    x = torch.cat([z[:, :extra], seen, asked], 1)
    for block in predictor.blocks:
        x = block(x)
    return predictor.proj(predictor.norm(x[:, -target.shape[1] :]))


def everything_encoded(objective, video: Tensor, hidden: Tensor) -> Tensor:
    encoder = objective.encoder
    x = encoder.patch_embed.proj(video).flatten(2).transpose(1, 2)
    if hasattr(objective.corruption, "token"):
        x[hidden] = objective.corruption.token
    x = x + encoder.positions.embedding(encoder.grid_of(video), None)
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x)


@pytest.mark.parametrize("method", METHODS)
def test_loss_longhand(method, tmp_path):
    see, make_target, error = METHODS[method]
    objective = small(method, *make_teacher(method, tmp_path)).build_objective().eval()
    for p in objective.predictor.parameters():
        torch.nn.init.normal_(p, std=0.05)
    mean, std = channel_statistics(torch.empty(0))
    noise = (torch.rand(CLIPS, 3, 1, 32, 32) - mean) / std
    frames = 1 if objective.encoder.tubelet == 1 else 8
    video = torch.cat([noise.roll(-t, -1) for t in range(frames)], 2)
    grid = objective.encoder.grid_of(video)
    got = objective(video, KeyedRNG(0, 0, torch.arange(CLIPS)))["loss"]

    rng = KeyedRNG(0, 0, torch.arange(CLIPS))
    (mask,), _ = objective.make_masks(video, rng)
    hidden = torch.ones(CLIPS, grid.n, dtype=torch.bool).scatter(1, mask.context, False)
    seen = see(video, hidden, rng)
    targets = mask.target[:, 0]
    if objective.query is None:
        z = everything_encoded(objective, seen, hidden)
        pred = torch.stack([objective.predictor.proj(z[b, targets[b]]) for b in range(CLIPS)])
    else:
        z = objective.encoder(seen, mask.context, return_levels=True)
        pred = joint_prediction(objective, z, mask.context, targets, grid)
    wanted = make_target(video, objective)
    want = error(pred, torch.stack([wanted[b, targets[b]] for b in range(CLIPS)]))
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    features = objective.target_features(video)
    if objective.target.per_mask:
        assert features is None
    else:
        torch.testing.assert_close(features, wanted.flatten(2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("hog_motion", ["method.error.kind=l2"], "l2, but target hog_motion needs weighted_l2"),
        ("frame_difference", ["method.error.kind=weighted_l2"], "has no weights for weighted_l2"),
        ("maskfeat", ["method.query.kind=token"], "method.query: predictor head has none: leave it out"),
        ("maskfeat", ["method.corrupt={kind: blur}"], "kind head: the encoder must see hidden tokens"),
    ],
)
def test_parts_that_do_not_fit(method, more, message):
    with pytest.raises(UserError, match=message):
        small(method, *more).build_objective()

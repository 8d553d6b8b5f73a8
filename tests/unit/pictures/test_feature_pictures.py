"""Features, attention and predicted pixels as pictures: what the functions compute."""

import numpy as np
import pytest
import torch
from torch import nn

from vidssl.core.pixels import normalise
from vidssl.evaluation.saved_heads import SavedHead
from vidssl.model.grid import Grid, gather_tokens
from vidssl.model.heads import AttentiveHead
from vidssl.model.vit import Encoder
from vidssl.objective.targets import Pixels
from vidssl.pictures.attention import attention_video, predicted_class, query_attention
from vidssl.pictures.features import (
    fit_basis,
    liveliest_token,
    pca_videos,
    similarity,
    similarity_video,
    to_colours,
    token_features,
)
from vidssl.pictures.reconstruction import (
    copied_pixels,
    flat_patches,
    paste_patches,
    predicted_pixels,
    to_unit_range,
)
from vidssl.pretrained.load import LoadedEncoder

GRID = Grid(2, 4, 4)


def scene(clips: int = 1) -> torch.Tensor:
    """Features f32 [clips, 2, 4, 4, 16]: noise, and in an object's tokens a direction of their own."""
    generator = torch.Generator().manual_seed(0)
    features = 0.1 * torch.randn(clips, *GRID, 16, generator=generator)
    features[:, 0, 1, 1, 0] += 5
    features[:, 1, 1, 2, 0] += 5
    return features


def test_an_object_has_a_colour_and_the_background_is_dull():
    colours = to_colours(scene(), fit_basis(scene()))[0]
    is_object = torch.zeros(GRID, dtype=torch.bool)
    is_object[0, 1, 1] = is_object[1, 1, 2] = True
    distance = (colours - 0.5).abs()
    assert distance[is_object][:, 0].min() > 0.45 and distance[~is_object][:, 0].max() < 0.3
    assert torch.allclose(colours[0, 1, 1, 0], colours[1, 1, 2, 0], atol=0.05)


def test_one_basis_holds_for_all_clips_whatever_clips_are_shown():
    both = scene(2)
    basis = fit_basis(both)
    assert torch.equal(to_colours(both, basis)[1:], to_colours(both[1:], basis))
    videos = pca_videos(both, 4, 32, basis)
    assert [video.shape for video in videos] == [(4, 32, 32, 3)] * 2 and videos[0].dtype == np.uint8


def test_what_all_clips_share_at_a_place_is_no_colour():
    features = scene(4)
    places = 30 * torch.randn(1, *GRID, 16, generator=torch.Generator().manual_seed(1))
    same = to_colours(features + places, fit_basis(features + places))
    assert torch.allclose(same, to_colours(features, fit_basis(features)), atol=1e-3)


def test_a_token_is_most_like_itself_and_its_object():
    values = similarity(scene()[0], (0, 1, 1))
    assert values[0, 1, 1] == pytest.approx(1) and values[1, 1, 2] > 0.95
    values[0, 1, 1] = values[1, 1, 2] = -1
    assert values.max() < 0.9
    video = np.zeros((4, 32, 32, 3), np.uint8)
    picture = similarity_video(video, scene()[0], (0, 1, 1))
    # the square is drawn while the token lasts
    assert (picture[:2, 8, 8:16] == 255).all() and not (picture[2:, 8, 8:16] == 255).all()


def test_the_liveliest_place_is_found():
    video = np.zeros((4, 32, 32, 3), np.uint8)
    video[1::2, 10:14, 26:30] = 200
    assert liveliest_token(video, GRID) == (1, 1, 3)
    assert liveliest_token(video[:1], Grid(1, 4, 4)) == (0, 2, 2)


def test_features_of_clips_lie_on_the_grid():
    encoder = Encoder(4, 32, 32, dim=24, depth=1, heads=2, patch=8).eval().requires_grad_(False)
    pixels = {"mean": [0.4] * 3, "std": [0.2] * 3}
    loaded = LoadedEncoder(encoder, {"model": {"tubelet": 2, "patch": 8}, "pixels": pixels})
    clips = torch.randint(0, 256, (3, 3, 4, 32, 32), dtype=torch.uint8)
    features = token_features(loaded, clips)
    expected = encoder(normalise(clips, ([0.4] * 3, [0.2] * 3)))
    assert features.shape == (3, *GRID, 24) and torch.equal(features.flatten(1, 3), expected)


def test_the_query_looks_where_its_keys_are():
    torch.manual_seed(0)
    head = AttentiveHead(16, 2, 3).eval().requires_grad_(False)
    mean = torch.randn(GRID.n, 16)
    std = torch.full((16,), 2.0)
    saved = SavedHead(head, mean, std, "motion", "class", ["a", "b", "c"])
    features = scene(2)
    weights = query_attention(saved, features)
    assert weights.shape == (2, 2, *GRID) and torch.allclose(weights.sum((2, 3, 4)), torch.ones(2, 2))
    tokens = (features.flatten(1, 3) - mean) / std
    # the output of the attention is the mean of the values with these weights
    values = head.xattn.kv(head.norm1(tokens))[..., 16:].unflatten(-1, (2, 8))
    expected = torch.einsum("bhn,bnhe->bhe", weights.flatten(2), values).flatten(1)
    query = head.query_tokens.expand(2, -1, -1)
    assert torch.allclose(head.xattn(query, head.norm1(tokens))[:, 0], expected, atol=1e-5)
    best = int(head(tokens).softmax(-1).mean(0).argmax())
    assert predicted_class(saved, features).startswith("abc"[best])


def test_attention_to_a_place_is_bright_there_and_an_even_one_stays_dark():
    video = np.zeros((4, 32, 32, 3), np.uint8)
    even = torch.full((2, *GRID), 1 / GRID.n)
    focused = torch.zeros(2, *GRID)
    focused[:, 0, 0, 0] = 1
    pictures = [attention_video(video, weights) for weights in (even, focused)]
    assert [picture.shape for picture in pictures] == [video.shape] * 2
    assert pictures[0].max() < 100 and pictures[1].max() > 150
    # Early frames, upper left
    assert pictures[1][0, 0, 0].max() > 150 and pictures[1][-1, -1, -1].max() < 100


class Patches(nn.Module):
    """Stands for an encoder in the target of pixels."""

    tubelet = 2
    patch = 8


@pytest.mark.parametrize("norm", ["channel", "patch", "none"])
@pytest.mark.parametrize("space", ["rgb", "normalised"])
def test_predicted_pixels_are_those_of_the_clip_if_the_prediction_is_the_target(norm, space):
    video = normalise(torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8))
    target = Pixels(Patches(), norm, space)  # type: ignore[arg-type]
    ids = torch.tensor([[0, 5, 17], [3, 20, 31]])
    values = gather_tokens(target(video), ids)
    shown = predicted_pixels(target, values, video, ids, GRID)
    true = gather_tokens(flat_patches(to_unit_range(video), GRID), ids)
    assert torch.allclose(shown, true, atol=2e-3)


def test_a_frame_that_is_not_predicted_repeats_the_one_that_is():
    video = normalise(torch.randint(0, 256, (1, 3, 4, 32, 32), dtype=torch.uint8))
    target = Pixels(Patches(), "none", "normalised", per_tubelet=1)  # type: ignore[arg-type]
    ids = torch.arange(32)[None]
    shown = predicted_pixels(target, target(video), video, ids, GRID)
    whole = paste_patches(to_unit_range(video), shown, ids, GRID)
    assert torch.allclose(whole[:, :, 0], whole[:, :, 1]) and torch.allclose(whole[:, :, 2], whole[:, :, 3])
    assert torch.allclose(whole[:, :, 0], to_unit_range(video)[:, :, 0], atol=1e-5)


def test_patches_go_back_to_their_places():
    video = torch.rand(2, 3, 4, 32, 32)
    ids = torch.tensor([[1, 30], [7, 8]])
    patches = gather_tokens(flat_patches(video, GRID), ids)
    assert torch.equal(paste_patches(video, patches, ids, GRID), video)
    black = paste_patches(video, torch.zeros_like(patches), ids, GRID)
    assert (black[0, :, :2, :8, 8:16] == 0).all() and (black != video).sum() <= 4 * 3 * 2 * 64


def test_the_copied_frame_is_the_last_visible_one_of_its_place():
    grid = Grid(3, 1, 2)
    video = torch.arange(6.0)[None, None, :, None, None].expand(1, 3, 6, 8, 16) / 10
    # place 0 is visible in slices 0 and 2, place 1 never
    context = torch.tensor([[0, 4]])
    hidden = torch.tensor([[2, 1]])
    copied = copied_pixels(video, context, hidden, grid)
    assert torch.allclose(copied[0, 0], torch.tensor(0.1))  # the last frame of slice 0
    assert torch.allclose(copied[0, 1], torch.tensor((0 + 1 + 4 + 5) / 40))  # the mean colour
    later = copied_pixels(video, torch.tensor([[4]]), torch.tensor([[0]]), grid)
    assert torch.allclose(later, torch.tensor(0.4))  # the first frame of a later slice

"""Views are the crops and changes of colour that torchvision makes with the same numbers."""

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.objective.view_schema import ColorChange, ViewGroup
from vidssl.objective.views import (
    ORDERS,
    blur_weights,
    change_view_colors,
    cut_view,
    draw_boxes,
    draw_color_factors,
)

RNG = KeyedRNG(0, 0, torch.arange(500))
FULL = ViewGroup(scale=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0)


def frames(clips: int = 3, size: int = 24) -> torch.Tensor:
    shape = (clips, 3, 2, size, size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()


def test_boxes_have_the_areas_and_aspects_of_their_ranges():
    top, left, height, width = draw_boxes(ViewGroup(scale=(0.1, 0.5), aspect=(0.5, 2.0)), 1.0, RNG)
    area = height * width
    aspect = width / height
    for x, low, high, mean in ((area, 0.1, 0.5, 0.3), (aspect.log2(), -1, 1, 0)):
        assert low - 1e-5 <= x.min() < low + 0.05 and high - 0.1 < x.max() <= high + 1e-5
        assert x.mean() == pytest.approx(mean, abs=0.1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 1 + 1e-6).all() and (left + width <= 1 + 1e-6).all()


def test_a_view_of_the_whole_clip_is_the_clip_or_its_mirror_image():
    video = normalise(frames())
    rng = KeyedRNG(0, 0, torch.arange(3))
    torch.testing.assert_close(cut_view(video, FULL, rng, 0), video)
    mirrored = ViewGroup(scale=(1.0, 1.0), aspect=(1.0, 1.0), flip=1.0)
    torch.testing.assert_close(cut_view(video, mirrored, rng, 0), video.flip(-1))


def test_a_smaller_view_is_antialiased():
    clips = frames()
    group = ViewGroup(size=10, scale=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0)
    view = cut_view(normalise(clips), group, KeyedRNG(0, 0, torch.arange(3)), 0)
    want = TF.resize(normalise(clips).transpose(1, 2), [10, 10], antialias=True).transpose(1, 2)
    torch.testing.assert_close(view, want, rtol=0, atol=1e-4)


def test_colours_change_as_torchvision_changes_them():
    clips = frames()
    group = ViewGroup(color=ColorChange(p=1.0), grey=0.5, solarise=0.5)
    rng = KeyedRNG(3, 0, torch.arange(3))
    got = change_view_colors(clips.float(), group, rng, ORDERS[5])
    rng = KeyedRNG(3, 0, torch.arange(3))
    factors = draw_color_factors(group.color, rng)
    is_grey, is_solarised = ((rng.rand(1) < 0.5)[:, 0].tolist() for _ in range(2))
    assert len({*is_grey}) == len({*is_solarised}) == 2  # both happen
    for i, clip in enumerate(clips.transpose(1, 2)):
        for name in ORDERS[5]:
            clip = getattr(TF, f"adjust_{name}")(clip, factors[name][i].item())
        clip = TF.rgb_to_grayscale(clip, 3) if is_grey[i] else clip
        clip = TF.solarize(clip, 128) if is_solarised[i] else clip
        assert (got[i] - clip.transpose(0, 1)).abs().max() <= 1


def test_what_is_not_drawn_leaves_a_clip_as_it_is():
    clips = frames().float()
    group = ViewGroup(color=ColorChange(p=0.0), grey=1e-9, blur=1e-9, solarise=1e-9)
    torch.testing.assert_close(
        change_view_colors(clips, group, KeyedRNG(0, 0, torch.arange(3)), ORDERS[0]), clips
    )


def test_blur_is_a_gaussian():
    weights = blur_weights(33, ViewGroup(blur=1.0, blur_sigma=(1.5, 1.5)), KeyedRNG(0, 0, torch.arange(1)))
    impulse = torch.zeros(1, 33, 33)
    impulse[0, 16, 16] = 1
    want = TF.gaussian_blur(impulse, [25, 25], [1.5, 1.5])[0]
    torch.testing.assert_close(
        torch.outer(weights[0, :, 16], weights[0, :, 16])[8:25, 8:25], want[8:25, 8:25]
    )


def test_views_of_a_clip_differ_and_do_not_depend_on_the_other_clips():
    video = normalise(frames(4))
    group = ViewGroup(size=12, color=ColorChange(), blur=0.5)
    views = [
        cut_view(video, group, (rng := KeyedRNG(0, 1, torch.arange(4))), 0),
        cut_view(video, group, rng, 1),
    ]
    alone = cut_view(video[2:3], group, KeyedRNG(0, 1, torch.tensor([2])), 0)
    torch.testing.assert_close(alone, views[0][2:3])
    assert (views[0] - views[1]).abs().mean() > 0.1

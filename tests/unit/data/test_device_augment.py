"""vidssl/data/device_augment.py: the clips that a device makes are those of the host.

Run on the CPU, where the same operations run as on a GPU, in fp32; half precision is tested by its error.
"""

from typing import Any

import numpy as np
import pytest
import torch

from vidssl.data import device_augment
from vidssl.data.augment import CenterCrop, CropPair, MultiScaleCrop, RandomCrop, covering_box
from vidssl.data.decoding.planes import RGB
from vidssl.data.device_augment import ClipPlanes, collate_planes, layout_clip, make_clips
from vidssl.data.schema import ColorJitter


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def movie(height: int, width: int, frames: int = 2, seed: int = 0) -> np.ndarray:
    """u8 [T, H, W, 3]: moving smooth colours with edges and a little noise."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / 7 + t), np.cos(y / 9 + x / 30), np.sin((x + y) / 15)]
    picture = 127 + 90 * np.stack(waves, -1) * np.sign(np.sin(x / 25) * np.sin(y / 21 + t))[..., None]
    return (picture + rng(seed).normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8)


def augmented(movies: list[np.ndarray], draws: list, augment: Any) -> torch.Tensor:
    """u8 [B, 3, T, S, S]: clips of RGB frames u8 [T, H, W, 3], of which the crops are decoded."""
    clips = []
    for frames, drawn in zip(movies, draws, strict=True):
        box = covering_box(drawn.windows)
        top, left, height, width = box
        size = frames.shape[1:3]
        layout = layout_clip(drawn, augment, len(frames), size, size, box, RGB)
        crop = frames[:, top : top + height, left : left + width]
        clips.append(ClipPlanes(torch.from_numpy(crop.flatten()), layout))
    return make_clips(collate_planes(clips))


MOVIES = [movie(61, 83), movie(120, 90), movie(40, 40), movie(33, 150)]
JITTER = ColorJitter(0.4, 0.4, 0.4, 0.1, 0.8, 0.2)
CASES = {
    "plain": (RandomCrop(48, flip=0.5), 0.5),
    "upscaled": (RandomCrop(96, scale=(0.05, 0.3)), 0.5),
    "multi_scale": (MultiScaleCrop(24, flip=0.5), 0.5),
    "centre": (CenterCrop(40), 0.5),
    "brightness": (RandomCrop(48, color_jitter=ColorJitter(brightness=0.5)), 0.5),
    "contrast": (RandomCrop(48, color_jitter=ColorJitter(contrast=0.5)), 0.5),
    "saturation": (RandomCrop(48, color_jitter=ColorJitter(saturation=0.5)), 0.5),
    "hue": (RandomCrop(48, color_jitter=ColorJitter(hue=0.3)), 1.0),
    "grayscale": (RandomCrop(48, color_jitter=ColorJitter(grayscale_p=0.5)), 0.5),
    "jitter": (RandomCrop(48, flip=0.5, color_jitter=JITTER), 1.0),
    "pair": (CropPair(48, flip=0.5), 0.5),
    "pair_upscaled": (CropPair(96, scale=(0.05, 0.3), flip=0.5, color_jitter=JITTER), 1.0),
    "erase": (RandomCrop(48, random_erasing=0.7, random_erasing_mode="rand"), 0.5),
    "erase_mean": (RandomCrop(48, random_erasing=0.7, random_erasing_mode="const"), 0.5),
}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Grey levels on average."""
    return float((a.float() - b.float()).abs().mean())


@pytest.mark.parametrize("name", CASES)
def test_rgb_clips_are_those_of_the_host(name):
    augment, most = CASES[name]
    for seed in range(4):
        draws = [augment.draw(*m.shape[1:3], rng(10 * seed + i)) for i, m in enumerate(MOVIES)]
        clips = augmented(MOVIES, draws, augment)
        assert clips.dtype == torch.uint8 and clips.is_contiguous()
        for clip, frames, drawn in zip(clips, MOVIES, draws, strict=True):
            assert difference(clip, augment.apply(frames, drawn)) < most, (seed, drawn)


def test_erased_noise_has_the_hosts_box_and_distribution():
    augment = RandomCrop(48, random_erasing=1.0)
    black = np.zeros((4, 48, 48, 3), np.uint8)
    draws = [augment.draw(48, 48, rng(i)) for i in range(8)]
    clips = augmented([black] * 8, draws, augment)
    host = torch.stack([augment.apply(black, d) for d in draws])
    boxes = (host > 0).flatten(1, 2).any(1)
    assert boxes.equal((clips > 0).flatten(1, 2).any(1))
    for channel in range(3):
        ours, theirs = (c[:, channel][boxes[:, None].expand(-1, 4, -1, -1)].float() for c in (clips, host))
        assert abs(ours.mean() - theirs.mean()) < 3 and abs(ours.std() - theirs.std()) < 3
    again = augmented([black], draws[3:4], augment)[0]
    assert again.equal(clips[3]) and not again[:, 0].equal(again[:, 1])


def test_half_precision_is_exact_to_a_tenth_of_a_level(monkeypatch):
    """GPUs multiply in fp16; the CPU rounds to it as they do."""
    augment = RandomCrop(48, flip=0.5)
    draws = [augment.draw(*m.shape[1:3], rng(i)) for i, m in enumerate(MOVIES)]
    exact = augmented(MOVIES, draws, augment)
    monkeypatch.setattr(device_augment, "product_type", lambda numbers: torch.float16)
    assert difference(exact, augmented(MOVIES, draws, augment)) < 0.1


def test_passes_do_not_change_clips(monkeypatch):
    augment = RandomCrop(48, flip=0.5, color_jitter=JITTER)
    draws = [augment.draw(*m.shape[1:3], rng(i)) for i, m in enumerate(MOVIES)]
    exact = augmented(MOVIES, draws, augment)
    monkeypatch.setattr(device_augment, "MAX_PASS", 1)
    assert difference(exact, augmented(MOVIES, draws, augment)) < 0.01

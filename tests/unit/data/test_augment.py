"""vidssl/data/augment.py beyond the crop: the same change for all frames, and the change that was asked for.

The crops themselves, and that they are functions of the generator, are tested in test_loader.py.
"""

import random
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from vidssl.config import Choice, Spec, load_config
from vidssl.core.errors import UserError
from vidssl.data.augment import (
    AUGMENTS,
    CropPair,
    MovingCrop,
    MultiScaleCrop,
    RandomCrop,
    Window,
    change_color,
    draw_color,
    seeded,
    show_windows,
)
from vidssl.data.schema import ColorJitter

SIZE = 48
NAME = "rand-m7-n4-mstd0.5-inc1"


@dataclass(frozen=True)
class Sections:
    augment: Annotated[Spec, Choice(AUGMENTS)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(frames: int = 3) -> np.ndarray:
    """u8 [T, 48, 48, 3]: smooth colours with an edge, the same in every frame."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    picture = np.stack([40 + 150 * x, 60 + 120 * y, 200 - 130 * x * y], -1)
    picture[10:20, 12:30] = (230, 40, 90)
    return np.repeat(picture.astype(np.uint8)[None], frames, 0)


def whole(**changes) -> RandomCrop:
    """No crop: all of a frame of 48 x 48."""
    return RandomCrop(SIZE, scale=(1.0, 1.0), ratio=(1.0, 1.0), **changes)


def planes(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames.transpose(3, 0, 1, 2).copy())


ALL = {
    "flip": 0.5,
    "randaugment": NAME,
    "color_jitter": ColorJitter(0.4, 0.4, 0.4, 0.1, 0.8, 0.2),
    "random_erasing": 1.0,
}
EACH = [{k: v} for k, v in ALL.items()] + [
    {"random_erasing": 0.5, "random_erasing_mode": "rand"},
    {**ALL, "random_erasing_mode": "const"},
]


@pytest.mark.parametrize("changes", EACH, ids=str)
@pytest.mark.parametrize("kind", [RandomCrop, MultiScaleCrop])
def test_augmentation_is_equal_in_all_frames_and_a_function_of_the_generator(kind, changes):
    augment = kind(32, **changes)
    seen = []
    noisy = (
        changes.get("random_erasing") and changes.get("random_erasing_mode", "pixel") == "pixel"
    )  # differs from frame to frame
    for seed in range(12):
        random.seed(seed + 100)
        np.random.seed(seed + 100)
        clip = augment(photo(), rng(seed))
        assert clip.shape == (3, 3, 32, 32) and clip.dtype == torch.uint8 and clip.is_contiguous()
        assert noisy or all(clip[:, t].equal(clip[:, 0]) for t in range(3))
        after = random.random(), np.random.random()
        random.seed(7)
        assert clip.equal(augment(photo(), rng(seed)))
        random.seed(seed + 100)
        np.random.seed(seed + 100)
        assert after == (random.random(), np.random.random())  # nobody else's draws are touched
        seen.append(clip)
    assert any(not clip.equal(kind(32)(photo(), rng(seed))) for seed, clip in enumerate(seen))


@pytest.mark.parametrize("changes", EACH, ids=str)
def test_options_do_not_change_crop_and_flip(changes):
    """The box and the coin of a position are those of a run without the option, and content draws nothing."""
    used, fresh = rng(5), rng(5)
    plain = RandomCrop(32, flip=0.5)
    state = plain(photo(), used) is not None and used.bit_generator.state
    off = RandomCrop(32, flip=0.5, random_erasing=0.0, color_jitter=None, randaugment=None)
    off(np.zeros((9, 90, 70, 3), np.uint8), fresh)
    assert fresh.bit_generator.state == state
    a, b = rng(3), rng(3)
    RandomCrop(32, **changes)(photo(), a)
    RandomCrop(32, **changes)(255 - photo(), b)
    assert a.bit_generator.state == b.bit_generator.state


def test_flip_mirrors_the_frames():
    assert whole(flip=1.0)(photo(), rng()).equal(planes(photo()).flip(-1))
    assert whole()(photo(), rng()).equal(planes(photo()))


@pytest.mark.parametrize(
    "amounts, adjust, neutral",
    [
        ({"brightness": 0.5}, TF.adjust_brightness, 1.0),
        ({"contrast": 0.5}, TF.adjust_contrast, 1.0),
        ({"saturation": 0.5}, TF.adjust_saturation, 1.0),
        ({"hue": 0.3}, TF.adjust_hue, 0.0),
    ],
)
def test_color_jitter_factors_fill_their_range(amounts, adjust, neutral):
    """Each clip is the frame at some factor of the range, and the factors fill it."""
    (amount,) = amounts.values()
    frame = planes(photo(1))[:, 0]
    grid = np.linspace(neutral - amount, neutral + amount, 81)
    at = torch.stack([adjust(frame, float(f)) for f in grid]).float()
    found = []
    for seed in range(60):
        clip = whole(color_jitter=ColorJitter(**amounts))(photo(2), rng(seed)).float()
        off = (at - clip[:, 0]).abs().mean((1, 2, 3))
        assert off.min() < 1.5  # grey levels: half a step of the grid
        found.append(grid[off.argmin()])
    assert min(found) < neutral - 0.8 * amount and max(found) > neutral + 0.8 * amount
    assert abs(np.mean(found) - neutral) < 0.25 * amount


def test_color_jitter_probabilities():
    jittered = [whole(color_jitter=ColorJitter(0.9, p=0.3))(photo(1), rng(s)) for s in range(200)]
    assert 0.2 < np.mean([not clip.equal(planes(photo(1))) for clip in jittered]) < 0.4
    greys = [whole(color_jitter=ColorJitter(grayscale_p=0.4))(photo(1), rng(s)) for s in range(200)]
    is_grey = [clip[0].equal(clip[1]) and clip[1].equal(clip[2]) for clip in greys]
    assert 0.3 < np.mean(is_grey) < 0.5
    assert all(clip.equal(planes(photo(1))) for clip, grey in zip(greys, is_grey, strict=True) if not grey)
    luma = Image.fromarray(photo(1)[0]).convert("L")
    assert np.abs(greys[is_grey.index(True)][0, 0].numpy().astype(int) - np.asarray(luma)).max() <= 1
    assert whole(color_jitter=ColorJitter())(photo(), rng()).equal(planes(photo()))


def test_color_draws_are_those_of_torchvisions_transforms():
    """The same numbers in the same order, so that a seed gives the clip that torchvision makes of it."""
    amounts = (0.4, 0.0, 0.4, 0.1)
    transform = v2.Compose([v2.RandomApply([v2.ColorJitter(*amounts)], 0.8), v2.RandomGrayscale(0.2)])
    frames = planes(photo(1))[:, 0]
    for seed in range(20):
        with seeded(seed):
            want = transform(frames)
        with seeded(seed):
            draws = draw_color(ColorJitter(*amounts, p=0.8, grayscale_p=0.2))
        assert change_color(frames[:, None], draws)[:, 0].equal(want)


def test_randaugment_applies_timms_operations():
    """Every clip is a chain of timm's operations; about as many as chance 0.5 of four stay as they were."""
    frame = Image.fromarray(photo(1)[0])
    clips = [
        whole(randaugment="rand-m7-n1-inc1")(photo(2), rng(s))[:, 0].permute(1, 2, 0).numpy()
        for s in range(300)
    ]
    unchanged = [np.array_equal(c, photo(1)[0]) for c in clips]
    assert 0.4 < np.mean(unchanged) < 0.65  # one in two is left alone (and equalising may change nothing)
    known = {
        "Invert": (),
        "SolarizeAdd": (77,),
        "SolarizeIncreasing": (256 - 179,),
        "PosterizeIncreasing": (2,),
    }
    known |= {"AutoContrast": (), "Equalize": ()}
    kwargs = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
    signed = {"Rotate": 21.0, "ShearX": 0.21, "ShearY": 0.21, "TranslateXRel": 0.315, "TranslateYRel": 0.315}
    results = [NAME_TO_OP[n](frame, *args, **kwargs) for n, args in known.items()]
    results += [NAME_TO_OP[n](frame, sign * a, **kwargs) for n, a in signed.items() for sign in (1, -1)]
    enhance = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
    results += [NAME_TO_OP[n](frame, 1 + sign * 0.63, **kwargs) for n in enhance for sign in (1, -1)]
    wanted = {np.asarray(r).tobytes() for r in results} | {photo(1)[0].tobytes()}
    got = {c.tobytes() for c in clips}
    assert got <= wanted and len(got) >= 18  # 300 draws of some 24 outcomes


def test_randaugment_fill_and_names():
    clips = [whole(randaugment=NAME)(np.zeros((2, SIZE, SIZE, 3), np.uint8), rng(s)) for s in range(40)]
    assert any((clip == 128).all(0).any() for clip in clips)
    for name in ("m7-n4", "rand-m7-x4", "augmix-m5", "rand-m7.5", ""):
        with pytest.raises(UserError, match="such as rand-m7-n4"):
            RandomCrop(32, randaugment=name)
    for name in ("rand-m9-mstd0.5", "rand-m7-n4-p0.5-mmax10-inc0"):
        MultiScaleCrop(32, randaugment=name)


def box_of(changed: torch.Tensor) -> tuple[int, int, int, int]:
    """top, left, height, width of the pixels that are True in [S, S]."""
    rows, columns = (changed.any(d).nonzero()[:, 0] for d in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_box(mode):
    black = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    boxes = []
    mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
    values = []
    for seed in range(150):
        clip = whole(random_erasing=1.0, random_erasing_mode=mode)(black, rng(seed))
        top, left, h, w = box_of((clip > 0).any(0).any(0))
        inside = clip[:, :, top : top + h, left : left + w].numpy()
        boxes.append((top, left, h, w))
        if mode == "const":
            assert (inside == np.rint(mean).reshape(3, 1, 1, 1)).all()
        elif mode == "rand":
            assert (inside == inside[:, :1, :1, :1]).all()
        else:
            assert not (inside[:, 0] == inside[:, 1]).all()
            assert ((inside > 0).mean((2, 3)) > 0.8).all()  # noise in every frame of the box
        values.append(inside[:, 0, 0, 0])
    top, left, h, w = np.array(boxes).T
    share = h * w / SIZE**2
    ratio = h / w
    assert 0.015 < share.min() < 0.06 and 0.28 < share.max() < 0.345
    assert 0.28 < ratio.min() < 0.5 and 2.0 < ratio.max() < 3.6
    for place in (top / (SIZE - h), left / (SIZE - w)):
        assert place.min() < 0.1 and place.max() > 0.9 and 0.4 < place.mean() < 0.6
    if mode != "const":
        off = (np.array(values) - mean) / std
        assert (
            np.abs(off.mean(0)).max() < 0.3 and 0.75 < off.std() < 1.1
        )  # a little less than 1: cut off at 0 and 255


def test_erasing_probability():
    clips = [whole(random_erasing=0.25, random_erasing_mode="const")(photo(2), rng(s)) for s in range(400)]
    changed = [(clip != planes(photo(2))).any(0).any(0) for clip in clips]
    assert 0.18 < np.mean([bool(c.any()) for c in changed]) < 0.32
    shares = [float(c.float().mean()) for c in changed if c.any()]
    assert max(shares) < 0.345


def test_options_in_a_configuration():
    files = [
        "augment.kind=random_crop",
        "augment.size=32",
        f"augment.randaugment={NAME}",
        "augment.random_erasing=0.25",
    ]
    built = load_config(
        [*files, "augment.color_jitter={brightness: 0.4, grayscale_p: 0.2}"], Sections
    ).augment.build()
    want = RandomCrop(
        32, randaugment=NAME, random_erasing=0.25, color_jitter=ColorJitter(brightness=0.4, grayscale_p=0.2)
    )
    assert built == want and load_config(files, Sections).augment.arguments["color_jitter"] is None
    for bad, word in (
        ("color_jitter={hue: 0.8}", "0.5"),
        ("color_jitter={bright: 1}", "bright"),
        ("random_erasing_mode=black", "const"),
    ):
        with pytest.raises(UserError, match=word):
            load_config([*files, f"augment.{bad}"], Sections)


# --- frames that are cut apart ---


def gradients(height: int = 120, width: int = 160) -> np.ndarray:
    """u8 [1, H, W, 3]: red is the row, green the column, in pixels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y, x, 0 * x], -1).astype(np.uint8)[None]


def edges(frame: torch.Tensor) -> tuple[float, ...]:
    """Of u8 [3, S, S] made of `gradients`: rows and columns of the frame that it shows: top, bottom, left,
    right."""
    rows, columns = frame[0].float().mean(1), frame[1].float().mean(0)
    return float(rows[0]), float(rows[-1]), float(columns[0]), float(columns[-1])


def test_a_pair_is_a_crop_and_a_crop_of_that_crop():
    augment = CropPair(64, flip=0.5)
    flips = set()
    shares = []
    for seed in range(60):
        drawn = augment.draw(120, 160, rng(seed))
        outer, inner = drawn.windows
        assert outer[:4] == tuple(int(edge) for edge in outer[:4])
        assert 0.09 < outer.height * outer.width / (120 * 160) <= 1
        assert outer.top <= inner.top and inner.top + inner.height <= outer.top + outer.height + 0.01
        assert outer.left <= inner.left and inner.left + inner.width <= outer.left + outer.width + 0.01
        shares.append(inner.height * inner.width / (outer.height * outer.width))
        flips.add((outer.flip, inner.flip))
        clip = augment.apply(gradients(), drawn)
        assert clip.shape == (3, 2, 64, 64) and clip.is_contiguous()
        for frame, window in zip(clip.unbind(1), drawn.windows, strict=True):
            top, bottom, left, right = edges(frame)
            left, right = (right, left) if window.flip else (left, right)
            bounds = window.top, window.top + window.height, window.left, window.left + window.width
            assert np.abs(np.subtract((top, bottom, left, right), bounds)).max() < 2.5, (seed, window)
    assert min(shares) > 0.29 and max(shares) < 0.61 and len(flips) == 4


def test_a_window_between_pixels_is_that_of_the_pixels_around_it():
    """A box of whole pixels is the same by both ways of cutting, and half a pixel further is half a level
    more."""
    whole, half = Window(10, 20, 30, 40), Window(10.5, 20.5, 30, 40)
    same = Window(10, 20, 30 + 2**-8, 40)
    cut = [
        show_windows(gradients(), [window], 32)[0, 4:-4, 4:-4].astype(float) for window in (whole, half, same)
    ]
    assert np.abs(cut[0] - cut[2]).max() <= 1
    assert (cut[1] - cut[0])[..., :2].mean() == pytest.approx(0.5, abs=0.1)


def test_the_crop_of_an_image_moves_evenly_from_box_to_box():
    augment = MovingCrop(64, flip=0.5)
    of_image = augment.for_clip(9, is_image=True)
    assert of_image.one_frame and not augment.for_clip(9, is_image=False).one_frame
    assert MovingCrop(64, moves="all").for_clip(9, is_image=False).one_frame
    for seed in range(20):
        windows = of_image.draw(120, 160, rng(seed)).windows
        assert len(windows) == 9 and len({w.flip for w in windows}) == 1
        for window in (windows[0], windows[-1]):
            assert window[:4] == tuple(int(edge) for edge in window[:4])
        edges = np.array([(w.top, w.top + w.height, w.left, w.left + w.width) for w in windows])
        assert np.abs(np.diff(edges, 2, axis=0)).max() < 0.02 and np.ptp(edges, 0).max() > 1
        assert edges.min() >= 0 and (edges <= (120, 120, 160, 160)).all()
    clip = of_image(gradients(), rng(3))
    assert clip.shape == (3, 9, 64, 64) and clip.is_contiguous()
    assert len({frame.numpy().tobytes() for frame in clip.unbind(1)}) == 9


def test_the_crop_of_a_video_stays():
    frames = np.concatenate([photo()] * 3)
    moving = MovingCrop(48, flip=0.5).for_clip(len(frames), is_image=False)
    for seed in range(3):
        assert moving(frames, rng(seed)).equal(RandomCrop(48, flip=0.5)(frames, rng(seed)))

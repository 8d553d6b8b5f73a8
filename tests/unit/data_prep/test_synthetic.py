"""data_prep.synthetic: the ground truth matches the pixels, and no single frame reveals the motion."""

import csv
import itertools
from collections import Counter

import av
import numpy as np
import pytest

from data_prep import synthetic
from data_prep.sources import read_source
from data_prep.synthetic import (
    COLOURS,
    FRAMES,
    HURRY,
    MOTIONS,
    RADIUS,
    SHAPES,
    SIDE,
    Track,
    center_at,
    make_tracks,
    path_length,
    render,
    write_example,
)
from data_prep.synthetic import (
    OBJECTS as PER_VIDEO,
)
from vidssl.core.errors import UserError

OBJECTS, CALLS = 20, 100  # of a distribution: objects per call of make_tracks, calls
EDGE = [0, 1, SIDE - 2, SIDE - 1]  # rows and columns
BOUND = (
    2.2  # of the scaled Kolmogorov-Smirnov distance: 1.4 is exceeded by chance once in 30 times, 2.2 in 8,000
)


def masks_of(truth: dict[str, np.ndarray]) -> np.ndarray:
    """bool [T, n, H, W]."""
    shape = truth["masks_shape"]
    return np.unpackbits(truth["masks"], count=int(np.prod(shape))).reshape(shape).astype(bool)


@pytest.fixture(scope="module", params=SHAPES)
def scenes(request) -> tuple[str, list]:
    """(shape, [(frames u8 [T, H, W, 3], truth, masks)]), one for each motion."""
    made = [render(m, "red", np.random.default_rng((5, i)), request.param) for i, m in enumerate(MOTIONS)]
    return request.param, [(frames, truth, masks_of(truth)) for frames, truth in made]


def test_masks_are_disjoint_and_cover_what_differs_from_the_background(scenes):
    _, made = scenes
    contrast = []
    for frames, truth, masks in made:
        assert frames.shape == (FRAMES, SIDE, SIDE, 3) and frames.dtype == np.uint8
        assert masks.shape == (FRAMES, len(truth["depth"]), SIDE, SIDE) and masks.sum(1).max() <= 1
        near = np.zeros_like(
            masks[:, 0]
        )  # objects, and the blended pixels at their rims (2 at a sharp corner)
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                near |= np.roll(masks.any(1), (dy, dx), (1, 2))
        reach = 1.2 * truth["size"][..., None]
        outside = (truth["position"] < reach) | (truth["position"] > SIDE - 1 - reach)
        # The rim of what is just out of sight, too
        near[np.ix_(outside.any((1, 2)), EDGE, range(SIDE))] = True
        near[np.ix_(outside.any((1, 2)), range(SIDE), EDGE)] = True
        away = np.where(near[..., None], np.nan, frames.astype(float))
        seen = (~near).sum(0) >= 3  # frames that show the background here
        assert np.nanstd(away[:, seen], axis=0).max() < 12  # the noise of a pixel, 2.6 levels, and no more
        still = np.nanmedian(away[:, seen], axis=0)
        for i in range(masks.shape[1]):
            off = np.abs(frames[:, seen] - still).max(-1)[masks[:, i][:, seen]]
            if off.size > 100:
                contrast.append((off > 12).mean())
    assert len(contrast) >= 10 and np.mean(contrast) > 0.9 and np.min(contrast) > 0.3


def test_position_size_and_angle_match_the_pixels(scenes):
    """For the nearest object, if all of it is in the frame: centroid; area over size squared; direction of a
    triangle."""
    shape, made = scenes
    areas, directions = [], []
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    for _, truth, masks in made:
        assert RADIUS[0] - 1e-4 < truth["size"].min() and truth["size"].max() < RADIUS[1] + 1e-4
        front = int(np.flatnonzero(truth["depth"] == 0)[0])
        for t in range(FRAMES):
            at = truth["position"][t, front]
            size = truth["size"][t, front]
            mask = masks[t, front]
            if (at - 1.1 * size < 0).any() or (at + 1.1 * size > SIDE - 1).any():
                continue
            assert np.hypot(x[mask].mean() - at[0], y[mask].mean() - at[1]) < 0.7
            areas.append(mask.sum() / size**2)
            third = np.sum(((x - at[0]) + 1j * (y - at[1]))[mask] ** 3)
            directions.append(third / abs(third) * np.exp(-3j * truth["angle"][t, front]))
    assert len(areas) > 15
    assert np.std(areas) / np.mean(areas) < 0.12
    if shape == "triangle":
        assert abs(np.mean(directions)) > 0.97  # clockwise on the screen, by the true angle


def test_nearer_objects_occlude_farther_ones():
    """The nearest object is never occluded; farther ones sometimes are."""
    hidden = 0
    for seed in range(24):
        _, truth = render("right", "green", np.random.default_rng(seed), "disc")
        area = masks_of(truth).sum((2, 3)) / truth["size"] ** 2  # [T, n]: constant unless hidden
        order = np.argsort(truth["depth"])  # nearest first
        assert sorted(truth["depth"]) == list(range(len(order)))
        radius = truth["size"][..., None]
        inside = ((truth["position"] > radius) & (truth["position"] < SIDE - 1 - radius)).all(-1)  # [T, n]
        near = order[0]
        far = order[1:]
        assert (area[:, near] > 0.9 * np.pi * 0.95**2)[inside[:, near]].all()
        hidden += (inside[:, far] & (area[:, far] < 0.8 * np.pi * 0.95**2)).sum()
    assert hidden > 5


def test_objects_are_out_of_sight_between_two_sides():
    """A nearest object that comes in at another side was not to be seen in a frame between."""
    crossings = 0
    for seed in range(16):
        _, truth = render("right", "green", np.random.default_rng(seed))
        front = int(np.flatnonzero(truth["depth"] == 0)[0])
        x = truth["position"][:, front, 0]
        (jumps,) = np.nonzero(np.diff(x) < 0)
        for t in jumps:
            crossings += 1
            assert x[t] > SIDE and x[t + 1] < 0
            assert not masks_of(truth)[t : t + 2, front].any((1, 2)).all()
    assert crossings > 6


def test_an_object_is_visible_in_almost_all_frames():
    """Visible: the center is at most half a radius beyond an edge."""
    for motion in MOTIONS:
        drawn = [make_tracks(motion, PER_VIDEO, np.random.default_rng((9, i))) for i in range(200)]
        beyond = [np.maximum(-d.position, d.position - SIDE).max(-1) / d.size for d in drawn]
        visible = (np.stack(beyond) < 0.5).any(-1)  # [videos, T]
        assert visible.mean() > 0.9 and visible.any(1).mean() > 0.93, motion


def test_key_points_are_visible_where_their_object_is():
    """Those of the nearest object at its outline's inside: if and only if they are in the frame."""
    _, truth = render("left", "green", np.random.default_rng(3), "disc")
    front = int(np.flatnonzero(truth["depth"] == 0)[0])
    points = truth["keypoints"].reshape(FRAMES, -1, 4, 2)[:, front]
    visible = truth["keypoints_visible"].reshape(FRAMES, -1, 4)[:, front]
    inside = ((points > -0.5) & (points < SIDE - 0.5)).all(-1)
    assert (visible == inside).all() and inside.any() and not inside.all()


def phases(track: Track) -> np.ndarray:
    """The inverse of `center_at`: [T, n, 2] in 0..1."""
    length = path_length(track.size)[..., None]
    inside = track.position.clip(0, SIDE)
    return 0.5 + (inside - SIDE / 2 + (track.position - inside) / HURRY) / length


def test_motions_match_their_names():
    for motion in MOTIONS:
        track = make_tracks(motion, 6, np.random.default_rng(1))
        assert [a.shape for a in track] == [(FRAMES, 6, 2), (FRAMES, 6), (FRAMES, 6)]
        phase = phases(track)
        step = ((np.diff(phase, axis=0) + 0.5) % 1 - 0.5) * path_length(track.size)[
            :-1, :, None
        ]  # [T-1, n, 2]
        rotation = (np.diff(track.angle, axis=0) + np.pi) % (2 * np.pi) - np.pi
        moves = np.hypot(*np.moveaxis(step, 2, 0)) > 0.9
        spins = abs(rotation) > 0.1
        halves = np.arange(FRAMES - 1)[:, None] < FRAMES // 2
        if motion in ("right", "left", "up", "down"):
            axis, sign = {"right": (0, 1), "left": (0, -1), "up": (1, -1), "down": (1, 1)}[motion]
            assert (
                (sign * step[..., axis] > 0.9).all()
                and abs(step[..., 1 - axis]).max() < 1e-4
                and not spins.any()
            )
        elif motion in ("clockwise", "anticlockwise"):
            assert ((rotation > 0) == (motion == "clockwise")).all() and spins.all() and not moves.any()
        elif motion in ("approach", "retreat"):
            grows = np.diff(track.size, axis=0) > 0
            assert (grows.mean(0) > 0.9).all() if motion == "approach" else (grows.mean(0) < 0.1).all()
            assert not (moves.any() or spins.any())
        else:
            slide_first = motion == "slide_then_spin"
            assert (moves == (halves == slide_first)).all() and (spins == (halves != slide_first)).all()


def uniform_quantities(drawn: list[Track], t: int) -> list[np.ndarray]:
    """Quantities of frame t that should be uniform in 0..1: the phases of x and y, size, angle; the sum of
    every two of them; and the difference of two objects of a frame in each."""
    at = np.stack([phases(d)[t] for d in drawn])  # [calls, objects, 2]
    size = np.log(np.stack([d.size[t] for d in drawn]) / RADIUS[0]) / np.log(RADIUS[1] / RADIUS[0])
    single = [at[..., 0], at[..., 1], size, np.stack([d.angle[t] for d in drawn]) / (2 * np.pi)]
    both = [(a + b) % 1 for a, b in itertools.combinations(single, 2)]
    return [*single, *both, *((a[:, ::2] - a[:, 1::2]) % 1 for a in single)]


def distances(make=make_tracks, source=np.random.Generator) -> dict[int, float]:
    """Frame -> the largest scaled Kolmogorov-Smirnov distance of a quantity in one motion class from the
    other nine."""
    drawn = [
        [make(m, OBJECTS, source(np.random.PCG64((k, i)))) for i in range(CALLS)]
        for k, m in enumerate(MOTIONS)
    ]
    points = np.linspace(0, 1, 101)
    worst = {}
    for t in (0, 11, 23):
        found = []
        for of_class in zip(*(uniform_quantities(d, t) for d in drawn), strict=True):
            below = np.stack([(a.reshape(-1, 1) <= points).mean(0) for a in of_class])  # [motions, points]
            others = (below.sum(0) - below) / (len(MOTIONS) - 1)
            found.append(abs(below - others).max() * np.sqrt(0.9 * of_class[0].size))  # 1 / (1 / n + 1 / 9n)
        worst[t] = float(max(found))
    return worst


def test_single_frames_do_not_reveal_the_motion():
    assert max(distances().values()) < BOUND


class BiasedGenerator(np.random.Generator):
    """Draws from the lower part of every interval: all classes start with equal, but not uniform
    distributions."""

    def uniform(self, low=0.0, high=1.0, size=None):
        return super().uniform(low, low + 0.7 * (high - low), size)


def bounded(motion: str, n: int, rng: np.random.Generator) -> Track:
    """Objects that stop at the end of their path instead of entering at the opposite one."""
    track = make_tracks(motion, n, rng)
    return track._replace(
        position=center_at(np.unwrap(phases(track), period=1, axis=0).clip(0, 1), track.size[..., None])
    )


def growing(motion: str, n: int, rng: np.random.Generator) -> Track:
    """Sizes that stop at the largest and smallest instead of starting again."""
    track = make_tracks(motion, n, rng)
    size = np.exp(np.unwrap(np.log(track.size), period=np.log(RADIUS[1] / RADIUS[0]), axis=0))
    return track._replace(size=size.clip(*RADIUS))


@pytest.mark.parametrize(
    "broken",
    [{"source": BiasedGenerator}, {"make": bounded}, {"make": growing}],
    ids=["biased", "bounded", "growing"],
)
def test_generators_that_reveal_the_motion_are_detected(broken):
    found = distances(**broken)
    assert found[0] < BOUND < 2 * BOUND < found[23]


def test_same_seed_same_bytes(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        for name in ("videos", "truth"):
            (tmp_path / folder / name).mkdir(parents=True)
        write_example((tmp_path / folder, "k", "approach", "blue", (seed, 0, 7)))
    video = {p: (tmp_path / p / "videos/k.mp4").read_bytes() for p in "abc"}
    truth = {p: dict(np.load(tmp_path / p / "truth/k.npz")) for p in "abc"}
    assert video["a"] == video["b"] != video["c"]
    assert all(np.array_equal(truth["a"][k], truth["b"][k]) for k in truth["a"] | truth["b"])
    assert not np.array_equal(truth["a"]["position"], truth["c"]["position"])


def test_file_contains_the_rendered_frames(synthetic_corpus):
    """Sample 13 of the train split, whichever process rendered it; H.264 with subsampled colours is close,
    not equal."""
    with open(synthetic_corpus / "labels.csv", newline="") as f:
        row = list(csv.DictReader(f))[13]
    frames, truth = render(row["label_motion"], row["label_appearance"], np.random.default_rng((0, 0, 13)))
    with av.open(str(synthetic_corpus / row["path"])) as file:
        got = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert got.shape == frames.shape and abs(got.astype(int) - frames).mean() < 8
    kept = np.load(synthetic_corpus / "truth" / "train_00013.npz", allow_pickle=False)
    expected = {"masks", "masks_shape", "depth", "position", "size", "angle", "shape"}
    assert set(kept) == expected | {"keypoints", "keypoints_visible", "keypoints_scale", "depth_map"}
    assert all(np.array_equal(kept[k], truth[k]) for k in truth)


def test_classes_are_balanced_and_labels_readable(synthetic_corpus):
    source = read_source(synthetic_corpus)
    assert source.label_sets == ["motion", "appearance"] and not source.rejected and len(source.items) == 90
    assert Counter(item.split for item in source.items) == {"train": 60, "test": 30}
    for split, samples in (("train", 60), ("test", 30)):
        labels = [item.labels for item in source.items if item.split == split]
        pairs = Counter((x["motion"], x["appearance"]) for x in labels)
        assert set(pairs.values()) == {1} and len(pairs) == samples  # of 60 combinations, none twice
        assert Counter(x["motion"] for x in labels) == dict.fromkeys(MOTIONS, samples // 10)
        assert set(Counter(x["appearance"] for x in labels).values()) == {10}
    assert {x.labels["appearance"] for x in source.items} == set(COLOURS)
    assert all((synthetic_corpus / "truth" / f"{item.path[7:-4]}.npz").is_file() for item in source.items)


@pytest.mark.parametrize("wrong", ["--workers 0", "--train -5", "--test -1", "--labelled -1", "--seed -1"])
def test_invalid_numbers_write_nothing(tmp_path, wrong):
    with pytest.raises(UserError, match="--workers must be positive, --train") as e:
        synthetic.main([str(tmp_path / "out"), "--train", "1", "--test", "0", *wrong.split()])
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/out"):
        with pytest.raises(UserError, match="file is not a folder"):
            synthetic.main([str(tmp_path / out), "--train", "1", "--test", "0"])

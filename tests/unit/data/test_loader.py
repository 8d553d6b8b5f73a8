"""vidssl/data/shards.py, augment.py and loader.py: an item is a function of (seed, position), and of nothing
else."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from training_clips import copy_with_damage, make_clips, train_batches

from data_prep import pack
from vidssl.core.errors import DecodeError, Preempted, UserError
from vidssl.data.augment import BOX_OFFSETS, CenterCrop, MultiScaleCrop, RandomCrop, downscale
from vidssl.data.dataset import EXHAUSTED, DecodeFailure, Example, TrainClips
from vidssl.data.decoding import check_decoder, open_video, select_decoder
from vidssl.data.loader import CollatedStep, DecodeErrorMonitor, give_up_after
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards
from vidssl.data.timing import choose_frames

HEIGHT, WIDTH = 120, 200


def coordinates(frames: int = 5, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """u8 [T, H, W, 3] whose channels are the column, the row and ten times the frame's number."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([np.stack([x, y, np.full_like(x, 10 * t)], -1) for t in range(frames)]).astype(np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def box(clip: torch.Tensor) -> tuple[float, float, float, float]:
    """left, top, width, height (pixels) of what a clip [3, T, S, S] of `coordinates` shows; width < 0:
    flipped."""
    size = clip.shape[-1]
    inner = torch.arange(3, size - 3)  # away from the rim, where antialiasing bends the ramp
    found = []
    for channel, along in ((0, 1), (1, 0)):
        line = clip[channel, 0].float().mean(1 - along)[inner].numpy()
        slope, value = np.polyfit(inner.numpy() + 0.5, line + 0.5, 1)
        found.append((value, slope * size))
    (left, width), (top, height) = found
    return left, top, width, height


def same(a: Example, b: Example) -> bool:
    return a._replace(video=0) == b._replace(video=0) and a.video.equal(b.video)


@pytest.fixture(scope="module")
def train(synthetic_shards) -> Path:
    return synthetic_shards / "train"


# --- augment ---


def test_random_crop_takes_one_box_for_all_frames():
    frames = coordinates()
    boxes = []
    for seed in range(200):
        clip = RandomCrop(32, scale=(0.2, 0.9), ratio=(0.5, 2.0))(frames, rng(seed))
        assert clip.shape == (3, 5, 32, 32) and clip.dtype == torch.uint8 and clip.is_contiguous()
        assert all(clip[:2, t].equal(clip[:2, 0]) for t in range(5))
        assert [clip[2, t].unique().tolist() for t in range(5)] == [[10 * t] for t in range(5)]
        boxes.append(box(clip))
    left, top, width, height = np.array(boxes).T
    assert (left > -1).all() and (top > -1).all() and (left + width < WIDTH + 1).all()
    assert (top + height < HEIGHT + 1).all()
    share = width * height / (WIDTH * HEIGHT)
    ratio = width / height
    assert 0.18 < share.min() < 0.25 and 0.75 < share.max() < 0.92
    assert 0.47 < ratio.min() < 0.6 and 1.7 < ratio.max() < 2.1
    free = (WIDTH - width > 10) & (HEIGHT - height > 10)
    places = np.stack([left / (WIDTH - width), top / (HEIGHT - height)])[:, free]
    for place in places:  # of the room that there is
        assert place.min() < 0.1 and place.max() > 0.9 and 0.4 < place.mean() < 0.6
    assert abs(np.corrcoef(places)[0, 1]) < 0.25


def test_random_crop_flip_probability():
    frames = coordinates(2)
    crops = {p: RandomCrop(32, flip=p) for p in (0.0, 0.5, 1.0)}
    flipped = {
        p: np.mean([box(crop(frames, rng(s)))[2] < 0 for s in range(100)]) for p, crop in crops.items()
    }
    assert flipped[0] == 0 and flipped[1] == 1 and 0.35 < flipped[0.5] < 0.65
    plain, mirrored = (crops[p](frames, rng(4)) for p in (0.0, 1.0))
    assert mirrored.flip(-1).equal(plain)  # the coin changes nothing else


def test_random_crop_is_a_function_of_the_generator():
    crop = RandomCrop(24, flip=0.5)
    assert crop(coordinates(), rng(8)).equal(crop(coordinates(), rng(8)))
    assert not crop(coordinates(), rng(8)).equal(crop(coordinates(), rng(9)))
    used, fresh = rng(1), rng(1)
    crop(coordinates(), used)
    crop(np.zeros((2, 20, 400, 3), np.uint8), fresh)
    assert used.uniform() == fresh.uniform()  # what is drawn does not depend on the frames


def test_random_crop_falls_back_to_the_centre():
    frames = coordinates()[:, :30]  # 30 x 200 pixels; 90 % of that at a ratio of 1.35 at most does not fit
    left, top, width, height = box(RandomCrop(32, scale=(0.9, 1.0))(frames, rng()))
    assert abs(width - 40) < 1.5 and abs(height - 30) < 1.5 and abs(left - 80) < 1.5 and abs(top) < 1.5
    tall = np.ascontiguousarray(coordinates()[:, :, :30])  # 120 x 30 pixels
    left, top, width, height = box(RandomCrop(32, scale=(0.9, 1.0))(tall, rng()))
    assert abs(width - 30) < 1.5 and abs(height - 40) < 1.5 and abs(left) < 1.5 and abs(top - 40) < 1.5


def test_multi_scale_crop_box_sizes():
    assert MultiScaleCrop(224).box_sizes(240) == [  # 240, 210, 180 and 158.4 pixels
        *((240, 240), (240, 210), (210, 240), (210, 210), (210, 180)),
        *((180, 210), (180, 180), (180, 158), (158, 180), (158, 158)),
    ]
    assert MultiScaleCrop(224, max_distort=0).box_sizes(256)[:2] == [(256, 256), (224, 224)]
    assert MultiScaleCrop(222, max_distort=0).box_sizes(256)[1] == (222, 222)  # 224 is near enough
    assert MultiScaleCrop(221, max_distort=0).box_sizes(256)[1] == (224, 224)
    assert MultiScaleCrop(224, max_distort=0).box_sizes(223)[0] == (
        223,
        223,
    )  # a frame has no more than it has
    assert len(MultiScaleCrop(224, max_distort=3).box_sizes(320)) == 16
    assert MultiScaleCrop(8).box_sizes(1) == [(1, 1)] * 10


@pytest.mark.parametrize(
    "height, width, across, down", [(120, 200, 35, 15), (200, 120, 15, 35), (121, 83, 5, 15)]
)
def test_multi_scale_crop_places(height, width, across, down):
    """across, down: a quarter of the room that a box of 60 pixels has, rounded down."""
    frames = coordinates(5, height, width)
    crop = MultiScaleCrop(60, scales=(60.5 / min(height, width),))
    seen = []
    for seed in range(600):
        clip = crop(frames, rng(seed))
        assert clip.shape == (3, 5, 60, 60) and clip.dtype == torch.uint8 and clip.is_contiguous()
        assert all(clip[:2, t].equal(clip[:2, 0]) for t in range(5))  # the same box for all frames
        assert [clip[2, t].unique().tolist() for t in range(5)] == [[10 * t] for t in range(5)]
        seen.append((int(clip[0, 0, 0, 0]), int(clip[1, 0, 0, 0])))
    steps = [(x, y) for x in (0, 2, 4) for y in (0, 2, 4)] + [(1, 1), (3, 1), (1, 3), (3, 3)]
    counts = [seen.count((x * across, y * down)) for x, y in steps]
    assert len(BOX_OFFSETS) == 13 and sum(counts) == 600
    assert sum((n - 600 / 13) ** 2 / (600 / 13) for n in counts) < 33  # chi-square, 12 degrees: p = 0.001


def test_multi_scale_crop_draws_box_sizes_equally():
    frames, crop = coordinates(1), MultiScaleCrop(32)
    sides = np.array([box(crop(frames, rng(seed)))[:1:-1] for seed in range(600)])  # height, width
    pairs = np.array(crop.box_sizes(HEIGHT))
    assert len(pairs) == 10 and pairs.max() == 120 and pairs.min() == 79
    off = np.abs(sides[:, None] - pairs).max(-1)
    assert off.min(1).max() < 2  # pixels
    counts = np.bincount(off.argmin(1), minlength=10)
    assert ((counts - 60) ** 2 / 60).sum() < 27.9  # chi-square, 9 degrees: p = 0.001


def test_multi_scale_crop_flip_and_generator():
    frames = coordinates(2)
    assert not any(box(MultiScaleCrop(32)(frames, rng(s)))[2] < 0 for s in range(50))
    plain = MultiScaleCrop(32)(frames, rng(4))
    mirrored = MultiScaleCrop(32, flip=1.0)(frames, rng(4))
    assert mirrored.flip(-1).equal(plain) and not plain.equal(MultiScaleCrop(32)(frames, rng(5)))
    used, fresh = rng(1), rng(1)
    MultiScaleCrop(32)(frames, used)
    MultiScaleCrop(32)(np.zeros((2, 20, 400, 3), np.uint8), fresh)
    assert used.uniform() == fresh.uniform()  # what is drawn does not depend on the frames


def test_center_crop_is_the_middle_square():
    left, top, width, height = box(CenterCrop(60)(coordinates()))
    assert abs(left - 40) < 1.5 and abs(top) < 1.5 and abs(width - 120) < 1.5 and abs(height - 120) < 1.5
    whole = CenterCrop(HEIGHT)(coordinates())
    assert whole.equal(torch.from_numpy(coordinates()[:, :, 40:160]).permute(3, 0, 1, 2))  # nothing to resize


def test_scale():
    frames = coordinates()
    assert (
        downscale(frames, None) is frames
        and downscale(frames, HEIGHT) is frames
        and downscale(frames, 500) is frames
    )
    small = downscale(frames, 48)
    assert small.shape == (5, 48, 80, 3) and small.dtype == np.uint8 and small.flags.c_contiguous
    assert downscale(frames.transpose(0, 2, 1, 3), 48).shape == (5, 80, 48, 3)
    inside = small[0, 5:-5, 5:-5, 0].astype(float)
    assert abs(inside - 2.5 * (np.arange(5, 75) + 0.5) + 0.5).max() < 1.5


# --- an item is a function of seed and position ---


def test_examples_do_not_depend_on_access_order(train):
    clips = make_clips(train)
    wanted = [0, 17, 59, 60, 1000]  # four epochs and more
    first = [clips[g] for g in wanted]
    for g in range(40):
        clips[g]
    assert all(same(clips[g], item) for g, item in zip(wanted, first, strict=True))
    assert all(same(make_clips(train)[g], item) for g, item in zip(wanted, first, strict=True))
    for g, item in zip(wanted, first, strict=True):
        sample = clips.shards.sample(*clips.order.locate(g))
        assert (item.position, item.key, item.label, item.failures) == (
            g,
            sample.key,
            sample.meta["label"],
            [],
        )
        assert item.video.shape == (3, 4, 32, 32) and item.video.dtype == torch.uint8


def test_seeds_give_different_crops(train):
    one, other = make_clips(train, seed=3), make_clips(train, seed=4)
    meet = [
        g for g in range(600) if one.order.locate(g) == other.order.locate(g)
    ]  # the same sample at the same position
    assert len(meet) > 3 and not any(one[g].video.equal(other[g].video) for g in meet)


def test_crops_differ_between_epochs(train):
    clips = make_clips(train)
    of_key: dict[str, list[Example]] = {}
    for g in range(180):
        of_key.setdefault(clips[g].key, []).append(clips[g])
    assert len(of_key) == 60 and all(len(items) == 3 for items in of_key.values())
    assert not any(a.video.equal(b.video) for a, b, _ in of_key.values())


def test_sampling_rule_of_clips(train, monkeypatch):
    picked = []

    def spy(times, *clip):
        picked.append(choose_frames(np.arange(40) / 25, *clip).tolist())
        return choose_frames(times, *clip)

    monkeypatch.setattr("vidssl.data.dataset.choose_frames", spy)
    for rule in ("exact", "vjepa"):
        for g in range(20):
            make_clips(train, rule=rule, stride=3)[g]
    exact = picked[:20]
    reference = picked[20:]
    assert {tuple(np.diff(p)) for p in exact} == {(3, 3, 3)}
    assert {tuple(np.diff(p)) for p in reference} == {(4, 4, 3)}  # 4 points over 12 frames, the last one cut
    assert len({p[0] for p in exact}) > 5 and len({p[0] for p in reference}) > 5


def fetch(clips: TrainClips, g: int) -> Example:
    return clips[g]


@pytest.mark.slow
def test_examples_in_a_spawned_process(train):
    """Started afresh (spawn), as loader workers are on some systems: everything is pickled."""
    clips = make_clips(train, cache="host")
    here = [clips[g] for g in (5, 70)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.starmap(fetch, [(clips, 5), (clips, 70)])
    assert all(map(same, here, there))


@pytest.mark.parametrize("cache", ["none", "host"])
def test_batches_do_not_depend_on_workers_and_processes(train, cache):
    def run(workers: int, rank: int = 0, world: int = 1, start: int = 0) -> list:
        return list(train_batches(make_clips(train, cache=cache), start, 9, 8, rank, world, workers))

    alone = run(0)
    helped = run(2)
    later = run(2, start=5)
    assert [b.position.tolist() for b in alone] == [list(range(8 * s, 8 * s + 8)) for s in range(9)]
    for a, b in zip([*alone, *alone[5:]], [*helped, *later], strict=True):
        assert (
            a.video.equal(b.video)
            and a.label.equal(b.label)
            and a.position.equal(b.position)
            and a.key == b.key
        )
    ranks = [run(0, rank, 2) for rank in (0, 1)]
    for step, batch in enumerate(alone):
        halves = [ranks[r][step] for r in (0, 1)]
        order = torch.cat([h.position for h in halves]).argsort()
        assert torch.cat([h.video for h in halves])[order].equal(batch.video)
        assert torch.cat([h.label for h in halves])[order].equal(batch.label)


# --- what cannot be decoded ---


@pytest.mark.parametrize("world", [1, 2])
def test_repeated_clips_share_one_decoding(train, world, monkeypatch):
    clips = make_clips(train, repeat=3)
    repeat = 3
    opened: list[bytes] = []
    real = open_video
    monkeypatch.setattr(
        "vidssl.data.dataset.open_video", lambda data, *rest: opened.append(data) or real(data, *rest)
    )
    batches = [b for r in range(world) for b in train_batches(clips, 0, 2, 24, r, world, 0)]
    assert len(opened) == 2 * 24 // repeat  # a video once, although other lanes stand between its clips
    assert sorted(int(p) for b in batches for p in b.position) == list(range(48))
    starts = []
    for b in batches:
        for i in range(0, len(b.key), repeat):
            assert (
                len(set(b.key[i : i + repeat])) == 1
                and len({c.numpy().tobytes() for c in b.video[i : i + repeat]}) > 1
            )
            starts.append([int(p) % 4 for p in b.position[i : i + repeat]])
        for video, position, key in zip(b.video, b.position, b.key, strict=True):
            alone = make_clips(train, repeat=3)[int(position)]  # a fresh one, asked for this position only
            assert alone.key == key and alone.video.equal(video)
    assert all(len(set(lanes)) == 1 for lanes in starts)
    shown = [make_clips(train, repeat=1)[p].key for p in range(16)]
    assert sorted({k for b in batches for k in b.key}) == sorted(set(shown))  # the first of the order


def test_repeated_clips_are_replaced_together(train, tmp_path):
    clips = make_clips(
        copy_with_damage(train, tmp_path / "bad", {make_clips(train).order.locate(1): 0.0}), repeat=2
    )
    items = [clips[g] for g in (1, 5)]  # lanes are 4: the two clips of the sample at 1
    assert [len(i.failures) for i in items] == [1, 1] and items[0].key == items[1].key != make_clips(train)[
        1
    ].key


def test_undecodable_sample_is_replaced_and_reported(train, tmp_path):
    folder = copy_with_damage(train, tmp_path / "damaged", {(1, 3): 0.0})
    clips, sound = make_clips(folder), make_clips(train)
    key = clips.shards.sample(1, 3).key
    replaced = {}
    for g in range(120):
        item = clips[g]
        if sound[g].key == key:
            assert item.failures == [(key, "not_a_video")] and item.key != key and item.position == g
            assert item.key == clips.shards.sample(*clips.order.replacement(g, 1)).key
            assert item.label == clips.shards.sample(*clips.order.replacement(g, 1)).meta["label"]
            replaced[g] = item
        else:
            assert same(item, sound[g])  # nobody else is touched
    assert len(replaced) == 2  # once an epoch
    cached = make_clips(folder, cache="host")
    assert all(same(cached[g], item) for g, item in replaced.items())
    batches = list(train_batches(make_clips(folder), 0, 15, 8, 0, 1, 2))
    assert [b for batch in batches for b in batch.failures] == [(key, "not_a_video")] * 2


def test_run_stops_at_too_many_failures(train, tmp_path):
    shards = Shards([str(train)])
    places = [(s, i) for s, n in enumerate(shards.counts) for i in range(n)][:12]
    folder = copy_with_damage(train, tmp_path / "damaged", dict.fromkeys(places, 0.0))
    assert len(list(train_batches(make_clips(folder, max_decode_error_rate=0.5), 0, 30, 8, 0, 1, 0))) == 30
    seen = 0
    with pytest.raises(
        UserError,
        match=r"\d+ of 200 samples could not be decoded .*'not_a_video': \d+.*data\.max_decode_error_rate",
    ):
        for _ in train_batches(make_clips(folder, max_decode_error_rate=0.1), 0, 30, 8, 0, 1, 0):
            seen += 1
    assert seen == 24  # the 25th batch of eight completes the 200


def test_run_stops_at_once_if_nothing_decodes(train, tmp_path):
    shards = Shards([str(train)])
    places = [(s, i) for s, n in enumerate(shards.counts) for i in range(n)]
    folder = copy_with_damage(train, tmp_path / "damaged", dict.fromkeys(places, 0.0))
    with pytest.raises(UserError, match=r"20 samples in a row failed at position 0; .*'not_a_video'"):
        next(train_batches(make_clips(folder, max_decode_error_rate=1.0), 0, 1, 8, 0, 1, 0))


def test_decode_error_rate_is_limited():
    failure = DecodeFailure("a", "empty")
    monitor = DecodeErrorMonitor(0.05)
    for n in range(20):
        monitor.add(10, [failure] * (n % 2))  # 10 of 200: exactly the limit
    with pytest.raises(UserError, match=r"11 of 201 .*\{'empty': 11\}; last a"):
        monitor.add(1, [failure])
    monitor = DecodeErrorMonitor(0.05)
    monitor.add(199, [failure] * 50)  # too few samples to judge
    with pytest.raises(UserError, match=r"50 of 200 .*last a"):
        monitor.add(1, [])  # judged at a batch without failures
    exhausted = Example(7, EXHAUSTED, -1, torch.empty(0), [failure] * 20)
    with pytest.raises(UserError, match=r"20 samples in a row .* position 7; last reason 'empty' \(a\)"):
        DecodeErrorMonitor(1.0).add(1, [failure] * 20, exhausted)


def test_config_requires_stride_or_fps():
    for wrong in ({}, {"stride": 2, "fps": 4.0}):
        with pytest.raises(UserError, match=r"either stride .* or fps"):
            DataConfig(["x"], 4, **wrong)


# --- images ---


def test_image_is_a_clip_of_one_repeated_frame(make_image, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "src" / name / f"{i}.jpg").write_bytes(make_image("jpeg"))
    pack.main([str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1", "--frames", "images"])
    for settings in ({"stride": 2}, {"stride": None, "fps": 5.0}):
        clips = make_clips(tmp_path / "out", **settings)
        items = [clips[g] for g in range(6)]
        assert sorted(i.label for i in items) == [0, 0, 0, 1, 1, 1] and not any(i.failures for i in items)
        for item in items:
            assert item.video.shape == (3, 4, 32, 32)
            assert all(item.video[:, t].equal(item.video[:, 0]) for t in range(4))
            assert abs(int(item.video[0, 0, -1, -1]) - 100) < 4
        assert not items[0].video.equal(items[1].video)  # cut differently


# --- shards ---


def test_several_data_sets_are_concatenated(synthetic_shards):
    folders = [str(synthetic_shards / split) for split in ("train", "test")]
    one = Shards(folders[:1])
    both = Shards(folders)
    assert one.n == 60 and both.n == 90 and len(both.list_samples()) == 90 and one.hash != both.hash
    assert [s._replace(shard=0) for s in both.list_samples()[:60]] == [
        s._replace(shard=0) for s in one.list_samples()
    ]
    sample = both.list_samples()[75]
    assert both.sample(sample.shard, both._shard_records(sample.shard).index(sample)) == sample
    assert len(both.read(sample)) == sample.size and both.read(sample)[4:8] == b"ftyp"
    assert both.classes["motion"][sample.meta["labels"]["motion"]] == sample.meta["class"]


def test_errors_of_opening_shards(synthetic_shards, train, tmp_path):
    with pytest.raises(UserError, match="name at least one packed folder"):
        Shards([])
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    for path, says in (
        (synthetic_shards, r"no index\.json in it, but it holds 2 folders with one: test, train$"),
        (tmp_path / "none", rf"none: no such folder; {tmp_path} is there$"),
        (tmp_path / "none" / "deeper", rf"deeper: no such folder; {tmp_path} is there$"),
        (train / "index.json", rf"index\.json: a file; name the folder, {train}$"),
        (tmp_path / "tars" / "a.tar", r"a\.tar: a file, not a folder of shards$"),
        (tmp_path / "tars", r"no index\.json, but 1 \.tar file; .* vidssl scan .*data\.reader=stream$"),
        (tmp_path / "videos", r"it holds a\.mp4\); make one with vidssl pack$"),
        (tmp_path, r"no folder of shards \(it holds tars, videos\)"),
    ):
        with pytest.raises(UserError, match=says):
            Shards([str(path)])
    other = shutil.copytree(train, tmp_path / "other")
    index = json.loads((other / "index.json").read_text())
    del index["checksum"]
    (other / "index.json").write_text(json.dumps({**index, "shards": []}))
    with pytest.raises(UserError, match="the index lists no samples"):
        Shards([str(other)])


def test_records_that_differ_from_the_index(train, tmp_path):
    folder = shutil.copytree(train, tmp_path / "short")
    shards = Shards([str(folder)])
    file = sorted(folder.glob("shard-*.jsonl"))[2]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    shards.sample(0, 0)  # the others are well
    with pytest.raises(
        UserError, match=rf"{file.name}: {len(lines) - 1} samples, but index\.json says {len(lines)}"
    ):
        shards.sample(2, 0)
    for damage in ("{", None):
        file.unlink() if damage is None else file.write_text(damage)
        with pytest.raises(UserError, match=rf"{file.name}.*: run vidssl verify"):
            shards.sample(2, 0)


# --- decoders ---


@pytest.fixture(scope="module")
def proven(tiny_corpus, tmp_path_factory) -> Path:
    """Files of which pack found that decord serves them right."""
    out = tmp_path_factory.mktemp("proven") / "shards"
    pack.main([str(tiny_corpus), str(out), "--workers", "1"])
    return out


@pytest.mark.parametrize("decoder", ["decord", "pyav", "torchcodec"])
def test_decoders_agree_to_within_two_grey_levels(decoder, proven):
    """H.264, 8 bit, even sizes; 10 bit and odd sizes are converted with up to 4 levels of difference."""
    if decoder == "torchcodec":
        pytest.importorskip("torchcodec")
        try:
            check_decoder("torchcodec")
        except UserError as e:
            pytest.skip(str(e))
    clips = make_clips(proven, decoder=decoder)
    want = make_clips(proven, decoder="pyav")
    assert {select_decoder(s.ext, s.meta, decoder) for s in clips.shards.list_samples()} == {decoder}
    for g in range(24):
        got, auto = clips[g], want[g]
        assert got.key == auto.key and not got.failures
        assert abs(got.video.float() - auto.video.float()).mean() < 2


def test_select_decoder():
    counted = {"frames": 9, "decoder": "pyav", "times": None}
    stamped = {}
    proven = {"frames": 9, "decoder": "pyav", "decord": True}
    only = {**proven, "decoder": "decord"}
    for decoder, want in (
        ("auto", ["pyav", "decord", "pyav", "pyav", "pyav"]),
        ("decord", ["decord", "decord", "pyav", "decord", "decord"]),
        ("torchcodec", ["torchcodec", "torchcodec", "pyav", "pyav", "pyav"]),
        ("pyav", ["pyav"] * 5),
    ):
        assert [
            select_decoder("mp4", meta, decoder) for meta in (proven, only, counted, stamped, None)
        ] == want
        assert select_decoder(".PNG", proven, decoder) == "image"


def test_pyav_decodes_what_decord_cannot(proven, monkeypatch):
    want = make_clips(proven, decoder="pyav")[3]
    opened = []

    class Broken:
        def __init__(self, *_):
            opened.append(1)
            raise DecodeError("decode_error")

    monkeypatch.setattr("vidssl.data.decoding.decord.DecordVideo", Broken)
    assert same(make_clips(proven, decoder="decord")[3], want) and len(opened) == 1
    cached = make_clips(proven, cache="host", decoder="decord")
    assert same(cached[3], want) and len(opened) == 1 + cached.shards.n


class StuckDataset(torch.utils.data.Dataset):
    """Waits until a byte is written to the pipe."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __getitem__(self, number: int) -> bytes:
        return os.read(self.descriptor, 1)

    def __len__(self) -> int:
        return 1


def test_a_batch_that_does_not_come_ends_the_process_before_the_others_give_up():
    read, write = os.pipe()
    steps = iter(DataLoader(StuckDataset(read), num_workers=1, timeout=0.1, collate_fn=list))
    with pytest.raises(Preempted, match=r"no batch for 0\.1 s"):
        next(give_up_after(0.1, steps))
    os.write(write, b"x")


def test_other_errors_of_a_loader_are_raised_as_they_are():
    def fail() -> Iterator[CollatedStep]:
        raise RuntimeError("DataLoader worker (pid 1) is killed")
        yield

    with pytest.raises(RuntimeError, match="is killed"):
        next(give_up_after(0.1, fail()))

"""data.cache: the clips of videos that are held in memory are those of the files."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_clips import copy_with_damage, make_clips, train_batches

from vidssl.core.errors import DecodeError, UserError
from vidssl.core.memory import free_memory
from vidssl.data import cache_fill
from vidssl.data.augment import RandomCrop
from vidssl.data.cache import DecodedVideo, HostCache
from vidssl.data.cache_fill import CacheSize, cache_videos, check_cache_fits, decode_video
from vidssl.data.dataset import Example
from vidssl.data.device_cache import DeviceCache, collate_cached
from vidssl.data.shards import Sample, Shards


def same(a: Example, b: Example) -> bool:
    return a._replace(video=0) == b._replace(video=0) and a.video.equal(b.video)


@pytest.fixture(scope="module")
def train(synthetic_shards) -> Path:
    return synthetic_shards / "train"


@pytest.mark.parametrize(
    "settings", [{"repeat": 2}, {"stride": None, "fps": 5.0}, {"stride": 3, "short_side": 24}], ids=str
)
def test_cached_clips_are_those_of_the_files(train, settings, monkeypatch):
    plain = make_clips(train, **settings)
    cached = make_clips(train, cache="host", **settings)
    assert cached.clip_reader.cache.nbytes == 60 * 24 * 3 * settings.get("short_side", 48) ** 2
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("a cached video was read again"))
    items = [cached[g] for g in range(0, 130, 3)]
    monkeypatch.undo()
    assert all(same(plain[g], item) for g, item in zip(range(0, 130, 3), items, strict=True))


def test_videos_are_decoded_by_isolated_workers(train, tmp_path, caplog, monkeypatch):
    folder = copy_with_damage(train, tmp_path / "damaged", {(1, 3): 0.0, (0, 2): 0.5})
    plain = make_clips(folder)
    cached = make_clips(folder)
    cached.data = dataclasses.replace(cached.data, cache="host")
    caplog.set_level("INFO", "vidssl")
    monkeypatch.setattr("vidssl.core.log.logger.propagate", True)
    cache_videos([cached], workers=1, isolate=True, quiet=True)
    bad = {plain.shards.sample(*place).key for place in ((1, 3), (0, 2))}
    affected = [g for g in range(120) if plain.sample_at(g, 0).key in bad]
    assert len(affected) == 4 and all(cached[g].failures for g in affected)
    assert all(same(plain[g], cached[g]) for g in [*affected, *range(8)])
    assert caplog.messages[0].startswith("data.cache: 60 videos, 1440 frames, 0.00995 GB; ")
    assert "2 do not decode {'not_a_video': 2}" in caplog.messages[-1]


def test_a_whole_video_may_grow_its_process_by_its_frames(train, monkeypatch):
    clips = make_clips(train)
    asked = []
    monkeypatch.setattr(cache_fill.IsolatedDataset, "try_position", lambda *job, **more: asked.append(more))
    videos = cache_fill.WholeVideos(clips.shards, [(0, 0), (0, 1)], 24, "auto")
    cache_fill.IsolatedVideos(videos, 60.0, 1)[1]
    assert asked == [{"extra_bytes": 2 * 24 * 24 * 24 * 3}]
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("the frames are in memory twice"))
    assert len(videos[1].frames) == 24


def test_a_partly_damaged_video_gives_the_clips_that_decode(train, tmp_path):
    """One video ends before its meta says: clips from its beginning are served, the others replaced."""
    folder = shutil.copytree(train, tmp_path / "part")
    file = folder / "shard-000002.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["meta"] |= {"decoder": "pyav", "times": None, "frames": 40}  # it has 24
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = json.loads((folder / "index.json").read_text())
    del index["checksum"], index["shards"][2]["index_bytes"]
    index["shards"][2]["index_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    plain = make_clips(folder)
    cached = make_clips(folder, cache="host")
    affected = [g for g in range(480) if plain.sample_at(g, 0).key == lines[0]["key"]]
    assert all(same(plain[g], cached[g]) for g in affected)
    failures = [b for g in affected for b in plain[g].failures]
    assert set(failures) == {(lines[0]["key"], "decode_error")} and 1 <= len(failures) < len(affected)


def test_frames_after_a_long_damage_are_given_up(train, monkeypatch):
    shards = Shards([str(train)])
    sample = shards.sample(0, 0)
    meta = sample.meta | {"decoder": "pyav", "times": None, "frames": 4000}
    opened: list[int] = []
    monkeypatch.setattr(cache_fill, "open_video", lambda *args: opened.append(1) or cache_open(*args))
    video = decode_video(shards.read(sample), sample.ext, meta, "pyav", None)
    assert len(video.frames) == len(video.times) == 4000
    assert list(video.missing) == list(range(24, 4000)) and len(opened) == 1 + cache_fill.GIVE_UP_AFTER


cache_open = cache_fill.open_video


# --- on a device (here the CPU) ---


def make_sample(number: int) -> Sample:
    return Sample(f"video{number}", "mp4", 0, 512 * (1 + number), 1, {})


def test_clips_of_a_device_are_those_of_the_host():
    """Videos of several sizes in several chunks, with repeats and a video that is damaged in part."""
    rng = np.random.default_rng(0)
    augment = RandomCrop(24, flip=0.5)
    sizes = [(40, 60), (60, 40), (40, 60), (21, 33), (60, 40)]
    videos = [rng.integers(0, 256, (6, *size, 3), np.uint8) for size in sizes]
    device = DeviceCache(torch.device("cpu"), expected_bytes=2 * videos[0].nbytes)
    host = HostCache()
    for i, frames in enumerate(videos):
        missing = {5: "decode_error"} if i == 3 else {}
        for cache in (device, host):
            cache.add(make_sample(i), DecodedVideo(torch.from_numpy(frames), np.arange(6) / 25, missing))
            cache.add(make_sample(9), "hang")
    assert len(device.chunks) == 2 and device.nbytes == host.nbytes
    chosen = [(3, [0, 2, 2, 1]), (0, [0, 1, 2, 3]), (4, [1, 2, 3, 4]), (2, [5, 4, 3, 2]), (3, [4, 0, 1, 1])]
    clips = [
        device.index.find_clips(
            make_sample(i), lambda _, f=f: np.array([f]), augment, [np.random.default_rng(i)]
        )[0]
        for i, f in chosen
    ]
    made = collate_cached(clips).to(torch.device("cpu"))
    for clip, (i, indices) in zip(made, chosen, strict=True):
        expected = augment(
            host.read_clips(make_sample(i), lambda _, f=indices: np.array(f)), np.random.default_rng(i)
        )
        difference = (clip.int() - expected.int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.5
    for number, indices in ((3, [4, 5]), (9, [0, 0])):
        for find in (
            lambda *args: host.read_clips(*args),
            lambda *args: device.index.find_clips(*args, augment, []),
        ):
            with pytest.raises(DecodeError):
                find(make_sample(number), lambda _, f=indices: np.array(f))


def test_batches_of_a_device_are_those_of_the_files(train, tmp_path):
    folder = copy_with_damage(train, tmp_path / "damaged", {(1, 3): 0.0})
    settings = {"repeat": 2, "short_side": 40, "max_decode_error_rate": 0.5}
    plain = make_clips(folder, **settings)
    cached = make_clips(folder, **settings)
    cached.data = dataclasses.replace(cached.data, cache="device")
    cache_videos([cached], workers=0, isolate=False, quiet=True)
    device = cached.index.cache
    assert len(device.chunks) == 1 and device.nbytes == 59 * 24 * 40 * 40 * 3
    files = list(train_batches(plain, 0, 12, 8))
    assert any(batch.failures for batch in files)
    for start, workers in ((0, 0), (10, 1)):
        for a, b in zip(
            files[start:], train_batches(cached, start, 12, 8, workers=workers, isolate=True), strict=True
        ):
            assert a.key == b.key and a.failures == b.failures
            assert a.label.equal(b.label) and a.position.equal(b.position)
            difference = (a.video.int() - b.video.to("cpu").int()).abs()
            assert difference.max() <= 2 and difference.float().mean() < 0.5


# --- what it takes ---

SIZES = CacheSize(np.array([[100, 240, 320], [50, 480, 360]]))


def test_size_of_scaled_videos():
    whole = 3 * (100 * 240 * 320 + 50 * 480 * 360)
    assert SIZES.nbytes(None) == SIZES.nbytes(400) == whole
    assert SIZES.nbytes(120) == 3 * (100 * 120 * 160 + 50 * 160 * 120)


def test_what_does_not_fit_is_refused_with_a_size_that_does():
    free = 9_000_000
    with pytest.raises(
        UserError, match=r"0\.049 GB .* 80% of the 0\.009 GB .* on this host: data\.short_side="
    ) as e:
        check_cache_fits(SIZES, None, free, "on this host")
    proposed = int(str(e.value).rpartition("=")[2].split()[0])
    check_cache_fits(SIZES, proposed, free, "on this host")
    with pytest.raises(UserError, match=r"2 processes x .* data\.short_side="):
        check_cache_fits(SIZES, proposed, free, "on this host", copies=2)
    with pytest.raises(UserError, match=r"data\.cache=none reads from the disk"):
        check_cache_fits(SIZES, 32, 1000, "on this host")


def test_videos_of_unknown_size_stop_where_the_memory_ends(train, monkeypatch):
    monkeypatch.setattr(cache_fill, "measure_size", lambda samples: CacheSize(np.zeros((60, 3), np.int64)))
    monkeypatch.setattr(cache_fill, "free_memory", lambda: 10 * 24 * 48 * 48 * 3)
    with pytest.raises(UserError, match=r"are full after 9 of 60 videos: give a smaller data\.short_side"):
        make_clips(train, cache="host")


def test_free_memory_is_that_of_the_container(tmp_path):
    assert free_memory(str(tmp_path)) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   4000 kB\n")
    assert free_memory(str(tmp_path)) == 4000 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1500000\n")
    (group / "memory.stat").write_text("anon 900000\ninactive_file 500000\n")
    for limit, free in (("max", 4000 << 10), ("2000000", 1000000), ("1000000", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert free_memory(str(tmp_path)) == free

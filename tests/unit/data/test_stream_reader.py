"""vidssl/data/stream.py: shards without an index, written by webdataset on the fly."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import webdataset
from server import serving

from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.data.augment import RandomCrop
from vidssl.data.loader import make_streams, open_shards, train_steps
from vidssl.data.schema import DataConfig, ExtraStream
from vidssl.data.stream import ShardUrls

SHARDS, SAMPLES = 4, 6
KEYS = {f"{s}-{i}" for s in range(SHARDS) for i in range(SAMPLES)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, make_video) -> Path:
    """Four tars of six videos; the class of sample i of shard s is its shard."""
    folder = tmp_path_factory.mktemp("bucket")
    video = make_video(8)
    for s in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"part-{s:03d}.tar"), encoder=False) as tar:
            for i in range(SAMPLES):
                label = {"json": json.dumps({"label": s}).encode()} if i % 2 else {"cls": str(s).encode()}
                tar.write({"__key__": f"{s}-{i}", "mp4": video, **label})
    return folder


@pytest.fixture
def pattern(videos) -> str:
    return str(videos / "part-{000..003}.tar")


def stream_config(*train: str, **settings) -> DataConfig:
    return DataConfig(list(train), frames=4, stride=1, reader="stream", shuffle_buffer=8, **settings)


def read(data: DataConfig, steps: int = 6, start: int = 0, batch: int = 4, seed: int = 0, **topology) -> list:
    shards, _ = open_shards(data)
    streams = make_streams(data, shards, RandomCrop(16), seed, 4, 10)
    return [batch for (batch,) in train_steps(streams, start, steps, [batch], **topology)]


def keys(batches: list) -> list[str]:
    return [key for batch in batches for key in batch.key]


def test_clips_augmented_on_a_device_are_those_of_the_host(pattern):
    host, device = (read(stream_config(pattern, augment_on=place), 2) for place in ("host", "device"))
    for a, b in zip(host, device, strict=True):
        assert a.key == b.key
        assert (b.video.to(torch.device("cpu")).float() - a.video.float()).abs().mean() < 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("isolate", [False, True])
def test_an_epoch_holds_every_sample_once(pattern, workers, isolate):
    """24 samples in 6 steps of 4; with two workers each reads two of the four shards."""
    got = read(stream_config(pattern), workers=workers, isolate=isolate)
    assert sorted(keys(got)) == sorted(KEYS)
    for step, batch in enumerate(got):
        assert batch.video.shape == (4, 3, 4, 16, 16) and batch.video.dtype == torch.uint8
        assert batch.position.tolist() == list(range(4 * step, 4 * step + 4)) and not batch.failures
        assert batch.label.tolist() == [int(key[0]) for key in batch.key]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_read_different_shards_without_end(pattern, workers):
    first, second = (read(stream_config(pattern), 18, rank=r, world=2, workers=workers) for r in range(2))
    assert [len(b.key) for b in first + second] == [2] * 36
    assert not set(keys(first[:6])) & set(keys(second[:6]))
    assert set(keys(first)) | set(keys(second)) == KEYS  # after three epochs
    positions = torch.cat([b.position for b in first + second])
    assert sorted(positions.tolist()) == list(range(72))


def test_order_and_clips_are_functions_of_seed_and_topology(pattern):
    a, b = (read(stream_config(pattern), workers=2) for _ in range(2))
    assert keys(a) == keys(b) and all(x.video.equal(y.video) for x, y in zip(a, b, strict=True))
    assert keys(read(stream_config(pattern), seed=1)) != keys(read(stream_config(pattern)))


def test_fewer_shards_than_loader_processes(pattern, videos, capsys):
    one = str(videos / "part-001.tar")
    for rank in range(2):
        got = read(stream_config(one), 8, rank=rank, world=2, workers=2)
        assert len(got) == 8 and set(keys(got)) <= {f"1-{i}" for i in range(SAMPLES)}
    (line,) = capsys.readouterr().err.splitlines()  # of the first process only
    assert "1 shards, 4 loader processes" in line and line.endswith(
        "draws shards at random, with replacement"
    )


def test_one_line_at_the_start_and_on_resume(pattern, capsys):
    read(stream_config(pattern), 1)
    assert "a run that is continued starts a new pass over the shards" in capsys.readouterr().err
    later = read(stream_config(pattern), 8, start=7)
    assert later[0].position.tolist() == [28, 29, 30, 31]
    assert "continued at step 7 with newly shuffled shards, not at the sample" in capsys.readouterr().err


def test_addresses(videos, pattern, tmp_path):
    tars = [str(videos / f"part-{s:03d}.tar") for s in range(SHARDS)]
    assert ShardUrls(stream_config(*tars)).urls == tars
    assert ShardUrls(stream_config(str(videos))).urls == tars == ShardUrls(stream_config(pattern)).urls
    assert set(keys(read(stream_config(f"pipe:cat {pattern}")))) == KEYS
    with serving(videos.parent) as server:
        url = server.url(f"{videos.name}/part-{{000..003}}.tar")
        assert set(keys(read(stream_config(url)))) == KEYS
    assert open_shards(stream_config(pattern))[1] == open_shards(stream_config(url))[1]
    assert open_shards(stream_config(pattern))[1] != open_shards(stream_config(*tars[:2]))[1]
    with pytest.raises(UserError, match=r"no \.tar file in it"):
        open_shards(stream_config(str(tmp_path)))


@dataclass(frozen=True)
class DataOnly:
    data: DataConfig


def test_pattern_in_a_configuration(pattern):
    settings = [f"data.train={pattern}", "data.frames=4", "data.stride=1", "data.reader=stream"]
    assert len(ShardUrls(load_config(settings, DataOnly).data).urls) == SHARDS


# --- damage ---


@pytest.fixture
def damaged(videos, tmp_path) -> Path:
    """The first shard is cut within its fourth video, the second is no tar, the third holds undecodable
    samples."""
    paths = [tmp_path / f"part-{s:03d}.tar" for s in range(SHARDS)]
    whole = [(videos / path.name).read_bytes() for path in paths]
    video_size = len(whole[0]) // SAMPLES
    paths[0].write_bytes(whole[0][: 3 * video_size + video_size // 2])
    paths[1].write_bytes(b"no tar" * 1000)
    with webdataset.TarWriter(str(paths[2]), encoder=False) as tar:
        tar.write({"__key__": "2-0", "mp4": b"no video", "json": b"{}"})
        tar.write({"__key__": "2-1", "txt": b"no media"})
        tar.write({"__key__": "2-2", "mp4": b"x", "json": b"[no json"})
    paths[3].write_bytes(whole[3])
    return tmp_path


@pytest.mark.parametrize("workers, isolate", [(0, False), (2, True)])
def test_damage_is_skipped_and_counted(damaged, workers, isolate):
    got = read(stream_config(str(damaged), max_decode_error_rate=1.0), 30, workers=workers, isolate=isolate)
    reasons = Counter(failure.reason for batch in got for failure in batch.failures)
    assert {"shard_damaged", "no_media", "bad_metadata"} < set(reasons) and len(reasons) == 4
    assert {key.rpartition("/")[2] for b in got for key, why in b.failures if why == "shard_damaged"} == {
        "part-000.tar",
        "part-001.tar",
    }
    assert {f"3-{i}" for i in range(SAMPLES)} <= set(keys(got)) <= KEYS - {f"2-{i}" for i in range(SAMPLES)}


def test_failures_are_held_to_the_limit(damaged):
    with pytest.raises(UserError, match=r"could not be decoded .*over data\.max_decode_error_rate 0\.1"):
        read(stream_config(str(damaged), max_decode_error_rate=0.1), 100)


def test_missing_shards(pattern, tmp_path):
    gone = str(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"gone\.tar: no such shard \(1 of 5 are missing\)"):
        read(stream_config(pattern, gone))
    got = read(stream_config(pattern, gone, on_missing="skip", max_decode_error_rate=1.0), 12)
    assert set(keys(got)) == KEYS
    assert {f for batch in got for f in batch.failures} == {(gone, "shard_missing")}
    for train, message in (
        (gone, "no sample can be read from this shard or the 0 others"),
        (str(tmp_path / "gone-{00..40}.tar"), "21 shards in a row could not be read"),
    ):
        with pytest.raises(UserError, match=message):
            read(stream_config(train, on_missing="skip", max_decode_error_rate=1.0))
    with pytest.raises(UserError, match=r"none\.tar: cannot be opened: .*data\.on_missing=skip"):
        read(stream_config("memory://none.tar"))
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"no sample"):
        read(stream_config(str(tmp_path / "empty.tar"), max_decode_error_rate=1.0))


# --- what needs an index ---


def test_options_that_need_an_index_are_refused(pattern):
    extra = (ExtraStream([pattern], frames=1, clips=4, stride=1),)
    for settings, name in (
        ({"weights": (1.0,)}, r"data\.weights"),
        ({"repeat": 2}, r"data\.repeat"),
        ({"extra_streams": extra}, r"data\.extra_streams"),
        ({"cache": "host"}, r"data\.cache"),
    ):
        with pytest.raises(UserError, match=rf"stream cannot serve {name}: it needs an index; run .*scan"):
            stream_config(pattern, **settings)

"""vidssl/data/timing.py: the frames of clips whose distance is drawn, in all readers."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from training_clips import make_clips

from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.data.augment import CropPair
from vidssl.data.clip_length import look_at, short_line
from vidssl.data.dataset import TrainClips
from vidssl.data.device_augment import collate_planes
from vidssl.data.device_cache import CachedClip, collate_cached
from vidssl.data.sampling import sample_indices
from vidssl.data.schema import DataConfig, ExtraStream
from vidssl.data.shards import Shards
from vidssl.data.stream import ClipDecoder
from vidssl.data.timing import Timing, choose_frames, draw_timing, middle_rate


@dataclass(frozen=True)
class DataSection:
    data: DataConfig


def pairs(**options) -> DataConfig:
    return DataConfig(**{"train": ["x"], "frames": 2, "stride": (4, 48), **options})


def timings(clip: DataConfig, n: int) -> list[Timing]:
    rng = np.random.default_rng(0)
    return [draw_timing(clip, rng) for _ in range(n)]


@pytest.mark.parametrize(
    "frames, n, low, high", [(2, 300, 4, 48), (2, 20, 4, 19), (2, 4, 3, 3), (2, 1, 0, 0)]
)
def test_gaps_are_uniform_in_what_the_video_allows(frames, n, low, high):
    times = np.arange(n) / 30
    clip = pairs(frames=frames)
    chosen = np.stack([choose_frames(times, clip, t) for t in timings(clip, 4000)])
    gaps, counts = np.unique(chosen[:, 1] - chosen[:, 0], return_counts=True)
    assert gaps.tolist() == list(range(low, high + 1))
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.5 * counts.mean()
    assert chosen.min() == 0 and chosen.max() == n - 1  # starts are spread over all that fit


def test_rates_are_uniform_in_what_the_video_allows():
    times = np.arange(61) / 30  # 2 s
    clip = pairs(frames=3, stride=None, fps=(0.5, 5.0))  # 3 frames at 1 a second take 2 s
    spans = [np.ptp(choose_frames(times, clip, t)) for t in timings(clip, 300)]
    assert max(spans) == 60 and min(spans) == pytest.approx(2 * 30 / 5, abs=1)
    slow = pairs(frames=3, stride=None, fps=(0.1, 0.5))
    assert all(np.ptp(choose_frames(times, slow, t)) == 60 for t in timings(slow, 20))


def test_one_stride_draws_one_number_and_a_range_two():
    rng, same = np.random.default_rng(1), np.random.default_rng(1)
    one = pairs(stride=4)
    assert draw_timing(one, rng) == ((same.uniform(),), 0.0)
    times = np.arange(50) / 30
    chosen = choose_frames(times, one, Timing((0.3,)))
    assert (chosen == sample_indices(times, 2, stride=4, start=0.3)).all()
    assert draw_timing(pairs(windows=2), rng) == ((same.uniform(), same.uniform()), same.uniform())


def test_windows_are_clips_at_independent_places():
    times = np.arange(100) / 25
    clip = pairs(frames=4, stride=(1, 5), windows=3)
    firsts = []
    for timing in timings(clip, 200):
        chosen = choose_frames(times, clip, timing).reshape(3, 4)
        single = [
            choose_frames(times, replace(clip, windows=1), Timing((s,), timing.pace)) for s in timing.starts
        ]
        assert (chosen == single).all()
        firsts.append(chosen[:, 0] / (99 - np.ptp(chosen[0])))
    assert np.abs(np.corrcoef(np.transpose(firsts)) - np.eye(3)).max() < 0.2
    assert np.quantile(firsts, [0.25, 0.75]) == pytest.approx([0.25, 0.75], abs=0.06)


def test_a_range_and_the_published_rule_do_not_go_together():
    with pytest.raises(UserError, match=r"^data\.rule vjepa: .* not a range; use rule exact$"):
        pairs(rule="vjepa")
    with pytest.raises(UserError, match=r"^data\.extra_streams\.rule"):
        ExtraStream(["x"], frames=2, clips=8, fps=(1.0, 2.0), rule="vjepa")


@pytest.mark.parametrize(
    "stride, message",
    [
        (
            "[48,4]",
            "stride=[48,4]': value error, the first must not be larger than the second, not [48, 4] (",
        ),
        ("[0,4]", "stride=[0,4]'[0]: input should be greater than or equal to 1, not 0 ("),
        ("x", "stride=x': input should be a valid integer, not 'x' ("),
    ],
)
def test_a_wrong_range_is_one_line(stride, message):
    with pytest.raises(UserError) as e:
        load_config([f"data.stride={stride}", "data.frames=2", "data.train=x"], DataSection)
    assert message in str(e.value)


def as_video(clip) -> torch.Tensor:
    if isinstance(clip, torch.Tensor):
        return clip
    collate_one = collate_cached if isinstance(clip, CachedClip) else collate_planes
    return collate_one([clip]).to(torch.device("cpu"))[0]


def gap(clips: TrainClips, position: int, monkeypatch) -> int:
    chosen = []
    monkeypatch.setattr(
        "vidssl.data.dataset.choose_frames", lambda *a: chosen.append(choose_frames(*a)) or chosen[-1]
    )
    clips.try_position(position, 0)
    monkeypatch.undo()
    place = position // clips.order.lanes % clips.data.repeat
    return int(np.ptp(chosen[place]))


def test_readers_caches_and_repeats_show_the_same_pairs(synthetic_shards, monkeypatch):
    """Of videos of 24 frames: frames 4 to 23 apart, then two crops of one frame, then two windows."""
    folder = synthetic_shards / "train"
    settings = {"frames": 2, "stride": (4, 48), "repeat": 2}
    plain = make_clips(folder, **settings)
    gaps = [gap(plain, p, monkeypatch) for p in range(40)]
    assert min(gaps) >= 4 and max(gaps) <= 23 and len(set(gaps)) > 10
    others = {cache: make_clips(folder, cache=cache, **settings) for cache in ("host", "device")}
    others["planes"] = make_clips(folder, augment_on="device", **settings)
    for augment, windows in ((plain.augment, 1), (CropPair(32, flip=0.5), 1), (plain.augment, 2)):
        for clips in (plain, *others.values()):
            clips.augment = augment
            clips.data = replace(clips.data, windows=windows)
            clips._last_decoded = None, ()
        for name, clips in others.items():
            for p in range(6):
                made = as_video(clips[p].video).float()
                want = plain[p].video.float()
                assert want.shape == (3, 2 * windows, 32, 32) and not want[:, 0].equal(want[:, 1])
                assert (made - want).abs().mean() <= {"host": 0, "device": 0.5, "planes": 2}[name]
    single = make_clips(folder, **(settings | {"repeat": 1}))
    for augment in (single.augment, CropPair(32)):
        single.augment = augment
        decoder = ClipDecoder(single.data, augment, single.order.seed)
        for p in range(3):
            sample = single.sample_at(p, 0)
            meta = json.dumps(sample.meta).encode()
            job = {"__key__": sample.key, sample.ext: single.shards.read(sample), "json": meta}
            assert decoder.try_position((p, job)).video.equal(single[p].video)


def test_videos_below_the_lowest_stride_are_said(tmp_path, write_index):
    metas = [{"frames": n, "fps": 10.0, "duration": n / 10, "height": 4, "width": 4} for n in (3, 5, 30)]
    shards = Shards([str(write_index(tmp_path / "a", "mp4", metas, {}))])
    clip = pairs()
    line = "data: 1 of 3 videos are shorter than a clip (data.stride 4 x 2 frames): "
    assert short_line("data", clip, look_at(shards, clip)) == line + "its frames are closer together"
    clip = pairs(stride=None, fps=(1.0, 2.0))
    assert "(2 frames at 2 a second): its frames" in short_line("data", clip, look_at(shards, clip))


def test_evaluation_takes_the_middle_of_a_range():
    assert middle_rate([4, 48], None) == (26, None) and middle_rate(None, (4.0, 9.0)) == (None, 6.5)
    assert middle_rate(4, None) == (4, None)

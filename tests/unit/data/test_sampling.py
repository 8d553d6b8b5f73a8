"""vidssl/data/sampling.py and decoding/: the choice of frames, and that decoders return these frames."""

import gc
import io
import itertools
from collections.abc import Iterator

import decord
import numpy as np
import pytest
from av.container import InputContainer
from limits import set_limit
from PIL import Image

from data_prep.inspect_file import inspect_file
from vidssl.core.errors import DecodeError
from vidssl.data.decoding import open_video
from vidssl.data.decoding.video_stream import VideoStream
from vidssl.data.sampling import sample_indices, segment_starts, split_repeat


def draws(n: int) -> Iterator[tuple[np.random.Generator, np.ndarray, int, float]]:
    """n times: a generator, times f64 [1..61] with gaps of 1 to 200 ms, number of frames, start in [0,1]."""
    for seed in range(n):
        rng = np.random.default_rng(seed)
        gaps = rng.uniform(0.001, 0.2, rng.integers(61))
        if seed % 2:  # evenly spaced
            gaps[:] = rng.uniform(0.01, 0.1)
        start = rng.choice([0.0, 1.0, rng.uniform(), rng.uniform()])
        yield rng, np.cumsum([0.0, *gaps]), int(rng.integers(1, 21)), float(start)


def packed_meta(data: bytes, ext: str = "mp4", decoder: str = "auto") -> dict:
    return list(inspect_file(data, ext, decoder))[-1]


def test_stride():
    for rng, times, frames, start in draws(400):
        stride = int(rng.integers(1, 6))
        got = sample_indices(times, frames, stride=stride, start=start)
        assert got.dtype == np.int64 and got.shape == (frames,)
        assert (np.diff(got) >= 0).all() and got[0] >= 0 and got[-1] < len(times)
        if (frames - 1) * stride < len(times):
            assert (np.diff(got) == stride).all()
            assert sample_indices(times, frames, stride=stride, start=0.0)[0] == 0
            assert sample_indices(times, frames, stride=stride, start=1.0)[-1] == len(times) - 1
        else:
            assert (got == np.minimum(np.arange(frames) * stride, len(times) - 1)).all()


def test_fps_takes_the_nearest_frames():
    for rng, times, frames, start in draws(400):
        fps = rng.uniform(0.5, 60)
        got = sample_indices(times, frames, fps=fps, start=start)
        assert got.dtype == np.int64 and got.shape == (frames,)
        assert (np.diff(got) >= 0).all() and got[0] >= 0 and got[-1] < len(times)
        want = times[got[0]] + np.arange(frames) / fps
        nearest = np.abs(times[None, :] - want[:, None]).min(axis=1)
        assert (np.abs(times[got] - want) <= nearest + 2e-6).all()


def test_every_start_is_equally_likely():
    starts = [
        sample_indices(np.arange(10) / 25, 4, stride=2, start=s)[0]
        for s in np.linspace(0, 1, 4000, endpoint=False)
    ]
    assert np.bincount(starts).tolist() == [1000] * 4


def test_the_own_rate_gives_consecutive_frames_despite_rounded_times():
    times = np.round(np.arange(90) / 30, 3)  # milliseconds, as Matroska stores them
    for start in np.linspace(0, 1, 37):
        assert (np.diff(sample_indices(times, 16, fps=30, start=start)) == 1).all()
        assert (np.diff(sample_indices(times, 16, fps=15, start=start)) == 2).all()


def test_midway_between_two_frames_takes_the_earlier():
    for start in np.linspace(0, 1, 37):
        got = sample_indices(np.arange(90) / 30, 16, fps=60, start=start)
        assert (got - got[0] == np.arange(16) // 2).all()


def test_one_frame_and_bad_arguments():
    assert sample_indices(np.zeros(1), 5, stride=3, start=0.7).tolist() == [0] * 5
    assert sample_indices(np.zeros(1), 5, fps=4, start=0.7).tolist() == [0] * 5
    for bad in ({}, {"stride": 1, "fps": 1}, {"stride": 1, "start": 1.1}):
        with pytest.raises(ValueError, match=r"\S"):
            sample_indices(np.zeros(1), 5, **bad)
    assert segment_starts(1) == [0.5] and segment_starts(3) == [0, 0.5, 1]


# 0, 64/15, 128/15 ... 64, rounded down and the last one clipped
EVERY_4_27 = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
# 15 points, 63/14 = 4.5 apart
EVERY_4_5 = [0, 4, 9, 13, 18, 22, 27, 31, 36, 40, 45, 49, 54, 58, 62, 62]


@pytest.mark.parametrize(
    "n, start, want",
    [
        (100, 0.0, EVERY_4_27),
        (100, 1.0, [35 + i for i in EVERY_4_27]),  # the window ends before the last frame, 99
        (100, 0.5, [18 + i for i in EVERY_4_27]),
        (65, 1.0, EVERY_4_27),  # one position only
        (64, 1.0, EVERY_4_27),  # not longer than the window: 64 // 4 = 16 points over all of it
        (63, 0.3, EVERY_4_5),
        (20, 0.3, [0, 5, 10, 15] + [19] * 12),
        (8, 0.3, [0] + [7] * 15),
        (4, 0.3, [0] + [3] * 15),
        (3, 0.3, [2] * 16),
        (1, 0.3, [0] * 16),
    ],
)
def test_vjepa_rule_by_stride(n, start, want):
    got = sample_indices(np.arange(n) / 25, 16, stride=4, start=start, rule="vjepa")
    assert got.dtype == np.int64 and got.tolist() == want


def test_vjepa_rule_every_start_is_equally_likely():
    starts = [
        sample_indices(np.arange(12) / 25, 4, stride=2, start=s, rule="vjepa")[0]
        for s in np.linspace(0, 1, 4000, endpoint=False)
    ]
    # 4 of the 5 windows of 8 frames: not the one with the last frame
    assert np.bincount(starts).tolist() == [1000] * 4


@pytest.mark.parametrize(
    "rate, fps, stride",
    [
        (30, 4, 7),
        (30000 / 1001, 4, 7),
        (24, 4, 6),
        (24000 / 1001, 4, 6),
        (25, 4, 6),
        (60, 4, 15),
        (7, 4, 1),
        (2, 4, 1),
    ],
)
def test_vjepa_rule_by_rate_is_an_integer_stride(rate, fps, stride):
    exact = np.arange(300) / rate
    for times in (exact, np.round(exact, 3)):  # Matroska stores milliseconds
        got = sample_indices(times, 16, fps=fps, start=0.6, rule="vjepa")
        assert (got == sample_indices(times, 16, stride=stride, start=0.6, rule="vjepa")).all()
    assert sample_indices(np.zeros(1), 16, fps=fps, start=0.6, rule="vjepa").tolist() == [0] * 16


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2", "g": "8"}, {"bf": "3", "g": "250"}], ids=str)
def test_get_returns_the_requested_frames(make_video, frame_index, decoder, options):
    data = make_video(**options)
    for meta in (None, {**packed_meta(data), "decoder": decoder}):
        video = open_video(data, "mp4", meta, decoder)
        assert (video.decoder, len(video), video.size) == (decoder, 20, (48, 64))
        assert np.allclose(video.times, np.arange(20) / 10, atol=1e-4) and video.times.dtype == np.float64
        order = [*range(20), *range(19, -1, -1), 5, 5, 17, 3]
        assert [frame_index(video.get([i])[0]) for i in order] == order
        together = video.get([7, 3, 3, 19, 0])
        assert together.dtype == np.uint8 and together.shape == (5, 48, 64, 3)
        assert [frame_index(f) for f in together] == [7, 3, 3, 19, 0]
        assert (video.get(np.arange(20)) == np.stack([video.get([i])[0] for i in range(20)])).all()
        for bad in ([20], [-1], []):
            with pytest.raises(IndexError):
                video.get(bad)


def test_a_seek_that_misses_falls_back_to_counting(make_video, frame_index):
    data = make_video()
    video = open_video(data, "mp4", packed_meta(data, "mp4", "pyav"))
    assert video._pts is not None  # it seeks
    video._pts[10] += 1  # no frame has this stamp
    assert [frame_index(f) for f in video.get([9, 10, 12])] == [9, 10, 12]
    assert [frame_index(f) for f in video.get([10])] == [10]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_variable_frame_rate(make_video, frame_index, decoder):
    stamps = [0, 100, 130, 500, 510, 900]
    video = open_video(make_video(6, times=stamps), "mp4", None, decoder)
    assert np.allclose(video.times, np.array(stamps) / 1000, atol=1e-4)
    picked = sample_indices(video.times, 4, fps=4)  # 0, 0.25, 0.5, 0.75 s
    assert picked.tolist() == [0, 2, 3, 5]
    assert [frame_index(f) for f in video.get(picked)] == picked.tolist()


def test_packed_b_frames_in_avi(make_video, frame_index):
    """Packets that hold two frames, or none: the container's count is not the number of frames."""
    data = make_video(codec="mpeg4", container="avi", bf="2", qscale="2")
    meta = packed_meta(data, "avi")
    video = open_video(data, "avi", meta)
    assert [frame_index(video.get([i])[0]) for i in (12, 3, 19, 0)] == [12, 3, 19, 0]


@pytest.mark.parametrize("rotation, hflip", list(itertools.product((0, 90, 180, 270), (False, True))))
def test_rotation_and_mirroring_as_players_display_them(make_video, frame_index, rotation, hflip):
    data = make_video(4, rotation=rotation, hflip=hflip)
    meta = packed_meta(data)
    stored = np.zeros((48, 64))
    stored[:12, :16] = 1
    shown = np.rot90(stored, -rotation // 90)
    want = shown[:, ::-1] if hflip else shown  # FFmpeg's av_display_matrix_flip: mirrored after the rotation
    for decoder in ("auto", "pyav"):
        for video in (open_video(data, "mp4", meta, decoder), open_video(data, "mp4", None, decoder)):
            frame = video.get([2])[0]
            assert video.size == frame.shape[:2] == want.shape
            assert frame_index(frame) == 2
            assert ((frame.mean(-1) > 200) == want).mean() > 0.97  # the position of the white corner
    if hflip:
        assert meta["decoder"] == "pyav"  # decord rotates but does not mirror
    else:
        assert meta["rotation"] == rotation


@pytest.mark.parametrize("container", ["mp4", "matroska", "flv"])
def test_the_first_frame_is_at_zero_seconds_whatever_its_time_stamp(make_video, container):
    times = np.arange(20) * 40 + np.arange(20) % 3 * 5  # milliseconds
    data = make_video(20, times=(700 + times).tolist(), container=container, bf="0")
    meta = packed_meta(data) | {"decord": True}
    for decoder in ("pyav", "decord"):
        for known in (None, meta, meta | {"decoder": "decord"}):
            with open_video(data, "mp4", known, decoder) as video:
                assert video.times[0] == 0.0
                assert np.abs(video.times - times / 1000).max() < 2e-3


@pytest.mark.parametrize("first", [-5000.0, 900.0])
def test_a_wrong_first_time_stamp_moves_no_other_frame(monkeypatch, make_video, first):
    """first: seconds of the first frame as a decoder gives it, beside others at 0.1 s, 0.2 s, ..."""
    data = make_video(20, times=list(range(0, 2000, 100)))
    stamps = np.arange(20.0) / 10
    stamps[0] = first
    stream = VideoStream(io.BytesIO(data))
    start, times, repairs = stream.frame_times(np.round(stamps / stream.time_base).astype(int).tolist())
    assert (
        np.abs(times - np.arange(20) / 10).max() < 1e-3 and abs(start) < 1e-3 and sum(repairs.values()) == 1
    )
    monkeypatch.setattr(
        decord.VideoReader, "get_frame_timestamp", lambda self, indices: np.stack([stamps, stamps], 1)
    )
    with open_video(data, "mp4", None, "decord") as video:
        assert np.abs(video.times - times).max() < 1e-3


def test_short_and_single_frame(make_video):
    assert len(open_video(make_video(2), "mp4")) == 2
    video = open_video(make_video(1), "MP4")
    assert video.times.tolist() == [0.0] and video.get([0, 0]).shape == (2, 48, 64, 3)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp"])
def test_images(make_image, kind):
    video = open_video(make_image(kind), kind)
    assert (len(video), video.size, video.decoder) == (1, (48, 64), "image")
    frames = video.get([0, 0, 0])
    assert (
        frames.shape == (3, 48, 64, 3)
        and abs(int(frames[0, 40, 40, 0]) - 100) < 3
        and frames[0, 3, 3, 0] > 250
    )


def test_image_orientation_alpha_and_sixteen_bits(make_image):
    rotated = open_video(
        make_image("jpeg", orientation=6), "jpg"
    )  # 6: displayed rotated clockwise by 90 degrees
    assert rotated.size == (64, 48) and rotated.get([0])[0, 3, 44, 0] > 240
    out = io.BytesIO()
    Image.new("RGBA", (8, 6), (10, 20, 30, 0)).save(out, "png")
    assert open_video(out.getvalue(), "png").get([0])[0, 0, 0].tolist() == [10, 20, 30]
    out = io.BytesIO()
    Image.fromarray(np.full((6, 8), 0x8000, np.uint16)).save(out, "png")
    assert open_video(out.getvalue(), "png").get([0])[0, 0, 0].tolist() == [128] * 3


def test_animated_gif_is_a_video():
    out = io.BytesIO()
    pictures = [Image.new("L", (16, 12), 60 * i) for i in range(4)]
    pictures[0].save(out, "gif", save_all=True, append_images=pictures[1:], duration=100)
    video = open_video(out.getvalue(), "gif")
    assert len(video) == 4 and video.get([3, 1])[:, 0, 0, 0].tolist() == [180, 60]


def test_a_partly_damaged_file_returns_the_frames_that_decode(make_video, frame_index):
    whole = make_video(codec="mpeg4", container="matroska", bf="0")
    data = whole[: int(len(whole) * 0.6)]
    meta = packed_meta(data, "mkv", "pyav")
    assert 0 < meta["frames"] < 20
    video = open_video(data, "mkv", meta)
    assert [frame_index(f) for f in video.get(range(meta["frames"]))] == list(range(meta["frames"]))


def test_closed_and_failed_videos_leave_no_container(make_video):
    def containers() -> int:
        return sum(type(o) is InputContainer for o in gc.get_objects())

    data = make_video()
    gc.collect()
    before = containers()
    for _ in range(5):
        with open_video(data, "mp4") as video:
            video.get([3, 7])
        with pytest.raises(DecodeError):
            open_video(data[: len(data) // 2], "mp4", {**packed_meta(data), "decoder": "pyav"}).get([19])
    gc.collect(1)
    assert containers() == before


@pytest.mark.parametrize(
    "data, ext, reason",
    [
        (b"", "mp4", "empty"),
        (b"", "png", "empty"),
        (b"not a video at all " * 99, "mp4", "not_a_video"),
        (b"not a picture " * 99, "png", "not_an_image"),
    ],
)
def test_reasons_of_decode_errors(data, ext, reason):
    with pytest.raises(DecodeError) as e:
        open_video(data, ext)
    assert e.value.reason == reason


def test_damaged_pictures_and_too_large_frames(make_image, make_video, monkeypatch):
    for kind in ("jpeg", "png"):
        with pytest.raises(DecodeError) as e:
            open_video(make_image(kind)[:150], kind)
        assert e.value.reason in ("decode_error", "not_an_image")
    set_limit(monkeypatch, "MAX_PIXELS", 1000)
    for data, ext in ((make_image("png"), "png"), (make_video(2), "mp4")):
        with pytest.raises(DecodeError) as e:
            open_video(data, ext)
        assert e.value.reason == "too_large"


def test_meta_of_another_file(make_video):
    data = make_video()
    with pytest.raises(DecodeError, match="decord counts 20 frames, packed were 19"):
        open_video(data, "mp4", {**packed_meta(data), "frames": 19, "decoder": "decord"})
    assert len(open_video(data, "mp4", {**packed_meta(data), "frames": 19, "decoder": "pyav"})) == 20
    assert len(open_video(data, "mp4", {"label": 3})) == 20  # meta written by others
    with pytest.raises(ValueError, match="expected auto, decord or pyav"):
        open_video(data, "mp4", None, "opencv")


@pytest.mark.parametrize("repeat, lanes, batch", [(1, 4, 8), (2, 4, 8), (4, 1, 8), (4, 8, 64), (3, 2, 12)])
def test_repeats_share_lane_and_batch(repeat, lanes, batch):
    samples = 5 * lanes * batch
    epochs = 2
    seen = [split_repeat(g, repeat, lanes) for g in range(epochs * samples * repeat)]
    assert sorted(seen) == [(p, c) for p in range(epochs * samples) for c in range(repeat)]
    assert all(p % lanes == g % lanes for g, (p, _) in enumerate(seen))  # so one process has all repeats
    for i in range(0, len(seen), batch):
        ps = [p for p, _ in seen[i : i + batch]]
        assert len(set(ps)) == batch // repeat and all(ps.count(p) == repeat for p in ps)
    one_epoch = [p % samples for p, _ in seen[: samples * repeat]]
    assert (np.bincount(one_epoch) == repeat).all()


def test_several_clips_of_one_open_video(make_video, frame_index):
    video = open_video(make_video(), "mp4")
    picked = np.stack([sample_indices(video.times, 4, stride=3, start=s) for s in (0.9, 0.0, 0.4)])
    together = video.get(picked.reshape(-1))
    assert [frame_index(f) for f in together] == picked.reshape(-1).tolist()

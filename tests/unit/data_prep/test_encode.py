"""data_prep.encode, filters and report: frames and times, key frames, sizes, segments, windows, scenes."""

import io
import json
import os
import signal
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from packed_files import file_hashes, read_records
from PIL import Image
from signal_at import signalled

from data_prep import pack
from data_prep.encode import EncodedSample, encode_clips
from data_prep.filters import NO_FILTERS, Filters, Rejected
from data_prep.index import read_lines, sample_key
from data_prep.inspect_file import FileInspector
from data_prep.reader import even_size
from data_prep.recipe import Recipe
from data_prep.thumbnails import block_means, thumbnail
from vidssl.core.errors import UserError
from vidssl.data.decoding import open_video
from vidssl.data.decoding.pyav import PyAVVideo
from vidssl.data.decoding.video_stream import VideoStream
from vidssl.data.format import read_index
from vidssl.report.data_sets import find_sets

ROOT = Path(__file__).parents[3]
WHOLE = ((None, None),)


def encode(data: bytes, spans=WHOLE, filters=NO_FILTERS, **recipe) -> list:
    return encode_clips(io.BytesIO(data), spans, Recipe(**recipe), filters, lambda: None)


def textured(
    frames: int, size: tuple[int, int] = (96, 160), rate: int = 30, cut_at: int = 10**9, **tags
) -> bytes:
    """A video of moving coloured waves; from frame `cut_at` on, of brighter ones."""
    y, x = np.mgrid[: size[0], : size[1]] / 12
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as box:
        stream = box.add_stream("libx264", rate=rate, options={"crf": "6", "bf": "2", "g": "250"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for k, v in tags.items():
            setattr(stream.codec_context, k, v)
        for i in range(frames):
            a, b = (20, 40) if i < cut_at else (140, 50)
            waves = [np.sin(x + i / 5) + 1, np.sin(y + x / 2 - i / 9) + 1, np.cos(y - i / 7) + 1]
            picture = (a + b * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=tags.get("colorspace"),
                dst_color_range=tags.get("color_range", 1),
            )
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return out.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def packets(data: bytes) -> list[tuple[bool, float]]:
    with av.open(io.BytesIO(data)) as box:
        return [(p.is_keyframe, float(p.pts * p.time_base)) for p in box.demux(video=0) if p.pts is not None]


@pytest.mark.parametrize("short_side, size", [(None, (96, 160)), (64, (64, 106)), (500, (96, 160))])
def test_frames_match_the_source_at_their_times(short_side, size):
    source = textured(60)
    [clip] = encode(source, short_side=short_side, fps="8", keyframe_every=4, crf=12)
    assert clip.meta["decoder"] == "pyav" and (clip.meta["height"], clip.meta["width"]) == size
    assert (clip.meta["frames"], clip.meta["fps"], clip.meta["duration"]) == (16, 8.0, 2.0)
    truth = PyAVVideo(source)
    shown = [int(np.searchsorted(truth.times, i / 8 + 1e-3, "right")) - 1 for i in range(16)]
    want = [
        np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.BICUBIC)) for f in truth.get(shown)
    ]
    for name in ("decord", "pyav"):
        video = open_video(clip.data, "mp4", {**clip.meta, "decord": True}, name)
        assert np.abs(video.times - np.arange(16) / 8).max() < 1e-4
        got = video.get(np.arange(16))
        assert min(psnr(g, w) for g, w in zip(got, want, strict=True)) > 33
        assert all(psnr(got[i], want[i]) > psnr(got[i], want[i - 1]) + 3 for i in range(1, 16))
    assert clip.meta["original"] == {"codec": "h264", "fps": 30.0, "height": 96, "width": 160, "rotation": 0}


def test_stream_properties():
    [clip] = encode(textured(50), fps="10", keyframe_every=5)
    assert [k for k, _ in packets(clip.data)] == [i % 5 == 0 for i in range(17)]
    with av.open(io.BytesIO(clip.data)) as box:
        assert [s.type for s in box.streams] == ["video"] and box.streams.video[
            0
        ].codec_context.pix_fmt == "yuv420p"
        assert not box.streams.video[0].codec_context.has_b_frames
        assert {f.pict_type for f in box.decode(video=0)} == {
            av.video.frame.PictureType.I,
            av.video.frame.PictureType.P,
        }
    assert 0 < clip.data.find(b"moov") < clip.data.find(b"mdat")
    for start in (5, 10):  # closed groups: frames after a key frame decode without those before it
        whole = PyAVVideo(clip.data, clip.meta).get([start, start + 4])
        with av.open(io.BytesIO(clip.data)) as box:
            box.seek(round(start / 10 / box.streams.video[0].time_base), stream=box.streams.video[0])
            alone = [f.to_ndarray(format="rgb24") for f in box.decode(video=0)]
        assert (alone[0] == whole[0]).all() and (alone[4] == whole[1]).all()


@pytest.mark.parametrize("recipe", [{"fps": "10"}, {}])
def test_clips_open_quickly_with_the_same_frames(recipe, make_video, monkeypatch):
    """Neither frames nor packets are needed to find times, and no packet after those of the frames."""
    [clip] = encode(make_video(20), keyframe_every=5, **recipe)
    stream = VideoStream(io.BytesIO(clip.data))
    stamps = stream.packet_pts()
    stream.rewind()
    frames = [frame.to_ndarray(format="rgb24") for frame in stream.decode()]
    packets = []
    frames_of = VideoStream._frames_of
    monkeypatch.setattr(VideoStream, "rewind", lambda _: pytest.fail("read from the start"))
    monkeypatch.setattr(VideoStream, "_frames_of", lambda self, p: packets.append(p) or frames_of(self, p))
    video = PyAVVideo(clip.data, clip.meta)
    assert video._pts == stamps and len(video) == len(frames)
    assert not packets
    for wanted in ([7], [19], [6, 8, 12]):
        assert (video.get(wanted) == np.stack([frames[i] for i in wanted])).all()
        assert len([p for p in packets if p is not None]) <= 1 + wanted[-1] - wanted[0] // 5 * 5
        packets.clear()


def test_nothing_is_decoded_after_the_packets_of_the_wanted_frames(make_video, frame_index, monkeypatch):
    """Frames that B-frames delay are taken from the decoder."""
    data = make_video(20)
    video = PyAVVideo(data, {"frames": 20, "height": 48, "width": 64, "fps": 10, "decoder": "pyav"})
    sent = []
    frames_of = VideoStream._frames_of
    monkeypatch.setattr(VideoStream, "_frames_of", lambda self, p: sent.append(p) or frames_of(self, p))
    for wanted in ([0], [2], [3, 5], [17, 19], list(range(20))):
        assert [frame_index(frame) for frame in video.get(wanted)] == wanted
        last = [packet.pts for packet in sent if packet is not None and packet.pts is not None][-1]
        assert last in [video._pts[i] for i in wanted]
        sent.clear()


def test_a_changed_clip_is_measured_anew(make_video, frame_index):
    """What pack recorded of another file does not hold: a clip with B-frames, of another length."""
    [clip] = encode(make_video(20), keyframe_every=5)
    video = PyAVVideo(make_video(12), clip.meta)
    assert [frame_index(f) for f in video.get(np.arange(12))] == list(range(12)) and len(video) == 12


def test_clips_are_cheap_to_decode():
    [clip] = encode(textured(20))
    assert b"cabac=0" in clip.data  # the options that x264 writes into its stream


def test_frames_keep_their_times_without_fps(make_video, frame_index):
    times = [0, 100, 130, 500, 510, 900]
    [clip] = encode(make_video(6, times=times))
    video = open_video(clip.data, "mp4", clip.meta)
    assert np.abs(video.times * 1000 - times).max() < 0.1 and clip.meta["frames"] == 6
    assert [frame_index(f) for f in video.get(np.arange(6))] == list(range(6))


def test_variable_rate_becomes_constant(make_video, frame_index):
    [clip] = encode(make_video(6, times=[0, 100, 130, 500, 510, 900]), fps="20")
    got = [
        frame_index(f) for f in open_video(clip.data, "mp4", clip.meta).get(np.arange(clip.meta["frames"]))
    ]
    assert got[:19] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4, 4, 5]
    assert set(got[19:]) == {5} and clip.meta["frames"] == round(20 * 0.9 * 6 / 5)  # the last is shown 0.18 s


@pytest.mark.parametrize("missing", [True, False])
def test_unusable_time_stamps(missing, make_video, frame_index, monkeypatch):
    from data_prep import reader

    def broken(self):
        for i, frame in enumerate(whole(self)):
            frame.pts = None if missing else 1000 * (i % 3)
            yield frame

    whole = reader.Reader.decode
    monkeypatch.setattr(reader.Reader, "decode", broken)
    [clip] = encode(make_video(12), fps="5")
    assert [frame_index(f) for f in PyAVVideo(clip.data).get(np.arange(6))] == [0, 2, 4, 6, 8, 10]
    assert clip.meta["frames"] == 6


@pytest.mark.parametrize("way, corner", [({"rotation": 90}, (0, -1)), ({"rotation": 180}, (-1, -1)),
                                         ({"rotation": 270}, (-1, 0)),
                                         ({"hflip": True}, (0, -1))])  # fmt: skip
def test_rotated_videos(way, corner, make_video):
    [clip] = encode(make_video(3, size=(48, 80), **way), short_side=24)
    frame = PyAVVideo(clip.data).get([0])[0]
    assert frame.shape[:2] == ((40, 24) if way.get("rotation") in (90, 270) else (24, 40))
    corners = {(i, j): frame[i, j].mean() for i in (0, -1) for j in (0, -1)}
    assert max(corners, key=corners.get) == corner and corners[corner] > 200
    assert clip.meta["rotation"] == 0 and PyAVVideo(clip.data).rotation == 0


@pytest.mark.parametrize("shown, short, want", [((240, 320), 256, (240, 320)), ((360, 640), 256, (256, 456)),
    ((219, 127), None, (218, 126)), ((219, 127), 126, (218, 126)), ((1, 9), 256, (2, 8)),
    ((640, 360), 255, (454, 256)), ((1080, 1920), 224, (224, 398))])  # fmt: skip
def test_even_size(shown, short, want):
    assert even_size(shown, short) == want


@pytest.mark.parametrize("tags", [{}, {"colorspace": 1, "color_primaries": 1, "color_trc": 1},
                                  {"color_range": 2},
                                  {"colorspace": 5, "color_range": 1}], ids=str)  # fmt: skip
def test_colours_are_kept(tags):
    source = textured(4, size=(128, 128), **tags)
    [clip] = encode(source, crf=8)
    want = PyAVVideo(source).get([3])[0]
    got = PyAVVideo(clip.data).get([3])[0]
    assert psnr(got, want) > 36 and np.abs(got.mean((0, 1)) - want.mean((0, 1))).max() < 1.5


def test_segments_are_frame_exact(make_video, frame_index):
    data = make_video(20)  # 10 frames a second
    spans = ((0.5, 1.2), (None, 0.3), (1.6, None), (0.55, 0.95), (1.0, 1.5), (3.0, 4.0), (0.41, 0.44))
    *clips, outside, between = encode(data, spans)
    got = [[frame_index(f) for f in PyAVVideo(c.data).get(np.arange(c.meta["frames"]))] for c in clips]
    assert got == [[5, 6, 7, 8, 9, 10, 11], [0, 1, 2], [16, 17, 18, 19], [6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert [(c.item, c.start, c.end) for c in clips] == [(i, *s) for i, s in enumerate(spans[:5])]
    assert (outside.reason, outside.value, outside.start, outside.item) == ("outside", 2.0, 3.0, 5)
    assert (between.reason, between.start, between.item) == ("no_frames", 0.41, 6)
    slow = encode(data, ((0.5, 1.3),), fps="5")[0]  # frames shown at 0.5, 0.7, 0.9, 1.1
    assert [frame_index(f) for f in PyAVVideo(slow.data).get(np.arange(4))] == [5, 7, 9, 11]
    assert slow.meta["frames"] == 4 and slow.meta["duration"] == pytest.approx(0.8)


def test_file_is_decoded_once_for_all_clips(make_video, monkeypatch):
    from data_prep import reader

    decoded = []
    real = reader.Reader.decode
    monkeypatch.setattr(
        reader.Reader, "decode", lambda self: (decoded.append(f.pts) or f for f in real(self))
    )
    assert len(encode(make_video(20), window=0.5, hop=0.1)) == 16
    assert len(decoded) == 20
    decoded.clear()
    encode(make_video(20), ((0.1, 0.3), (0.2, 0.4)))
    assert len(decoded) < 8  # stops after the last segment


def test_windows(make_video, frame_index):
    def firsts(seconds: float, **recipe) -> list:
        clips = encode(make_video(round(10 * seconds)), **recipe)
        return [(c.start, c.end, c.meta["frames"], frame_index(PyAVVideo(c.data).get([0])[0])) for c in clips]

    assert firsts(1.9, window=0.5) == [
        (0.0, 0.5, 5, 0),
        (0.5, 1.0, 5, 5),
        (1.0, 1.5, 5, 10),
    ]  # the last is incomplete
    assert firsts(2.0, window=1.0, hop=0.5) == [(0.0, 1.0, 10, 0), (0.5, 1.5, 10, 5), (1.0, 2.0, 10, 10)]
    assert firsts(0.3, window=0.5) == [(0.0, 0.3, 3, 0)]


def test_scenes():
    clips = encode(textured(60, cut_at=23), scenes=True)
    cut_at = round(23 / 30, 3)
    assert [(c.start, c.end, c.meta["frames"]) for c in clips] == [(0.0, cut_at, 23), (cut_at, 2.0, 37)]
    assert [len(encode(textured(40), scenes=True))] == [1]


def grey_video(levels: list[int]) -> bytes:
    """A video with one frame per grey level."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as box:
        stream = box.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), level, np.uint8), format="rgb24")
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize("reencode", [True, False])
def test_filters(reencode, tmp_path):
    files = {
        "fine": grey_video([100, 110] * 10),
        "dark": grey_video([4, 16] * 10),
        "static": grey_video([90] * 20),
        "nearly": grey_video([90, 91] * 10),
        "short": grey_video([100, 120] * 3),
        "small": encode(grey_video([100, 110] * 10), short_side=40)[0].data,
    }
    filters = Filters(min_seconds=1.0, min_side=60, dark=16.0, static=0.5)
    inspector = FileInspector("pyav", 120.0, Recipe(fps="5") if reencode else None, filters)
    found = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        [found[name]] = inspector(tmp_path / name, "mp4")
    inspector.close()
    dropped = {name: (f.reason, f.value) for name, f in found.items() if isinstance(f, Rejected)}
    luma = dropped.pop("dark")
    assert luma[0] == "too_dark" and luma[1] == pytest.approx(10 if not reencode else 4, abs=1.2)
    if reencode:  # at 5 frames per second every second frame is kept, and these are equal
        assert {name: reason for name, (reason, _) in dropped.items()} == {
            **{
                "fine": "static",
                "static": "static",
                "nearly": "static",
                "short": "too_short",
                "small": "too_small",
            }
        }
    else:
        assert dropped == {"static": ("static", 0.0), "short": ("too_short", 0.6), "small": ("too_small", 40)}


def test_luma_in_all_pixel_formats():
    picture = (
        np.random.default_rng(0).integers(0, 255, (64, 96, 3)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
    )
    want = block_means(picture) @ np.array([0.299, 0.587, 0.114], np.float32)  # luma of BT.601
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    for name in ("yuv420p", "yuvj420p", "yuv444p", "yuv420p10le", "nv12", "gray", "rgb24", "gbrp", "yuyv422"):
        assert np.abs(thumbnail(frame.reformat(format=name)) - want).mean() < 1.5, name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_video) -> Path:
    """Segments of four files, two of them identical and one broken, and an image, in labels.csv."""
    root = tmp_path_factory.mktemp("segments") / "src"
    root.mkdir()
    rows = ["path,label,group,start,end"]
    for i, data in enumerate((textured(40, cut_at=15), make_video(20), make_video(20), b"no video")):
        (root / f"v{i}.mp4").write_bytes(data)
        rows += [
            f"v{i}.mp4,{label},g{i},{start},{end}" for label, start, end in (("a", 0, 0.6), ("b", 0.4, 1.2))
        ]
    (root / "picture.png").write_bytes(_png())
    (root / "labels.csv").write_text("\n".join([*rows, "picture.png,a,g9,,"]) + "\n")
    return root


def _png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "png")
    return out.getvalue()


OPTIONS = [
    "--short-side",
    "32",
    "--fps",
    "10",
    "--crf",
    "20",
    "--samples-per-shard",
    "2",
    "--drop-duplicates",
]


@pytest.fixture(scope="module")
def packed(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("segments_packed") / "out"
    pack.main([str(corpus), str(out), "--workers", "1", *OPTIONS])
    return out


def test_pack_of_segments(packed, corpus):
    samples = {(x["meta"]["source"], x["meta"].get("start")): x for x in read_records(packed)}
    assert samples.keys() == {
        ("v0.mp4", 0.0),
        ("v0.mp4", 0.4),
        ("v1.mp4", 0.0),
        ("v1.mp4", 0.4),
        ("picture.png", None),
    }
    second = samples["v1.mp4", 0.4]
    assert (
        second["key"] == sample_key("v1.mp4", 0.4, 1.2) != sample_key("v1.mp4", 0.4, 1.3)
        and "." not in second["key"]
    )
    assert second["meta"]["class"] == "b" and (second["meta"]["start"], second["meta"]["end"]) == (0.4, 1.2)
    assert (second["meta"]["frames"], second["meta"]["height"]) == (8, 32)
    assert samples["picture.png", None]["ext"] == "png"
    rejected = [json.loads(x) for x in read_lines(packed / "rejected.jsonl")]
    assert [(r["path"], r["reason"], r["start"]) for r in rejected] == [
        *(("v2.mp4", "duplicate", t) for t in (0.0, 0.4)),
        *(("v3.mp4", "not_a_video", t) for t in (0.0, 0.4)),
    ]
    made_by = read_index(packed)["pack"]
    assert made_by["encode"]["fps"] == "10" and made_by["drop_duplicates"] and "libavcodec" in made_by
    assert made_by["bytes_in"] == sum(p.stat().st_size for p in corpus.iterdir() if p.suffix != ".csv")


@pytest.mark.slow
def test_bytes_with_three_workers_and_after_sigkill(packed, corpus, tmp_path):
    pack.main([str(corpus), str(tmp_path / "three"), "--workers", "3", *OPTIONS])
    assert file_hashes(tmp_path / "three") == file_hashes(packed)
    out = tmp_path / "killed"
    arguments = [str(corpus), str(out), "--workers", "1", *OPTIONS]
    assert signalled("SIGKILL", "shard-000000.tar", 1, "data_prep.pack", *arguments) == -signal.SIGKILL
    assert list(out.glob("*.jsonl")) and not (out / "index.json").exists()
    pack.main(arguments)
    assert file_hashes(out) == file_hashes(packed)
    with pytest.raises(UserError, match="with other options"):
        pack.main([*arguments, "--crf", "21"])


def test_pack_of_windows_and_its_report(tmp_path, make_video):
    src = tmp_path / "src" / "x"
    out = tmp_path / "out"
    src.mkdir(parents=True)
    (src / "long.mp4").write_bytes(make_video(20))
    (src / "short.mp4").write_bytes(make_video(4))
    (src / "none.mp4").write_bytes(b"")
    pack.main([str(src.parent), str(out), "--workers", "1", "--window", "0.5", "--min-seconds", "0.45"])
    starts = [(x["meta"]["source"], x["meta"]["start"]) for x in read_records(out)]
    assert sorted(starts) == [("x/long.mp4", t) for t in (0.0, 0.5, 1.0, 1.5)]
    summary = json.loads((out / "report.json").read_text())
    assert (summary["samples"], summary["files"], summary["frames"], summary["seconds"]) == (4, 1, 20, 2.0)
    assert summary["rejected"] == {"empty": 1, "too_short": 1}
    assert summary["bytes_in"] == sum(p.stat().st_size for p in src.iterdir())
    assert summary["bytes_out"] == sum(p.stat().st_size for p in out.glob("*.tar"))
    assert (
        summary["codec"] == {"h264": 4}
        and summary["duration"]["counts"] == [4]
        and summary["duration"]["median"] == 0.5
    )
    assert summary["short_side"]["min"] == 48 and sum(summary["bytes"]["counts"]) == 4
    assert Image.open(out / "report.png").size == (1200, 560)
    (out / "report.json").unlink()
    # Without it a page counts the same from the index
    (found,) = find_sets([tmp_path])
    assert json.loads(json.dumps(found.report)) == summary and not (out / "report.json").exists()


def faulty_encoding(decoder, recipe, filters, report, path, ext, spans, frame_rate):
    """Crashes on the file `die`; encodes others slowly, with progress."""
    if Path(path).read_bytes() == b"die":
        os.kill(os.getpid(), signal.SIGSEGV)
    for _ in range(40):
        report.progress()
        time.sleep(0.1)
    return [EncodedSample({"frames": 1})]


@pytest.mark.slow
def test_crash_rejects_one_file_and_slowness_none(tmp_path):
    (tmp_path / "die").write_bytes(b"die")
    (tmp_path / "slow").write_bytes(b"slow")
    inspector = FileInspector("pyav", 3.0, Recipe(), job=faulty_encoding)
    spans = ((0.0, 1.0), (1.0, 2.0))
    crash = Rejected("decoder_crash", "the decoder's process ended with -11")
    assert inspector(tmp_path / "die", "mp4", spans) == [
        crash._replace(item=i, start=float(i), end=i + 1.0) for i in (0, 1)
    ]
    assert inspector(tmp_path / "slow", "mp4", spans) == [EncodedSample({"frames": 1})]
    inspector.close()


@pytest.mark.parametrize("options, words", [
    (["--fps", "fast"], "--fps fast: expected a rate"),
    (["--fps", "1/0"], "--fps 1/0"), (["--fps", "-3"], "--fps -3"),
    (["--crf", "0"], "--crf 0: expected 1 to 51"), (["--short-side", "1"], "--short-side must be"),
    (["--hop", "2"], "--hop needs --window"), (["--window", "0"], "at least 0.01 s"),
    (["--window", "2", "--scenes"], "not both"), (["--min-seconds", "-1"], "must be >= 0"),
])  # fmt: skip
def test_invalid_options(options, words):
    with pytest.raises(UserError, match=words):
        pack.parse_arguments(["src", "out", *options])


def test_windows_of_segments_are_an_error(corpus, tmp_path):
    with pytest.raises(UserError, match="annotations name segments; leave out --window"):
        pack.main([str(corpus), str(tmp_path / "out"), "--window", "1"])


def test_fps_is_exact():
    [clip] = encode(textured(30), fps="30000/1001")
    with av.open(io.BytesIO(clip.data)) as box:
        assert box.streams.video[0].average_rate == Fraction(30000, 1001)

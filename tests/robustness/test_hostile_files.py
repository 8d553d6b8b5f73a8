"""Real files, intact and damaged: each is packed and decodes, or is rejected with a reason; none is wrong
unnoticed.

The files cannot be redistributed; without them these tests are skipped. The expected values do not come from
the code under test: MANIFEST.csv (the container's own data) and a plain full decode here.
"""

import csv
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest

from data_prep import pack
from vidssl.data.decoding import open_video

ROBUST = Path(__file__).parents[2].parent / "shared/data/robust"
pytestmark = pytest.mark.skipif(
    not (ROBUST / "MANIFEST.csv").is_file(), reason=f"no {ROBUST}: files not redistributable"
)

EDIT_LIST = "an edit list: these packets are decoded (others refer to them) but never displayed"
DAMAGED = "these packets do not decode; the others do"
FEWER_FRAMES = {  # packets in the container that are no frame to display, and why
    "MAX-Sports-Video-Classifier/baseball.mp4": (16, EDIT_LIST),
    "MAX-Sports-Video-Classifier/basketball.mp4": (51, EDIT_LIST),
    "androidx-media/mp4__dolbyVision-hdr.MOV": (1, EDIT_LIST),
    "androidx-media/mp4__iibbibb_editlist_videoonly.mp4": (1, EDIT_LIST),
    "androidx-media/mp4__sample_sef_slow_motion.mp4": (1, EDIT_LIST),
    "androidx-media/mp4__sample_sef_super_slow_motion.mp4": (1, EDIT_LIST),
    "co-tracker/videos__pillow.mp4": (2, EDIT_LIST),
    "torchcodec/discard_first_keyframe.mp4": (5, EDIT_LIST),
    "androidx-media/vp9__roadtrip-vp92-10bit.webm": (8, "VP9 alternate reference frames are not displayed"),
    "androidx-media/mp4__sample_with_invalid_nalu.mp4": (1, DAMAGED),
    "mp4parse-rust/mp4parse_capi__tests__no_timescale.mp4": (12, DAMAGED),
}
ROTATED = {  # clockwise rotations by 90 degrees; whether mirrored after that
    "androidx-media/mp4__dolbyVision-hdr.MOV": (1, False),
    "androidx-media/mp4__h265_with_metadata_track.mp4": (1, False),
    "androidx-media/mp4__sample_rotate_and_reflect.mp4": (1, True),
    "androidx-media/mp4__sample_with_color_info.mp4": (1, False),
    "decord/tests__test_data__video_90.mov": (1, False),
    "mp4parse-rust/mp4parse_capi__tests__video_rotation_90.mp4": (1, False),
}
REASONS = {
    "decode_error": 3,  # encrypted, or no packet decodes
    "empty": 2,  # zero bytes
    "no_decoder": 1,  # Dolby Vision AV1 under another codec name
    "no_frames": 9,  # headers of segmented streams, for example
    "no_video_stream": 12,  # audio or text only
    "not_a_video": 10,  # random bytes, text, header missing or cut off
}


class Truth(NamedTuple):
    """A file decoded plainly from its path: seconds of each frame, some frames u8 [H,W,3] as displayed."""

    seconds: list[float]
    frames: dict[int, np.ndarray]


class Packed(NamedTuple):
    meta: dict
    ext: str
    data: bytes


def displayed(name: str, frame: av.VideoFrame) -> np.ndarray:
    quarters, mirrored = ROTATED.get(name, (0, False))
    picture = np.rot90(frame.to_ndarray(format="rgb24"), -quarters)
    return picture[:, ::-1] if mirrored else picture


def decode(name: str, wanted: set[int]) -> Truth:
    seconds = []
    frames = {}
    with av.open(str(ROBUST / name)) as file:
        stream = file.streams.best("video")
        stream.codec_context.thread_count = 1  # FFmpeg conceals damage differently with more
        for packet in file.demux(stream):
            try:
                for frame in packet.decode():
                    if len(seconds) in wanted:
                        frames[len(seconds)] = displayed(name, frame)
                    seconds.append(frame.time)
            except av.FFmpegError:
                assert name in FEWER_FRAMES
    return Truth(seconds, frames)


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict]:
    with open(ROBUST / "MANIFEST.csv", encoding="utf-8", newline="") as f:
        return {row["path"]: row for row in csv.DictReader(f)}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("robust") / "out"
    pack.main([str(ROBUST), str(out), "--workers", "2"])
    return out


@pytest.fixture(scope="module")
def packed(out) -> dict[str, Packed]:
    found = {}
    for tar in sorted(out.glob("*.tar")):
        data = tar.read_bytes()
        for line in map(json.loads, tar.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()):
            payload = data[line["offset"] : line["offset"] + line["size"]]
            found[line["meta"]["source"]] = Packed(line["meta"], line["ext"], payload)
    return found


@pytest.fixture(scope="module")
def truth(packed) -> dict[str, Truth]:
    wanted = {name: {0, p.meta["frames"] // 2, p.meta["frames"] - 1} for name, p in packed.items()}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(decode, *zip(*wanted.items(), strict=True)), strict=True))


def test_every_file_is_packed_or_rejected_with_a_reason(out, packed, manifest):
    rejected = [
        json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted([*packed, *(r["path"] for r in rejected)]) == sorted(manifest)
    assert {r["path"] for r in rejected} == {name for name, row in manifest.items() if row["err"]}
    assert Counter(r["reason"] for r in rejected) == REASONS
    assert all(p.data == (ROBUST / name).read_bytes() for name, p in packed.items())


def test_frame_counts(packed, manifest, truth):
    for name, p in packed.items():
        assert p.meta["frames"] == len(truth[name].seconds), name
        fewer, _ = FEWER_FRAMES.get(name, (0, ""))
        assert p.meta["frames"] == int(manifest[name]["packets"]) - fewer, name


def test_sizes_and_rotations(packed, manifest):
    rotated = set()
    for name, p in packed.items():
        row = manifest[name]
        size = (p.meta["width"], p.meta["height"])
        if row["rot"] == "-90":
            rotated.add(name)
            size = size[::-1]
        else:
            assert row["rot"] == "0" or "no_timescale" in name  # its display matrix is all zero: no rotation
        assert size == (int(row["w"]), int(row["h"])), name
        assert p.meta["rotation"] == (90 if name in rotated else 0), name
    assert rotated == set(ROTATED)


def test_first_middle_and_last_frame(packed, truth):
    for i, (name, p) in enumerate(packed.items()):
        check_frames(name, p, truth[name], "auto")
        if p.meta.get("decord") and i % 5 == 0:
            check_frames(name, p, truth[name], "decord")


def check_frames(name: str, p: Packed, truth: Truth, decoder: str) -> None:
    video = open_video(p.data, p.ext, p.meta, decoder)
    assert (len(video), video.size) == (p.meta["frames"], (p.meta["height"], p.meta["width"])), name
    for i, want in sorted(truth.frames.items(), reverse=True):
        got = video.get([i])[0]
        off = np.abs(np.subtract(got[::3, ::3], want[::3, ::3], dtype=np.int16)).mean()
        assert off <= (0.0 if video.decoder == "pyav" else 6.0), (
            f"{name}: frame {i} is {off:.1f} grey levels off"
        )


def test_times(packed, truth):
    for name, p in packed.items():
        times = open_video(p.data, p.ext, p.meta).times
        assert times[0] == 0 and (np.diff(times) > 0).all(), name
        want = np.array(truth[name].seconds, float)
        stamps = want[np.isfinite(want)]
        if (np.diff(want) > 0).all():
            assert np.abs(times - (want - want[0])).max() < 2e-3, name
        elif len(stamps) > 1:  # some are missing or out of order: the others are kept
            off = np.abs(times[:, None] - (stamps - stamps.min())).min(1)
            assert (off < 2e-3).mean() > 0.5, (name, (off < 2e-3).mean())
        else:
            assert np.abs(np.diff(times, 2)).max() < 1e-5, name
        assert p.meta["duration"] >= times[-1], name

"""vidssl/data/decoding: what a file says of how its frames are shown, and that all decoders show it."""

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from types import MappingProxyType

import av
import numpy as np
import pytest

from data_prep.encode import Recipe, encode_clips
from data_prep.filters import NO_FILTERS
from data_prep.inspect_file import inspect_file
from data_prep.reader import FrameCropper
from data_prep.summary import make_summary, summary_lines
from vidssl.data.decoding import open_video
from vidssl.data.decoding.crop import Crop, read_number
from vidssl.data.decoding.presentation import ASPECT, OUTSIDE, TURN

HEIGHT, WIDTH, FRAMES = 66, 98, 3
BOX_PATH = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")
Change = Callable[[bytes], bytes]
SetUp = Callable[[av.VideoStream], object]


def picture(index: int) -> np.ndarray:
    """u8 [HEIGHT,WIDTH,3], smooth, without symmetry. Its sides are no multiples of a macroblock, so that
    H.264 has rows and columns that its conformance window cuts off."""
    frame = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    frame[..., 0] = np.linspace(20, 220, WIDTH)
    frame[..., 1] = np.linspace(30, 240, HEIGHT)[:, None]
    frame[..., 2] = 60 * index
    return frame


def encode(container: str, set_up: SetUp = lambda stream: None) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("libx264", rate=10, options={"crf": "2", "preset": "ultrafast"})
        stream.height = HEIGHT
        stream.width = WIDTH
        stream.pix_fmt = "yuv444p"
        set_up(stream)
        for i in range(FRAMES):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def with_aperture(*numbers: int) -> Change:
    """Adds a `clap` box to an MP4: width, height and offsets of the centre, as fractions."""

    def change(file: bytes) -> bytes:
        box = struct.pack(">I4s8i", 40, b"clap", *numbers)
        starts = []
        for kind in BOX_PATH:
            starts.append(file.index(kind, starts[-1] if starts else 0) - 4)
        data = bytearray(file)
        end = starts[-1] + struct.unpack_from(">I", data, starts[-1])[0]
        data[end:end] = box
        for start in starts:
            struct.pack_into(">I", data, start, struct.unpack_from(">I", data, start)[0] + len(box))
        return bytes(data)

    return change


def with_pixel_crop(first: int, value: int, second: int, other: int) -> Change:
    """Puts two elements of one byte each in place of others of a Matroska file, and of a part of the space
    that its muxer leaves after them."""
    before = bytes.fromhex("e08a b08162 ba8142 54b28104 55ee8100 ec01000000000000020000")
    crop = struct.pack(">HBBHBB", first, 0x81, value, second, 0x81, other)
    after = bytes.fromhex("e08e b08162 ba8142") + crop + bytes.fromhex("55ee8100 ec850000000000")

    def change(file: bytes) -> bytes:
        assert len(before) == len(after) and file.count(before) == 1
        return file.replace(before, after)

    return change


def turned(degrees: float, hflip: bool = False) -> SetUp:
    """degrees: counter-clockwise."""
    return lambda stream: stream.set_display_rotation(degrees, hflip=hflip)


def with_aspect(*aspect: int) -> SetUp:
    return lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", Fraction(*aspect))


def as_is(file: bytes) -> bytes:
    return file


# container, change of the stream, change of the file, what is shown of a stored picture, what is not applied
CASES = MappingProxyType({
    "plain": ("mp4", None, as_is, lambda p: p, ()),
    "aperture": ("mp4", None, with_aperture(80, 1, 50, 1, 0, 1, 0, 1), lambda p: p[8:-8, 9:-9], ()),
    "aperture, off the centre": (
        "mov", None, with_aperture(80, 1, 50, 1, 9, 1, -8, 1), lambda p: p[:-16, 18:], (),
    ),
    "aperture, odd": ("mp4", None, with_aperture(95, 1, 130, 2, 1, 2, 0, 7), lambda p: p[:65, 2:-1], ()),
    "aperture, whole": ("mp4", None, with_aperture(98, 1, 66, 1, 0, 1, 0, 1), lambda p: p, ()),
    "aperture, beyond": ("mp4", None, with_aperture(80, 1, 50, 1, 10, 1, 0, 1), lambda p: p, (OUTSIDE,)),
    "aperture, 1 / 0": ("mp4", None, with_aperture(80, 0, 50, 1, 0, 1, 0, 1), lambda p: p, (OUTSIDE,)),
    "aperture, turned": (
        "mp4", turned(90), with_aperture(80, 1, 50, 1, 9, 1, 0, 1), lambda p: np.rot90(p[8:-8, 18:]), (),
    ),
    "aperture, mirrored": (
        "mp4", turned(0, hflip=True), with_aperture(80, 1, 50, 1, 9, 1, 8, 1),
        lambda p: p[16:, 18:][:, ::-1], (),
    ),
    "crop of Matroska, right, bottom": (
        "matroska", None, with_pixel_crop(0x54DD, 7, 0x54AA, 16), lambda p: p[:-16, :-7], (),
    ),
    "aspect": ("mp4", with_aspect(4, 3), as_is, lambda p: p, (ASPECT,)),
    "aspect, nearly square": ("mp4", with_aspect(1280, 1281), as_is, lambda p: p, ()),
    "mirrored": ("mp4", turned(0, hflip=True), as_is, lambda p: p[:, ::-1], ()),
    "turned by 30 degrees": ("mp4", turned(30), as_is, lambda p: p, (TURN,)),
    "turned by 80 degrees": ("mp4", turned(80), as_is, np.rot90, (TURN,)),
})  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_decoders_show_what_a_player_shows(name):
    container, set_up, change, shown, not_applied = CASES[name]
    file = change(encode(container, set_up or (lambda stream: None)))
    meta = list(inspect_file(file, container, "auto"))[-1]
    want = np.stack([shown(picture(i)) for i in range(FRAMES)]).astype(float)
    assert tuple(meta.get("not_applied", ())) == not_applied
    assert meta.get("crop") == ([*meta["crop"]] if want[0].size < picture(0).size else None)
    for known, decoder in ((None, "pyav"), (None, "decord"), (meta, "pyav"), (meta, "decord")):
        with open_video(file, "mp4", known, decoder) as video:
            got = video.get(range(FRAMES))
            assert video.size == got.shape[1:3] == want.shape[1:3]
            assert np.abs(got - want).mean() < 3, (known, decoder)
            assert video.get([2])[0].tolist() == got[2].tolist()
    [clip] = encode_clips(io.BytesIO(file), [(None, None)], Recipe(crf=4), NO_FILTERS, lambda: None)
    with open_video(clip.data, "mp4", clip.meta) as video:
        height, width = video.size
        assert (height, width) == tuple(n - n % 2 for n in want.shape[1:3])
        assert np.abs(video.get(range(FRAMES)) - want[:, :height, :width]).mean() < 5
    original = clip.meta["original"]
    assert original.get("crop") == meta.get("crop")
    assert original.get("not_applied") == meta.get("not_applied")


def test_frames_of_another_size_are_scaled_before_they_are_cropped():
    crop = Crop(8, 10, 18, 2)
    cropped = FrameCropper(crop, (HEIGHT, WIDTH))
    first = av.VideoFrame.from_ndarray(picture(0), format="rgb24").reformat(format="yuv444p")
    first.time_base = Fraction(1, 10)
    small = first.reformat(WIDTH // 2, HEIGHT // 2)
    small.pts = 7
    want, got = cropped(first), cropped(small)
    assert (got.height, got.width, got.pts) == (want.height, want.width, 7)
    assert got.format.name == "yuv444p"
    assert np.abs(got.to_ndarray().astype(float) - want.to_ndarray()).mean() < 2


def test_an_element_that_crosses_the_end_of_its_parent_is_empty():
    file = io.BytesIO(bytes.fromhex("e083 b0 8162") + bytes(100))
    file.read = lambda count, read=file.read: read(count) if count >= 0 else pytest.fail("reads all")
    # The parent ends before, within or after the header of its element.
    found = [read_number(file, (2, end), 0xB0) for end in (3, 4, 5)]
    assert found == [0, 0, 0x62]


def test_what_is_shown_is_counted():
    metas = [{"crop": [0, 0, 2, 2]}, {"original": {"not_applied": {ASPECT: "4:3"}}}, {}]
    records = [{"key": f"k{i}", "ext": "mp4", "meta": meta} for i, meta in enumerate(metas)]
    summary = make_summary(records, {}, {})
    assert summary["display"] == {
        "cropped, as the file says": {"files": 1, "examples": ["k0"]},
        ASPECT: {"files": 1, "examples": ["k1"]},
    }
    assert f"  {ASPECT}: 1 (k1)" in list(summary_lines(summary))

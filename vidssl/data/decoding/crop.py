"""The part of its pictures that a container asks players to show: the clean aperture of MP4 and MOV, and
PixelCrop of Matroska.

FFmpeg reads both and leaves it to its callers to crop, and PyAV does not hand them on. What codecs cut off
themselves (the conformance window of H.264 and HEVC, say) is gone before a frame is seen.
"""

import struct
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from math import floor
from typing import BinaryIO, NamedTuple

import numpy as np

MAX_BOXES = 100_000  # of one file and level, so that a hostile file ends
SAMPLE_ENTRY = 78  # bytes of a video sample entry before the boxes in it
SEGMENT, TRACKS, TRACK, TRACK_TYPE, VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0x83, 0xE0
PIXEL_WIDTH, PIXEL_HEIGHT = 0xB0, 0xBA
PIXEL_CROP = (0x54BB, 0x54AA, 0x54CC, 0x54DD)  # top, bottom, left, right
VIDEO_TRACK = 1  # a value of TRACK_TYPE

Span = tuple[int, int]  # first byte, and the byte after the last


class Crop(NamedTuple):
    """Rows and columns that are cut off a picture."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """[H,W,C] -> a view of the part that is shown."""
        height, width = frame.shape[:2]
        return frame[self.top : height - self.bottom, self.left : width - self.right]

    def shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a picture -> that of the part that is shown."""
        return size[0] - self.top - self.bottom, size[1] - self.left - self.right

    def whole_size(self, shown: tuple[int, int]) -> tuple[int, int]:
        """Reverts `shown_size`."""
        return shown[0] + self.top + self.bottom, shown[1] + self.left + self.right

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether something of a picture of (height, width) is left."""
        return min(self) >= 0 and min(self.shown_size(size)) > 0


NO_CROP = Crop()


def read_crop(file: BinaryIO, container: str, track: int) -> Crop | None:
    """Returns what to cut off the pictures of a track as they are stored; None for one that lies outside.

    The position in `file` is kept. container: FFmpeg's name. track: the track's id in MP4 and MOV; in
    Matroska its number among the tracks of pictures, from 0.
    """
    position = file.tell()
    try:
        if container.startswith("mov"):
            return clean_aperture(file, track)
        return pixel_crop(file, track) if container.startswith("matroska") else NO_CROP
    except struct.error:  # the file ends within a number
        return NO_CROP
    finally:
        file.seek(position)


def clean_aperture(file: BinaryIO, track_id: int) -> Crop | None:
    """Crop of the `clap` box (ISO/IEC 14496-12, 12.1.4) of a track, in whole pixels as FFmpeg rounds it."""
    end = file.seek(0, 2)
    movie = find_box(file, (0, end), b"moov")
    for track in [span for kind, span in boxes(file, movie or (0, 0)) if kind == b"trak"]:
        header = find_box(file, track, b"tkhd")
        descriptions = find_box(file, track, b"mdia", b"minf", b"stbl", b"stsd")
        if header is None or descriptions is None or read_track_id(file, header) != track_id:
            continue
        # 8 bytes of version, flags and number of entries; only the first entry is looked at
        for _, (start, stop) in islice(boxes(file, (descriptions[0] + 8, descriptions[1])), 1):
            aperture = find_box(file, (start + SAMPLE_ENTRY, stop), b"clap")
            if aperture is not None:
                width, height = unpack(file, start + 24, ">HH")
                return crop_of_aperture(height, width, unpack(file, aperture[0], ">8i"))
    return NO_CROP


def read_track_id(file: BinaryIO, header: Span) -> int:
    version = unpack(file, header[0], ">B")[0]
    return unpack(file, header[0] + (20 if version == 1 else 12), ">I")[0]


def crop_of_aperture(height: int, width: int, numbers: tuple[int, ...]) -> Crop | None:
    """numbers: width, height, horizontal and vertical offset of the centre, each as numerator and
    denominator. None if a denominator is not positive, or the aperture is not within the picture."""
    if min(numbers[1::2]) <= 0:
        return None
    wide, high, right, down = (Fraction(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True))
    columns = _margins(width, wide, right)
    rows = _margins(height, high, down)
    if rows is None or columns is None:
        return None
    return Crop(*rows, *columns)


def _margins(size: int, shown: Fraction, offset: Fraction) -> tuple[int, int] | None:
    """Pixels before and after the part that is shown along one axis."""
    centre = Fraction(size - 1, 2) + offset
    first = centre - (shown - 1) / 2
    last = centre + (shown - 1) / 2
    if shown <= 0 or first < 0 or last > size - 1:
        return None
    return floor(first), size - 1 - floor(last)


def boxes(file: BinaryIO, span: Span) -> Iterator[tuple[bytes, Span]]:
    """Yields kind and contents of the boxes in a part of an MP4 file."""
    position, end = span
    for _ in range(MAX_BOXES):
        if position + 8 > end:
            return
        size, kind = unpack(file, position, ">I4s")
        header = 8
        if size == 1:
            size = unpack(file, position + 8, ">Q")[0]
            header = 16
        size = size or end - position
        if size < header:
            return
        yield kind, (position + header, min(position + size, end))
        position += size


def find_box(file: BinaryIO, span: Span, *path: bytes) -> Span | None:
    """Returns the contents of the first box at a path of kinds."""
    for kind in path:
        found = next((inner for name, inner in boxes(file, span) if name == kind), None)
        if found is None:
            return None
        span = found
    return span


def pixel_crop(file: BinaryIO, track: int) -> Crop | None:
    """Crop of the PixelCrop elements (RFC 9559, 5.1.4.1.28) of a track of pictures."""
    end = file.seek(0, 2)
    tracks = find_element(file, (0, end), SEGMENT, TRACKS)
    entries = [span for kind, span in elements(file, tracks or (0, 0)) if kind == TRACK]
    pictures = [entry for entry in entries if read_number(file, entry, TRACK_TYPE) == VIDEO_TRACK]
    video = find_element(file, pictures[track], VIDEO) if track < len(pictures) else None
    if video is None:
        return NO_CROP
    crop = Crop(*(read_number(file, video, kind) for kind in PIXEL_CROP))
    size = read_number(file, video, PIXEL_HEIGHT), read_number(file, video, PIXEL_WIDTH)
    return crop if crop == NO_CROP or crop.fits(size) else None


def elements(file: BinaryIO, span: Span) -> Iterator[tuple[int, Span]]:
    """Yields id and contents of the EBML elements in a part of a Matroska file. Contents end with the part
    and may be empty."""
    position, end = span
    for _ in range(MAX_BOXES):
        if position >= end:
            return
        kind, id_length, _ = variable_integer(file, position, keep_marker=True)
        size, size_length, is_unknown = variable_integer(file, position + id_length)
        start = position + id_length + size_length
        if not id_length or not size_length:
            return
        stop = end if is_unknown else start + size
        yield kind, (start, max(start, min(stop, end)))
        position = stop


def variable_integer(file: BinaryIO, position: int, keep_marker: bool = False) -> tuple[int, int, bool]:
    """Returns an EBML integer, its bytes (0: it is none), and whether all its bits are set."""
    file.seek(position)
    data = file.read(8)
    length = 9 - data[0].bit_length() if data else 9
    if len(data) < length or length > 8:
        return 0, 0, False
    value = int.from_bytes(data[:length], "big")
    bits = (1 << 7 * length) - 1
    return value if keep_marker else value & bits, length, value & bits == bits


def find_element(file: BinaryIO, span: Span, *path: int) -> Span | None:
    """Returns the contents of the first element at a path of ids."""
    for kind in path:
        found = next((inner for name, inner in elements(file, span) if name == kind), None)
        if found is None:
            return None
        span = found
    return span


def read_number(file: BinaryIO, span: Span, kind: int) -> int:
    """Returns an unsigned integer among the elements of `span`; 0 if there is none."""
    found = find_element(file, span, kind)
    if found is None:
        return 0
    file.seek(found[0])
    return int.from_bytes(file.read(min(found[1] - found[0], 8)), "big")


def unpack(file: BinaryIO, position: int, form: str) -> tuple:
    file.seek(position)
    return struct.unpack(form, file.read(struct.calcsize(form)))

"""Frames as a decoder gives them: planes of brightness and colour, not yet converted to RGB."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import av
import numpy as np


class Box(NamedTuple):
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


class PixelFormat(NamedTuple):
    """How the planes of a clip become RGB.

    chroma: rows and columns of pixels that share a sample of the planes U and V; (0, 0): there is one plane,
    RGB interleaved.
    matrix: 12 numbers, row by row of [3, 4]: RGB in grey levels is its left part times (Y, U, V), plus its
    last column.
    """

    chroma: tuple[int, int]
    matrix: tuple[float, ...]


def yuv_matrix(kr: float, kb: float, full: bool) -> tuple[float, ...]:
    """The matrix of a PixelFormat. kr, kb: share of red and blue in the brightness; full: levels are 0..255,
    not 16..235 and 16..240."""
    luma, black = (1.0, 0.0) if full else (255 / 219, 16.0)
    scale = 1.0 if full else 255 / 224
    kg = 1 - kr - kb
    red = (0.0, 2 * (1 - kr) * scale)
    green = (-2 * kb * (1 - kb) / kg * scale, -2 * kr * (1 - kr) / kg * scale)
    blue = (2 * (1 - kb) * scale, 0.0)
    rows = [(luma, u, v, -luma * black - 128 * (u + v)) for u, v in (red, green, blue)]
    return tuple(number for row in rows for number in row)


RGB = PixelFormat((0, 0), (1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0, 0))
CHROMA = {"yuv420p": (2, 2), "yuv422p": (1, 2), "yuv444p": (1, 1)}
BT601 = (0.299, 0.114)
# (kr, kb) by FFmpeg's number of a colour space, as swscale takes them: BT.601 for a file that names none
LUMA_SHARES = {
    **dict.fromkeys((0, 2, 5, 6), BT601),
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
FULL_RANGE = 2  # FFmpeg's number


def planar_format(frame: av.VideoFrame) -> PixelFormat | None:
    """The format of a frame whose planes can be taken as they are; None: only as RGB.

    swscale, which converts for the host, then repeats samples of colour over the pixels that share them. For
    more than 8 bits and for odd numbers of rows it interpolates, so the host converts those.
    """
    name = frame.format.name.replace("yuvj", "yuv")
    chroma = CHROMA.get(name, (0, 0))
    space = int(frame.colorspace)
    if name not in CHROMA or space not in LUMA_SHARES or (frame.height % 2 and chroma != (1, 1)):
        return None
    full = name != frame.format.name or int(frame.color_range) == FULL_RANGE
    return PixelFormat(chroma, yuv_matrix(*LUMA_SHARES[space], full))


def frame_planes(frame: av.VideoFrame) -> list[np.ndarray]:
    """The planes of a frame, each u8 [rows, columns], without a copy. Behind the columns of the picture there
    may be others, of any content."""
    return [np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]


def plane_shapes(chroma: tuple[int, int], frames: int, height: int, width: int) -> list[tuple[int, ...]]:
    """Shapes of the planes of a clip whose frames have height x width pixels."""
    if not all(chroma):
        return [(frames, height, width, 3)]
    small = (frames, -(-height // chroma[0]), -(-width // chroma[1]))
    return [(frames, height, width), small, small]


def split_planes(pixels, shapes: Sequence[tuple[int, ...]]) -> list:
    """[n] -> views of the given shapes, one after the other; for arrays and tensors."""
    planes = []
    start = 0
    for shape in shapes:
        stop = start + math.prod(shape)
        planes.append(pixels[start:stop].reshape(shape))
        start = stop
    return planes


class PlaneBuffer:
    """The planes of a clip, cropped to a region with even corners. pixels: u8 [n], plane after plane."""

    def __init__(self, chroma: tuple[int, int], frames: int, region: Box):
        shapes = plane_shapes(chroma, frames, region.height, region.width)
        self.pixels = np.empty(sum(map(math.prod, shapes)), np.uint8)
        self._planes = split_planes(self.pixels, shapes)
        self._parts: list[tuple[slice, slice]] = []  # of the planes of a frame
        for i, (_, height, width, *_) in enumerate(shapes):
            rows, columns = chroma if i else (1, 1)
            top, left = region.top // rows, region.left // columns
            self._parts.append((slice(top, top + height), slice(left, left + width)))

    def write(self, place: int, planes: Sequence[np.ndarray]) -> None:
        """Copies the region of a frame. place: index of the frame in the clip."""
        for own, plane, part in zip(self._planes, planes, self._parts, strict=True):
            own[place] = plane[part]

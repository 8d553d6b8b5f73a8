"""Display matrices: how a player rotates and mirrors frames, for a camera that was held tilted."""

import struct
from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type

from vidssl.data.decoding.crop import Crop


class Rotation(NamedTuple):
    """A display matrix with right angles: transpose, then reverse rows and columns."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """[H,W,C] as stored -> [H',W',C] as displayed."""
        frame = frame.transpose(1, 0, 2) if self.transpose else frame
        return frame[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def displayed_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(height, width) of a stored frame as displayed."""
        return (frame.width, frame.height) if self.transpose else (frame.height, frame.width)

    def turn_crop(self, crop: Crop) -> Crop:
        """Crop of a frame as stored -> of the frame as displayed."""
        top, bottom, left, right = crop
        if self.transpose:
            top, bottom, left, right = left, right, top, bottom
        rows = (bottom, top) if self.flip_rows else (top, bottom)
        columns = (right, left) if self.flip_columns else (left, right)
        return Crop(*rows, *columns)

    @property
    def degrees(self) -> int:
        """Clockwise rotation in the matrix, as FFmpeg reads it; mirroring is not part of it."""
        if self.transpose:
            return 270 if self.flip_rows else 90
        return 180 if self.flip_columns else 0


QUARTER_TURNS = {  # counter-clockwise degrees, as PyAV gives them
    90: Rotation(True, True, False),
    180: Rotation(False, True, True),
    270: Rotation(True, False, True),
}


def rotation_of(frame: av.VideoFrame) -> Rotation:
    """Returns the display matrix (a, b, u, c, d, v, x, y, w) of a frame, to the nearest right angle."""
    try:
        data: Any = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    except ValueError:  # PyAV has no name for some other side data of this frame, but knows the angle
        return QUARTER_TURNS.get(frame.rotation % 360, Rotation())
    if data is None:
        return Rotation()
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(data))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Rotation(False, d < 0, a < 0)
    return Rotation(True, b < 0, c < 0)


class RotationReader:
    """`rotation_of` for the frames of one video, computed again only when the angle changes: reading side
    data makes a reference cycle, which keeps the memory of the frame until a garbage collection."""

    def __init__(self) -> None:
        self._angle: int | None = None
        self._rotation = Rotation()

    def __call__(self, frame: av.VideoFrame) -> Rotation:
        if self._angle != frame.rotation:
            self._angle = frame.rotation
            self._rotation = rotation_of(frame)
        return self._rotation

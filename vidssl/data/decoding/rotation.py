"""Display matrices: how a player turns the frames of a video that was taken with a tilted camera."""

import struct
from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type


class Rotation(NamedTuple):
    """A display matrix with right angles: transpose if `swap`, then reverse rows and columns as asked."""

    swap: bool = False
    rows: bool = False
    columns: bool = False

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """[H,W,3] as stored -> [H',W',3] as shown."""
        frame = frame.transpose(1, 0, 2) if self.swap else frame
        return frame[:: -1 if self.rows else 1, :: -1 if self.columns else 1]

    @property
    def degrees(self) -> int:
        """Clockwise rotation in the matrix, as FFmpeg reads it; a mirroring is not told."""
        return (270 if self.rows else 90) if self.swap else (180 if self.columns else 0)


def rotation_of(frame: av.VideoFrame) -> Rotation:
    """How a player turns this frame: its display matrix (a, b, u, c, d, v, x, y, w), to the nearest right angle."""
    try:
        data: Any = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    except ValueError:  # PyAV cannot name some other side data of this frame, but it knows the angle
        quarter = {
            270: Rotation(True, False, True),
            180: Rotation(False, True, True),
            90: Rotation(True, True, False),
        }
        return quarter.get(frame.rotation % 360, Rotation())
    if data is None:
        return Rotation()
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(data))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Rotation(False, d < 0, a < 0)
    return Rotation(True, b < 0, c < 0)


class RotationReader:
    """`turn_of` the frames of one video, looked up anew when their angle changes: looking makes a reference cycle,
    which keeps a frame's memory until some garbage collection."""

    def __init__(self) -> None:
        self._angle: int | None = None
        self._turn = Rotation()

    def __call__(self, frame: av.VideoFrame) -> Rotation:
        if self._angle != frame.rotation:
            self._angle, self._turn = frame.rotation, rotation_of(frame)
        return self._turn

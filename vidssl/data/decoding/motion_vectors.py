"""The motion vectors that a codec has stored, as fields of displacements on a coarse grid.

FFmpeg's decoders of H.264, MPEG-4, MPEG-2 and their like hand them on; those of HEVC, VP9 and AV1 do not.
"""

from typing import Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import PictureType

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.crop import NO_CROP, Crop
from vidssl.data.decoding.rotation import Rotation

CELL = 8  # pixels, height and width of a cell of a field


class MotionField(NamedTuple):
    """The movement of frames, as displayed.

    vectors: f32 [T, 2, h, w], (x, y) in pixels of the frame, of each cell; 0 where the codec stored none.
    origin: (row, column) in the field, in pixels, of the first pixel that is shown.
    """

    vectors: np.ndarray
    origin: tuple[float, float]


def read_vectors(frame: av.VideoFrame) -> np.ndarray | None:
    """The motion vectors of a decoded frame, a structured array [n]; None if it has none."""
    try:
        data: Any = frame.side_data.get(Type.MOTION_VECTORS)  # type: ignore[call-overload]
    except ValueError:  # PyAV has no name for some other side data of this frame
        return None
    return None if data is None else data.to_ndarray().copy()


def draw_field(vectors: np.ndarray, height: int, width: int) -> np.ndarray:
    """Vectors [n] of a frame of height x width pixels -> f32 [2, h, w]: the mean movement in each cell.

    The movement is that from an earlier frame to this one, or from this one to a later frame. How far apart
    the two are the codec does not say.
    """
    rows, columns = -(-height // CELL), -(-width // CELL)
    sign = np.where(vectors["source"] < 0, -1.0, 1.0) / vectors["motion_scale"].clip(1)
    tall, wide = (vectors[name].astype(np.int64) for name in ("h", "w"))
    top, left = vectors["dst_y"] - tall // 2, vectors["dst_x"] - wide // 2
    area = np.minimum(tall, CELL) * np.minimum(wide, CELL)
    total = np.zeros((3, rows * columns))  # of area, area * x and area * y
    values = np.stack([area, area * sign * vectors["motion_x"], area * sign * vectors["motion_y"]])
    for down in range(0, tall.max(initial=0), CELL):
        for right in range(0, wide.max(initial=0), CELL):
            row, column = (top + down) // CELL, (left + right) // CELL
            inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            inside &= (down < tall) & (right < wide)
            cell = (row * columns + column)[inside]
            total += [np.bincount(cell, value, rows * columns) for value in values[:, inside]]
    return (total[1:] / total[0].clip(1)).reshape(2, rows, columns).astype(np.float32)


def turn_field(field: np.ndarray, rotation: Rotation) -> np.ndarray:
    """[2, h, w] of a frame as stored -> of the frame as displayed."""
    x, y = (rotation.apply(part[..., None])[..., 0] for part in field)
    if rotation.transpose:
        x, y = y, x
    return np.stack([-x if rotation.flip_columns else x, -y if rotation.flip_rows else y])


class MotionReader:
    """Collects the motion vectors of one video while it is decoded.

    A frame without vectors, such as an I frame, has those of the frame before it. Those of frames that are
    not decoded are lost.
    """

    def __init__(self) -> None:
        self._latest: av.VideoFrame | None = None  # that is no I frame
        self._decoded = 0
        self._vectors: np.ndarray | None = None
        self._fields: dict[int, np.ndarray | None] = {}  # by index of the frame
        self._origin = 0.0, 0.0

    def see(self, frame: av.VideoFrame) -> None:
        """Takes the next frame that was decoded."""
        self._decoded += 1
        if frame.pict_type != PictureType.I:
            self._latest = frame

    def keep(self, index: int, frame: av.VideoFrame, rotation: Rotation, crop: Crop = NO_CROP) -> None:
        """Keeps the field of the frame that was seen last. crop: of the frame as displayed."""
        height, width = rotation.displayed_size(frame)
        flipped = rotation.flip_rows * (-height % CELL), rotation.flip_columns * (-width % CELL)
        self._origin = crop.top + flipped[0], crop.left + flipped[1]
        self._fields[index] = None
        vectors = None if self._latest is None else read_vectors(self._latest)
        self._latest = None  # side data makes a reference cycle: the memory of the frame is freed by `close`
        self._vectors = self._vectors if vectors is None else vectors
        if self._vectors is not None:
            field = draw_field(self._vectors, frame.height, frame.width)
            self._fields[index] = turn_field(field, rotation)

    def field(self, indices: np.ndarray, codec: str) -> MotionField:
        """Of frames that were kept. Those before the first one with vectors have the vectors of that one.

        Raises DecodeError if no frame had vectors, unless a single one was decoded.
        """
        fields = [self._fields[i] for i in indices.tolist()]
        found = [field for field in fields if field is not None]
        if not found:
            if self._decoded > 1:
                raise DecodeError("no_motion_vectors", f"FFmpeg hands on none of this {codec} file")
            return MotionField(np.zeros((len(fields), 2, 1, 1), np.float32), (0.0, 0.0))
        if len({field.shape for field in found}) > 1:
            raise DecodeError("no_motion_vectors", "the frames of the file have several sizes")
        return MotionField(np.stack([found[0] if f is None else f for f in fields]), self._origin)

"""A source video, decoded once from front to back: each frame with the seconds during which it is displayed,
and as the picture that is encoded and measured."""

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Interpolation

from data_prep.filters import thumbnail
from vidssl.core.errors import DecodeError
from vidssl.data.decoding.rotation import Rotation, rotation_of
from vidssl.data.decoding.video_stream import VideoStream

MIN_FRAME_S = 1 / 240  # seconds that the last frame is displayed at least
MAX_GAP_S = 600.0  # seconds between two frames; a larger gap is a wrong time stamp
DEFAULT_RATE = 25.0  # frames per second of a file that does not name its rate
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
COLOUR_TAGS = ("color_range", "colorspace", "color_primaries", "color_trc")


class BadStampsError(Exception):
    """Time stamps are missing, decrease or leap."""


class Reader:
    """A video file, decoded once from front to back on one thread; damaged packets are skipped and counted.

    count: time the frames by the average rate instead of their time stamps.
    """

    def __init__(self, file: BinaryIO, count: bool = False):
        self._stream = VideoStream(file)
        self._count = count
        self.codec = self._stream.codec
        self.rate = self._stream.rate or DEFAULT_RATE

    @property
    def errors(self) -> int:
        """Damaged packets so far."""
        return self._stream.damaged_packets

    def close(self) -> None:
        self._stream.close()

    def facts(self, first: "Picture") -> dict:
        """Describes the source file, for the meta of the clips that are cut from it."""
        height, width = first.shown
        size = {"height": height, "width": width, "rotation": first.rotation}
        return {"codec": self.codec, "fps": round(self.rate, 3), **size}

    def decode(self) -> Iterator[av.VideoFrame]:
        """Yields every frame that decodes."""
        return self._stream.decode()

    def frames(self) -> Iterator[tuple[av.VideoFrame, float, float]]:
        """Yields (frame, start, end): seconds during which each frame is displayed, from 0.

        The last frame is displayed for the mean duration. Raises BadStampsError for unusable time stamps.
        """
        previous: av.VideoFrame | None = None
        start = 0.0
        frames = 0
        for frame, seconds in self._timed():
            if previous is not None:
                if not 0 < seconds - start <= MAX_GAP_S:
                    raise BadStampsError
                yield previous, start, seconds
            previous = frame
            start = seconds
            frames += 1
        if previous is None:
            reason = "decode_error" if self.errors else "no_frames"
            raise DecodeError(reason, f"{self.errors} damaged packets")
        duration = start / (frames - 1) if frames > 1 else 1 / self.rate
        yield previous, start, start + max(duration, MIN_FRAME_S)

    def _timed(self) -> Iterator[tuple[av.VideoFrame, float]]:
        """Yields each frame with its time in seconds since the first frame."""
        first = 0.0
        for i, frame in enumerate(self.decode()):
            if self._count:
                yield frame, i / self.rate
                continue
            if frame.pts is None:
                raise BadStampsError
            seconds = frame.pts * self._stream.time_base
            if i == 0:
                first = seconds
            yield frame, seconds - first


class Picture:
    """A source frame as it will be encoded: scaled and rotated once, however many clips contain it.

    shown: (height, width) of the source as displayed. size: (height, width) of the clip.
    """

    def __init__(self, frame: av.VideoFrame, short_side: int | None, size: tuple[int, int] | None):
        """size: None for the first frame of a file, whose size all its clips have."""
        self._frame = frame
        self._rotation = rotation_of(frame)
        self.rotation = self._rotation.degrees
        self.shown = self._rotation.displayed_size(frame)
        self.size = size or even_size(self.shown, short_side)
        self._yuv: av.VideoFrame | None = None
        self._thumbnail: np.ndarray | None = None

    def yuv(self) -> av.VideoFrame:
        """The frame in yuv420p, scaled and rotated."""
        if self._yuv is None:
            height, width = self.size[::-1] if self._rotation.transpose else self.size
            frame = self._frame.reformat(
                width, height, "yuv420p", interpolation=SCALING, dst_color_range=ColorRange.MPEG, threads=1
            )
            self._yuv = frame if self._rotation == Rotation() else rotate_yuv(frame, self._rotation)
            self._yuv.pict_type = PictureType.NONE  # x264 would keep the picture type of the source
        return self._yuv

    def thumbnail(self) -> np.ndarray:
        """Luma thumbnail, f32 [32,32] (see data_prep.filters)."""
        if self._thumbnail is None:
            self._thumbnail = thumbnail(self.yuv())
        return self._thumbnail


def even_size(shown: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(height, width) of a clip: even, the short side at most `short_side`, not larger than the source."""
    scale = min(1.0, (short_side or math.inf) / min(shown))
    height, width = (max(2, min(2 * round(n * scale / 2), n - n % 2)) for n in shown)
    return height, width


def rotate_yuv(frame: av.VideoFrame, rotation: Rotation) -> av.VideoFrame:
    """Returns a yuv420p frame as a player displays it."""
    planes: list[Any] = list(frame.planes)
    pixels = [np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width, None] for p in planes]
    height, width = rotation.apply(pixels[0]).shape[:2]
    out = av.VideoFrame(width, height, "yuv420p")
    for plane, target in zip(pixels, out.planes, strict=True):
        padded = np.zeros((target.height, target.line_size), np.uint8)
        padded[:, : target.width] = rotation.apply(plane)[..., 0]
        target.update(padded.tobytes())
    for tag in COLOUR_TAGS:
        setattr(out, tag, getattr(frame, tag))
    return out

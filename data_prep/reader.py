"""A source video, decoded once from front to back: each frame with the seconds in which it is shown, and as the
picture that is encoded and looked at."""

import errno
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Interpolation

from data_prep.filters import thumbnail
from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import MAX_PIXELS
from vidssl.data.decoding.rotation import Rotation, rotation_of

SHORTEST = 1 / 240  # seconds that the last frame is shown at least
MAX_GAP = 600.0  # seconds between two frames; beyond that the time stamps are wrong
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class BadStampsError(Exception):
    """Time stamps are missing, run backwards or leap."""


class Reader:
    """A video file, decoded once from front to back on one thread; damaged packets are skipped and counted.

    count: frames are timed not by their stamps but by the average rate.
    """

    def __init__(self, file: BinaryIO, count: bool = False):
        file.seek(0)
        try:
            self._container: Any = av.open(file)
        except (av.FFmpegError, OSError) as e:
            if _is_of_disk(e):
                raise
            raise DecodeError("not_a_video", getattr(e, "strerror", None) or str(e)[:200]) from e
        stream: Any = self._container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise DecodeError("no_video_stream")
        if stream.codec_context is None:
            raise DecodeError("no_decoder", "the codec is not built into FFmpeg")
        stream.codec_context.thread_count = 1
        self._stream, self._count, self.errors = stream, count, 0
        self.codec = stream.codec_context.codec.canonical_name
        self.rate = float(stream.average_rate or stream.guessed_rate or 25)

    def facts(self, first: "Picture") -> dict:
        """What the file was, for the meta of what is cut from it."""
        height, width = first.shown
        size = {"height": height, "width": width, "rotation": first.rotation}
        return {"codec": self.codec, "fps": round(self.rate, 3), **size}

    def decode(self) -> Iterator[av.VideoFrame]:
        """Every frame that decodes."""
        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    self.errors += 1
                    continue
                for frame in frames:
                    if frame.width * frame.height > MAX_PIXELS:
                        raise DecodeError("too_large", f"{frame.width}x{frame.height} pixels")
                    yield frame
        except (av.FFmpegError, OSError) as e:
            if _is_of_disk(e):
                raise
            self.errors += 1  # the container ends in the middle: what came before it stands

    def frames(self) -> Iterator[tuple[av.VideoFrame, float, float]]:
        """(frame, start, end): each and the seconds in which it is shown, from 0; the last as long as the mean one."""
        held: av.VideoFrame | None = None
        first = start = 0.0
        for i, frame in enumerate(self.decode()):
            if self._count:
                now = i / self.rate
            elif frame.pts is None:
                raise BadStampsError
            else:
                seconds = frame.pts * float(self._stream.time_base)
                first = first if i else seconds
                now = seconds - first
            if held is not None:
                if not 0 < now - start <= MAX_GAP:
                    raise BadStampsError
                yield held, start, now
            held, start, n = frame, now, i
        if held is None:
            raise DecodeError(
                "decode_error" if self.errors else "no_frames", f"{self.errors} damaged packets"
            )
        yield held, start, start + max(start / n if n else 1 / self.rate, SHORTEST)


def _is_of_disk(e: Exception) -> bool:
    """Whether it is the disk that failed; a damaged file makes FFmpeg seek to places that no file has."""
    return isinstance(e, OSError) and not isinstance(e, av.FFmpegError) and e.errno != errno.EINVAL


class Picture:
    """A source frame as it will be encoded: scaled, turned and looked at once, for however many pieces show it."""

    def __init__(self, frame: av.VideoFrame, short_side: int | None, size: tuple[int, int] | None):
        self._frame, self._turn = frame, rotation_of(frame)
        self.rotation = self._turn.degrees
        self.shown = (
            (frame.width, frame.height) if self._turn.swap else (frame.height, frame.width)
        )  # height, width
        self.size = size or even_size(self.shown, short_side)  # of the clip: that of the file's first frame
        self._yuv: av.VideoFrame | None = None
        self._thumb: np.ndarray | None = None

    def yuv(self) -> av.VideoFrame:
        if self._yuv is None:
            height, width = self.size[::-1] if self._turn.swap else self.size
            frame = self._frame.reformat(
                width, height, "yuv420p", interpolation=SCALING, dst_color_range=ColorRange.MPEG, threads=1
            )
            self._yuv = frame if self._turn == Rotation() else turned(frame, self._turn)
            self._yuv.pict_type = PictureType.NONE  # x264 would take over the source's
        return self._yuv

    def thumbnail(self) -> np.ndarray:
        if self._thumb is None:
            self._thumb = thumbnail(self.yuv())
        return self._thumb


def even_size(shown: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(height, width) of the clip: the short side at most `short_side`, even, not larger than the source."""
    scale = min(1.0, (short_side or math.inf) / min(shown))
    height, width = (max(2, min(2 * round(n * scale / 2), n - n % 2)) for n in shown)
    return height, width


def turned(frame: av.VideoFrame, turn: Rotation) -> av.VideoFrame:
    """A yuv420p frame as a player shows it."""
    planes = [
        np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width, None]  # type: ignore[call-overload]
        for p in frame.planes
    ]
    height, width = turn(planes[0]).shape[:2]
    out = av.VideoFrame(width, height, "yuv420p")
    for plane, target in zip(planes, out.planes, strict=True):
        padded = np.zeros((target.height, target.line_size), np.uint8)
        padded[:, : target.width] = turn(plane)[..., 0]
        target.update(padded.tobytes())
    for tag in ("color_range", "colorspace", "color_primaries", "color_trc"):
        setattr(out, tag, getattr(frame, tag))
    return out

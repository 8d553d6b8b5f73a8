"""A source video, decoded once from front to back: each frame with the seconds during which it is displayed,
and as the picture that is encoded and measured."""

import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Interpolation

from data_prep.thumbnails import thumbnail
from vidssl.core.errors import DecodeError
from vidssl.data.decoding.crop import NO_CROP, Crop
from vidssl.data.decoding.presentation import Presentation, display_facts, presentation_of
from vidssl.data.decoding.rotation import Rotation, rotation_of
from vidssl.data.decoding.time_stamps import MAX_GAP_S
from vidssl.data.decoding.video_stream import VideoStream

MIN_FRAME_S = 1 / 240  # seconds that the last frame is displayed at least
SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
COLOUR_TAGS = ("color_range", "colorspace", "color_primaries", "color_trc")


class BadStampsError(Exception):
    """Time stamps are missing, decrease or leap: they need repair."""


class Reader:
    """A video file, decoded once from front to back on one thread; damaged packets are skipped and counted.

    Seconds are those of the file's clock (see VideoStream.delay).
    """

    def __init__(self, file: BinaryIO):
        self._stream = VideoStream(file)
        self.codec = self._stream.codec
        # Frames per second: what the file says until two frames are known, then what is measured.
        self.rate = self._stream.usual_rate
        self._times: np.ndarray | None = None  # f64 [frames], seconds of the file's clock, repaired
        self._repairs: dict[str, int] = {}
        self._shown: Presentation | None = None  # known after the first frame
        self._crop_frame = FrameCropper(NO_CROP, (0, 0))

    def repair(self, on_progress: Callable[[], None]) -> None:
        """Decodes the file once and repairs its time stamps. on_progress: called for every frame."""
        pts = []
        for frame in self.decode():
            pts.append(frame.pts)
            on_progress()
        first, times, self._repairs = self._stream.frame_times(pts)
        self._times = times + self._stream.delay(first)
        self._stream.rewind()
        self._stream.damaged_packets = 0

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
        repairs = {"time_repairs": self._repairs} if self._repairs else {}
        assert self._shown is not None  # a picture was decoded
        shown = display_facts(self._shown.crop, self._shown.not_applied)
        return {"codec": self.codec, "fps": round(self.rate, 3), **size, **shown, **repairs}

    def decode(self) -> Iterator[av.VideoFrame]:
        """Yields every frame that decodes, cropped as it is shown; not yet turned."""
        for frame in self._stream.decode():
            if self._shown is None:
                self._shown = presentation_of(self._stream, frame)
                self._crop_frame = FrameCropper(self._shown.stored_crop, (frame.height, frame.width))
            yield self._crop_frame(frame)

    def frames(self) -> Iterator[tuple[av.VideoFrame, float, float]]:
        """Yields (frame, start, end): seconds of the file's clock during which each frame is displayed.

        The last frame is displayed for the mean duration. Raises BadStampsError for time stamps
        that need repair.
        """
        previous: av.VideoFrame | None = None
        first = start = 0.0
        frames = 0
        for frame, seconds in self._timed():
            if previous is not None:
                if self._times is None and not 0 < seconds - start <= MAX_GAP_S:
                    raise BadStampsError
                yield previous, start, seconds
            else:
                first = seconds
            previous = frame
            start = seconds
            frames += 1
            if start > first:
                self.rate = (frames - 1) / (start - first)
        if previous is None:
            reason = "decode_error" if self.errors else "no_frames"
            raise DecodeError(reason, f"{self.errors} damaged packets")
        duration = (start - first) / (frames - 1) if frames > 1 else 1 / self.rate
        yield previous, start, start + max(duration, MIN_FRAME_S)

    def _timed(self) -> Iterator[tuple[av.VideoFrame, float]]:
        """Yields each frame with its time in seconds of the file's clock."""
        first = 0
        delay = 0.0
        for i, frame in enumerate(self.decode()):
            if self._times is not None:
                if i < len(self._times):
                    yield frame, float(self._times[i])
                continue
            if frame.pts is None:
                raise BadStampsError
            if i == 0:
                first = frame.pts
                delay = self._stream.delay(first * self._stream.time_base)
            yield frame, delay + (frame.pts - first) * self._stream.time_base


class FrameCropper:
    """Crops decoded frames by FFmpeg's filter. Where frames have half as many chroma as luma pixels, an odd
    margin moves chroma by half a luma pixel. A frame of another size than the first is scaled to it before,
    since the crop counts pixels of the first."""

    def __init__(self, crop: Crop, size: tuple[int, int]):
        """size: (height, width) of the first frame as it is stored, within which the crop is."""
        self._crop = crop
        self._height, self._width = size
        self._kind: tuple | None = None  # of the frames that the graph takes
        self._graph: Any = None

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self._crop == NO_CROP:
            return frame
        if (frame.height, frame.width) != (self._height, self._width):
            frame = frame.reformat(self._width, self._height, interpolation=SCALING, threads=1)
        kind = (frame.width, frame.height, frame.format.name, frame.time_base)
        if kind != self._kind:
            self._kind = kind
            self._graph = self._make_graph(frame)
        self._graph.push(frame)
        return self._graph.pull()

    def _make_graph(self, frame: av.VideoFrame) -> Any:
        height, width = self._crop.shown_size((frame.height, frame.width))
        graph: Any = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        crop = graph.add("crop", f"{width}:{height}:{self._crop.left}:{self._crop.top}:exact=1")
        source.link_to(crop)
        crop.link_to(graph.add("buffersink"))
        graph.configure()
        return graph


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

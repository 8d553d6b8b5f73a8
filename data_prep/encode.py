"""Re-encodes videos as clips for training: H.264 in mp4 (yuv420p, faststart, no audio), quick to seek in.

Every `keyframe_every`-th frame is a key frame of a closed group, there are no B-frames, the short side is at
most `short_side` (even sizes, never enlarged), rotation is applied. With `fps`, frame n is the one that the
source displays at n / fps (by its time stamps, also if the rate varies); without, frames keep their own
times. A file is decoded once for all clips cut from it:

- segments that its annotations name, in seconds of the file's clock, as a player shows it and FFmpeg's
  `-ss` counts: it starts with the earliest stream, so a picture that begins after the sound is late;
- `window`: clips of that many seconds, one every `hop` seconds from the first frame; the last must be
  complete, unless the file is shorter than one window;
- `scenes`: a scene begins where the mean luma difference to the previous frame exceeds that frame's own
  difference to the one before it by SCENE_RISE grey levels (luma in 32x32 blocks; see data_prep.filters).

x264's options are those of data_prep.x264 and pixels are scaled bit-exactly, so that the same file gives the
same bytes every time.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange

from data_prep.filters import Filters, Rejected, evenly_spaced_indices
from data_prep.reader import BadStampsError, Picture, Reader
from data_prep.recipe import Recipe
from data_prep.x264 import x264_options

TIME_TOLERANCE = 2e-3  # seconds; some containers keep time stamps in milliseconds
TICKS_PER_SECOND = 90_000  # time base of frames that keep their own times
DEFAULT_RATE = 25  # frames per second, of a clip of one frame
SCENE_RISE = 25.0  # grey levels; reached by 1 of 60 real clips of one shot and all of 38 joints between clips
MAX_THUMBNAILS = 1024  # kept per clip; beyond that every second one is dropped
PROGRESS_EVERY = 32  # frames between two calls of `on_progress`

Span = tuple[float | None, float | None]  # start and end in seconds; None: those of the file


class EncodedSample(NamedTuple):
    """A sample of a shard. data: bytes of the clip; None: the file keeps its bytes. item: index among its
    items."""

    meta: dict
    data: bytes | None = None
    item: int = 0
    start: float | None = None
    end: float | None = None


class ClipWriter:
    """Encodes one clip: what the source displays from `start` to `end` seconds (infinite: to the end of the
    file)."""

    def __init__(self, recipe: Recipe, keep_thumbnails: bool, item: int, start: float, end: float):
        """keep_thumbnails: keep thumbnails for the filters. item: index of the clip's item among those of the
        file."""
        self.recipe = recipe
        self.item = item
        self.start = start
        self.end = end
        self.stamps: list[int] = []  # one per frame, in units of `time_base` seconds
        self.thumbnails: list[np.ndarray] = []  # of every `thumbnail_step`-th frame, at most MAX_THUMBNAILS
        self.thumbnail_step = 1
        self.size = (0, 0)  # height, width
        self._keep_thumbnails = keep_thumbnails
        self._fps = Fraction(recipe.fps) if recipe.fps else None
        self.time_base = 1 / self._fps if self._fps else Fraction(1, TICKS_PER_SECOND)
        self._first_frame_at = start  # seconds
        self._container: Any = None

    @property
    def duration(self) -> float:
        """Seconds. If frames keep their own times, the last frame counts as long as the mean of the
        others."""
        n = len(self.stamps)
        if n > 1:
            return float(self.stamps[-1] * self.time_base * n / (n - 1))
        return float(1 / (self._fps or DEFAULT_RATE))

    def add(self, picture: Picture, start: float, end: float) -> None:
        """Encodes a picture that the source displays from `start` to `end`. Called in order, without gaps."""
        if self._fps is None:
            if self.start - TIME_TOLERANCE <= start < self.end - TIME_TOLERANCE:
                if not self.stamps:
                    self._first_frame_at = start
                self._encode(picture, round((start - self._first_frame_at) * TICKS_PER_SECOND))
            return
        if not self.stamps:
            self._first_frame_at = max(self.start, start)
        last = min(end, self.end) - TIME_TOLERANCE
        while self._first_frame_at + float(len(self.stamps) / self._fps) < last:
            self._encode(picture, len(self.stamps))

    def _encode(self, picture: Picture, stamp: int) -> None:
        frame = picture.yuv()
        if self._container is None:
            self._open(picture)
        frame.pts = stamp
        frame.time_base = self.time_base
        self._container.mux(self._stream.encode(frame))
        if self._keep_thumbnails and len(self.stamps) % self.thumbnail_step == 0:
            self.thumbnails.append(picture.thumbnail())
        if len(self.thumbnails) > MAX_THUMBNAILS:
            self.thumbnails = self.thumbnails[::2]
            self.thumbnail_step *= 2
        self.stamps.append(stamp)

    def _open(self, picture: Picture) -> None:
        """Opens the mp4 file and its stream, with size and colours of the first picture."""
        recipe = self.recipe
        # A named file, because faststart opens it a second time.
        self._file = tempfile.NamedTemporaryFile(suffix=".mp4")  # noqa: SIM115
        self._container = av.open(self._file.name, "w", format="mp4", options={"movflags": "faststart"})
        options = x264_options(recipe.crf, recipe.preset, recipe.keyframe_every)
        self._stream = self._container.add_stream("libx264", rate=self._fps or DEFAULT_RATE, options=options)
        self.size = picture.size
        self._stream.height, self._stream.width = picture.size
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        self._stream.time_base = context.time_base = self.time_base
        context.color_range = ColorRange.MPEG
        for tag in ("colorspace", "color_primaries", "color_trc"):
            setattr(context, tag, getattr(picture.yuv(), tag))

    def close(self) -> bytes:
        """Returns the bytes of the finished file, none if no frame was added."""
        if self._container is None:
            return b""
        self._container.mux(self._stream.encode())
        self._container.close()
        with self._file:
            return Path(self._file.name).read_bytes()


class SceneDetector:
    """Finds the first pictures of scenes; pictures come in order."""

    def __init__(self) -> None:
        self._previous: np.ndarray | None = None  # thumbnail
        self._change = 0.0  # grey levels, of the previous picture to the one before it

    def is_cut(self, picture: Picture) -> bool:
        """Returns whether a new scene begins with this picture."""
        thumbnail = picture.thumbnail()
        change = 0.0 if self._previous is None else float(np.abs(thumbnail - self._previous).mean())
        rise = change - self._change
        self._previous = thumbnail
        self._change = change
        return rise >= SCENE_RISE


def encode_clips(
    file: BinaryIO,
    spans: Sequence[Span],
    recipe: Recipe,
    filters: Filters,
    on_progress: Callable[[], None],
) -> list[EncodedSample | Rejected]:
    """Cuts and encodes all clips of a video file. Returns them sorted by item and start.

    spans: one per item of the file. on_progress: called every PROGRESS_EVERY frames (callers have deadlines).
    """
    try:
        with closing(Reader(file)) as reader:
            return ClipCutter(reader, spans, recipe, filters).run(on_progress)
    except BadStampsError:
        with closing(Reader(file)) as reader:
            reader.repair(on_progress)
            return ClipCutter(reader, spans, recipe, filters).run(on_progress)


class ClipCutter:
    """One pass over a video that feeds every frame to the clips it belongs to."""

    def __init__(self, reader: Reader, spans: Sequence[Span], recipe: Recipe, filters: Filters):
        self._reader = reader
        self._spans = spans
        self._recipe = recipe
        self._filters = filters
        self._begin_s = 0.0  # when the first frame is displayed
        self._planned = self._plan_clips()
        self._next: ClipWriter | None = None  # begins later than the frames so far
        self._open: list[ClipWriter] = []
        self._outcomes: list[EncodedSample | Rejected] = []
        self._source_meta: dict = {}  # "original" in the meta of each clip

    def run(self, on_progress: Callable[[], None]) -> list[EncodedSample | Rejected]:
        scenes = SceneDetector()
        size = None
        for i, (frame, start, end) in enumerate(self._reader.frames()):
            if i % PROGRESS_EVERY == 0:
                on_progress()
            picture = Picture(frame, self._recipe.short_side, size)
            if size is None:
                size = picture.size
                self._begin_s = start
                self._next = next(self._planned)
                self._source_meta = self._reader.facts(picture)
                too_small = self._filters.check_size(min(picture.shown))
                if too_small:
                    return [
                        too_small._replace(item=k, start=s, end=e) for k, (s, e) in enumerate(self._spans)
                    ]
            if self._recipe.scenes and scenes.is_cut(picture):
                self._open[-1].end = start
                self._next = self._new_clip(0, start, math.inf)
            self._add_frame(picture, start, end)
            if not self._open and self._next is None:
                break
        self._end_of_file(start, end)
        self._source_meta["fps"] = round(self._reader.rate, 3)
        return sorted(self._outcomes, key=lambda outcome: (outcome.item, outcome.start or 0.0))

    def _new_clip(self, item: int, start: float, end: float) -> ClipWriter:
        return ClipWriter(self._recipe, self._filters.need_thumbnails, item, start, end)

    def _plan_clips(self) -> Iterator[ClipWriter]:
        """Yields clips by start: infinitely many windows, or the items. Scenes are found on the way."""
        if self._recipe.window:
            for k in itertools.count():
                start = self._begin_s + k * (self._recipe.hop or self._recipe.window)
                yield self._new_clip(0, start, start + self._recipe.window)
        for item in sorted(range(len(self._spans)), key=lambda k: self._spans[k][0] or 0.0):
            first, last = self._spans[item]
            yield self._new_clip(item, first or 0.0, math.inf if last is None else last)

    def _add_frame(self, picture: Picture, start: float, end: float) -> None:
        """Feeds a picture, displayed from `start` to `end`, to all clips that it belongs to; finishes those
        at their end."""
        while self._next is not None and self._next.start <= max(start, end - TIME_TOLERANCE):
            self._open.append(self._next)
            self._next = next(self._planned, None)
        for clip in self._open:
            clip.add(picture, start, end)
        self._outcomes += [self._finish(clip) for clip in self._open if clip.end <= end]
        self._open = [clip for clip in self._open if clip.end > end]

    def _end_of_file(self, start: float, end: float) -> None:
        """Finishes the open clips; `start`, `end`: of the last frame."""
        for clip in self._open:
            if self._recipe.window and clip.start > self._begin_s and clip.end > end + (end - start) / 2:
                clip.close()  # an incomplete window
            else:
                clip.end = min(clip.end, end)
                self._outcomes.append(self._finish(clip))
        while self._next is not None and not self._recipe.window:
            item = self._next.item
            detail = f"begins at {self._next.start:g} s of {end:.3f}"
            self._outcomes.append(Rejected("outside", detail, round(end, 3), item, *self._spans[item]))
            self._next = next(self._planned, None)

    def _finish(self, clip: ClipWriter) -> EncodedSample | Rejected:
        data = clip.close()
        frames = len(clip.stamps)
        start, end = self._spans[clip.item]
        is_cut = clip.start > self._begin_s or self._recipe.window or self._recipe.scenes
        if (start, end) == (None, None) and is_cut:
            start, end = round(clip.start, 3), round(clip.end, 3)
        if not frames:
            return Rejected(
                "no_frames", f"no frame begins between {start} and {end} s", 0, clip.item, start, end
            )
        rejected = self._filters.check_clip(
            clip.duration, lambda: [clip.thumbnails[i] for i in evenly_spaced_indices(len(clip.thumbnails))]
        )
        if rejected:
            return rejected._replace(item=clip.item, start=start, end=end)
        meta = {
            "decoder": "pyav",
            "frames": frames,
            "height": clip.size[0],
            "width": clip.size[1],
            "fps": round(frames / clip.duration, 6),
            "duration": round(clip.duration, 6),
            "codec": "h264",
            "rotation": 0,
            "original": self._source_meta,
        }
        return EncodedSample(meta, data, clip.item, start, end)

"""Videos -> clips made for training: H.264 in mp4 (yuv420p, faststart, no audio) that a loader can enter anywhere.

Every `keyframe_every`-th frame is a key frame of a closed group, there are no B-frames, the short side is at most
`short_side` (even sizes, never enlarged), rotation is applied. With `fps` frame n is the one the source shows at
n / fps (its time stamps decide, also where the rate varies); without, frames keep their own times. A file is decoded
once for all pieces cut from it:

- segments that its annotations name, in seconds from the first frame;
- `window`: of so many seconds, one every `hop`; the last must be full, except in a file that is shorter than one;
- `scenes`: a new one begins where the mean luma difference to the frame before is SCENE grey levels larger than
  that frame's to the one before it (luma in 32x32 blocks; see data_prep.filters).

x264 runs on one thread without macroblock trees, and pixels are scaled bit-exactly, so that the same file gives the
same bytes every time (on small pictures x264 does not repeat itself with B-frames or macroblock trees).
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange

from data_prep.filters import Filters, Rejected, sample_indices
from data_prep.reader import BadStampsError, Picture, Reader

SLACK = 2e-3  # seconds; some containers keep time stamps in milliseconds
TICKS = 90_000  # a second, of frames that keep their own times
SCENE = 25.0  # grey levels; of 60 real clips of one shot one has such a rise, of 38 joints between clips none has less
THUMBS = 1024
GREY_LEVELS = 6.0  # by which decord's frames may differ from those that were encoded, in blocks

Span = tuple[float | None, float | None]  # start and end in seconds; None: of the file


class Recipe(NamedTuple):
    """How clips are encoded and cut. fps: frames a second, as the user wrote it; window, hop: seconds."""

    short_side: int | None = None
    fps: str | None = None
    keyframe_every: int = 8
    crf: int = 23
    preset: str = "medium"
    window: float | None = None
    hop: float | None = None
    scenes: bool = False


class EncodedSample(NamedTuple):
    """What goes into a shard. data: the bytes of a piece; None: those of the file. item: which of the file's."""

    meta: dict
    data: bytes | None = None
    item: int = 0
    start: float | None = None
    end: float | None = None


class ClipWriter:
    """One clip in the making: from `start` until `end` (seconds in the source; infinite: until the file ends)."""

    def __init__(self, recipe: Recipe, look: bool, item: int, start: float, end: float):
        """look: keep thumbnails for the filters."""
        self.item, self.start, self.end, self._look = item, start, end, look
        self.stamps: list[int] = []  # of its frames, in `unit` seconds
        self.thumbs: list[np.ndarray] = []  # of every `step`-th frame, at most THUMBS
        self.step = 1
        self.size = (0, 0)  # height, width
        self._recipe, self._fps = recipe, Fraction(recipe.fps) if recipe.fps else None
        self.unit = 1 / self._fps if self._fps else Fraction(1, TICKS)
        self._first = start  # where its first frame begins
        self._box: Any = None

    @property
    def seconds(self) -> float:
        """Its length: a last frame of a file's own rate is shown as long as the mean one."""
        n = len(self.stamps)
        return float(self.stamps[-1] * self.unit * n / (n - 1)) if n > 1 else float(1 / (self._fps or 25))

    def show(self, picture: Picture, start: float, end: float) -> None:
        """What the source shows from `start` until `end`; called in order, without gaps."""
        if self._fps is None:
            if self.start - SLACK <= start < self.end - SLACK:
                self._first = self._first if self.stamps else start
                self._write(picture, round((start - self._first) * TICKS))
            return
        while self.start + float(len(self.stamps) / self._fps) < min(end, self.end) - SLACK:
            self._write(picture, len(self.stamps))

    def _write(self, picture: Picture, stamp: int) -> None:
        frame = picture.yuv()
        if self._box is None:
            self._open(picture)
        frame.pts, frame.time_base = stamp, self.unit
        self._box.mux(self._stream.encode(frame))
        if self._look and len(self.stamps) % self.step == 0:
            self.thumbs.append(picture.thumbnail())
        if len(self.thumbs) > THUMBS:
            self.thumbs, self.step = self.thumbs[::2], 2 * self.step
        self.stamps.append(stamp)

    def _open(self, picture: Picture) -> None:
        r, frame, every = self._recipe, picture.yuv(), str(self._recipe.keyframe_every)
        options = {
            **{"crf": str(r.crf), "preset": r.preset, "threads": "1", "bf": "0", "x264-params": "mbtree=0"},
            **{"g": every, "keyint_min": every, "sc_threshold": "0", "flags": "+cgop", "a53cc": "0"},
        }
        # with a name, because faststart opens the file a second time
        self._file = tempfile.NamedTemporaryFile(suffix=".mp4")  # noqa: SIM115
        self._box = av.open(self._file.name, "w", format="mp4", options={"movflags": "faststart"})
        self._stream = self._box.add_stream("libx264", rate=self._fps or 25, options=options)
        self.size = self._stream.height, self._stream.width = picture.size
        self._stream.pix_fmt, context = "yuv420p", self._stream.codec_context
        self._stream.time_base = context.time_base = self.unit
        context.color_range = ColorRange.MPEG
        for tag in ("colorspace", "color_primaries", "color_trc"):
            setattr(context, tag, getattr(frame, tag))

    def close(self) -> bytes:
        """The finished file."""
        if self._box is None:
            return b""
        self._box.mux(self._stream.encode())
        self._box.close()
        with self._file:
            return Path(self._file.name).read_bytes()


def encode_clips(
    file: BinaryIO, spans: Sequence[Span], recipe: Recipe, filters: Filters, alive: Callable[[], None]
) -> list[EncodedSample | Rejected]:
    """All pieces of a video file, encoded. alive: called now and then, for who waits with a deadline."""
    try:
        return _cut(Reader(file), spans, recipe, filters, alive)
    except BadStampsError:
        return _cut(Reader(file, count=True), spans, recipe, filters, alive)


def _cut(
    reader: Reader, spans: Sequence[Span], recipe: Recipe, filters: Filters, alive: Callable[[], None]
) -> list[EncodedSample | Rejected]:
    coming = _pieces(spans, recipe, filters.look)
    after: ClipWriter | None = next(coming)
    going: list[ClipWriter] = []
    found: list[EncodedSample | Rejected] = []
    scenes, size = Scenes(), None
    original: dict = {}
    for i, (frame, start, end) in enumerate(reader.frames()):
        if i % 32 == 0:
            alive()
        picture = Picture(frame, recipe.short_side, size)
        if size is None:
            size, original = picture.size, reader.facts(picture)
            small = filters.check_size(min(picture.shown))
            if small:
                return [small._replace(item=k, start=s, end=e) for k, (s, e) in enumerate(spans)]
        if recipe.scenes and scenes.begins(picture):
            going[-1].end, after = start, ClipWriter(recipe, filters.look, 0, start, math.inf)
        while after is not None and after.start <= max(start, end - SLACK):
            going.append(after)
            after = next(coming, None)
        for piece in going:
            piece.show(picture, start, end)
        found += [_finish(p, spans, filters, original) for p in going if p.end <= end]
        going = [p for p in going if p.end > end]
        if not going and after is None:
            break
    for piece in going:
        if recipe.window and piece.start > 0 and piece.end > end + (end - start) / 2:
            piece.close()  # a window that is not full
        else:
            piece.end = min(piece.end, end)
            found.append(_finish(piece, spans, filters, original))
    while after is not None and not recipe.window:
        where = Rejected("outside", f"begins at {after.start:g} s of {end:.3f}", round(end, 3), after.item)
        found.append(where._replace(start=spans[after.item][0], end=spans[after.item][1]))
        after = next(coming, None)
    return sorted(found, key=lambda f: (f.item, f.start or 0.0))


def _pieces(spans: Sequence[Span], recipe: Recipe, look: bool) -> Iterator[ClipWriter]:
    """In the order of their starts; windows without end. (Scenes are found on the way.)"""
    if recipe.window:
        for k in itertools.count():
            start = k * (recipe.hop or recipe.window)
            yield ClipWriter(recipe, look, 0, start, start + recipe.window)
    for item in sorted(range(len(spans)), key=lambda k: spans[k][0] or 0.0):
        first, last = spans[item]
        yield ClipWriter(recipe, look, item, first or 0.0, math.inf if last is None else last)


class Scenes:
    """Whether a new scene begins with this picture; asked of each in order."""

    def __init__(self) -> None:
        self._before: np.ndarray | None = None
        self._change = 0.0

    def begins(self, picture: Picture) -> bool:
        now = picture.thumbnail()
        change = 0.0 if self._before is None else float(np.abs(now - self._before).mean())
        rise, self._before, self._change = change - self._change, now, change
        return rise >= SCENE


def _finish(
    piece: ClipWriter, spans: Sequence[Span], filters: Filters, original: dict
) -> EncodedSample | Rejected:
    data, n = piece.close(), len(piece.stamps)
    start, end = spans[piece.item]
    if start is None and end is None and (piece.start > 0 or piece._recipe.window or piece._recipe.scenes):
        start, end = round(piece.start, 3), round(piece.end, 3)
    if not n:
        return Rejected(
            "no_frames", f"no frame begins between {start} and {end} s", 0, piece.item, start, end
        )
    dropped = filters.check_clip(
        piece.seconds, lambda: [piece.thumbs[i] for i in sample_indices(len(piece.thumbs))]
    )
    if dropped:
        return dropped._replace(item=piece.item, start=start, end=end)
    meta: dict = {
        **{"decoder": "pyav", "frames": n, "height": piece.size[0], "width": piece.size[1]},
        **{
            "fps": round(n / piece.seconds, 6),
            "duration": round(piece.seconds, 6),
            "codec": "h264",
            "rotation": 0,
        },
        "original": original,
    }
    return EncodedSample(meta, data, piece.item, start, end)

"""What is in a file, found out in a child process, and there cut and encoded where that is asked for: a decoder that
crashes or hangs costs one file, not the run."""

import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import EncodedSample, Recipe, Span, encode_clips
from data_prep.filters import NO_FILTERS, Filters, Rejected, sample_indices, thumbnail
from data_prep.reader import Reader
from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import IMAGE_EXTENSIONS, Video
from vidssl.data.decoding.image import ImageVideo
from vidssl.data.decoding.pyav import PyAVVideo

GREY_LEVELS = 6.0  # decord and PyAV convert some pixel formats (10 bit, odd sizes) a little differently
SLACK = 0.05  # grey levels by which a neighbour may look nearer than the frame itself
LARGE = 400_000  # pixels; larger frames are compared in fewer places, for time and memory
EVEN = 1e-4  # seconds that a frame may be off i / fps where only the fps is written down
SECONDS = 2e-3  # decord keeps time stamps in 32 bits


def inspect_file(data: bytes, ext: str, decoder: str, report: Callable[[dict], None]) -> None:
    """Calls `report` with what a sample's meta says about its frames; a second time when more is known.

    The first report holds whatever comes after: frames are those of a full decode with PyAV, and "times" (seconds, one
    a frame; null: evenly spaced) makes PyAV serve exactly these by counting from the start. Then PyAV's seeking is
    compared with that, and decord, which may crash (unless `decoder` is "pyav" or the file is damaged).
    """
    if not data:
        raise DecodeError("empty")
    if ext in IMAGE_EXTENSIONS:
        report(_meta(ImageVideo(data)))
        return
    truth = PyAVVideo(data)
    meta = _meta(truth)
    even = np.abs(truth.times - np.arange(len(truth)) / (meta["fps"] or 1.0)).max() < EVEN
    counted = {**meta, "times": None if even else truth.times.round(6).tolist()}
    report(counted)
    sample_indices = 6 if truth.size[0] * truth.size[1] < LARGE else 3
    anchors = np.unique(np.linspace(0, len(truth) - 1, sample_indices).astype(int))
    near = np.unique(np.concatenate([anchors - 1, anchors, anchors + 1]).clip(0, len(truth) - 1))
    frames = dict(zip(near.tolist(), map(_thin, truth.get(near)), strict=True))
    seeks = truth.packets_tell and _serves(PyAVVideo, data, meta, truth, anchors, frames)
    if seeks:
        report(meta)
    if decoder != "auto" or truth.errors:
        return
    from vidssl.data.decoding.decord import DecordVideo  # it needs torch, which takes a while

    if _serves(DecordVideo, data, meta, truth, anchors, frames):
        report({**meta, "decoder": "pyav" if seeks else "decord", "decord": True})


def _meta(video: Video) -> dict:
    last = float(video.times[-1])
    fps = (len(video) - 1) / last if last > 0 else getattr(video, "rate", 0.0)
    return {
        "decoder": video.decoder,
        "frames": len(video),
        "height": int(video.size[0]),
        "width": int(video.size[1]),
        "fps": round(fps, 6),
        "duration": round(last + (1 / fps if fps else 0.0), 6),
        "codec": video.codec,
        "rotation": video.rotation,
        **({"damaged_packets": video.errors} if video.errors else {}),
    }


def _serves(
    kind: Callable[[bytes, dict], Video],
    data: bytes,
    meta: dict,
    truth: Video,
    anchors: np.ndarray,
    frames: dict,
) -> bool:
    """Whether `kind` gives the true frames: one by one backwards (each a seek), then in one forward run."""
    try:
        video = kind(data, meta)
        if len(video) != len(truth) or np.abs(video.times - truth.times).max() > SECONDS:
            return False
        order = [[i] for i in anchors[::-1].tolist()] + [list(frames)]
        return all(
            _same(i, got, frames)
            for wanted in order
            for i, got in zip(wanted, video.get(wanted), strict=True)
        )
    except DecodeError:
        return False


def _same(i: int, got: np.ndarray, frames: dict[int, np.ndarray]) -> bool:
    """Whether `got` (u8 [H,W,3]) is frame i, and not rather its neighbour; `frames` are thinned."""
    thin = _thin(got)
    off = {
        j: np.abs(np.subtract(thin, frames[j], dtype=np.int16)).mean()
        for j in (i - 1, i, i + 1)
        if j in frames
    }
    return off[i] <= GREY_LEVELS and off[i] <= min(off.values()) + SLACK


def _thin(frame: np.ndarray) -> np.ndarray:
    """Every k-th pixel of u8 [H,W,3], about 60,000: enough to tell frames apart, in a tenth of the time."""
    k = max(1, math.isqrt(frame.shape[0] * frame.shape[1] // 60_000))
    return frame[::k, ::k].copy()


class _DroppedError(Exception):
    """A filter wants the file out."""


def original(
    path: Path,
    ext: str,
    decoder: str,
    filters: Filters,
    report: Callable[[dict], None],
    alive: Callable[[], None],
) -> None:
    """Probe a file whose bytes are kept; raises _DroppedError(Rejected) before anything else is known of it."""

    def check_first(meta: dict) -> None:
        dropped = filters.check_size(min(meta["height"], meta["width"]))
        if dropped is None and meta["decoder"] != "image":
            dropped = filters.check_clip(meta["duration"], lambda: _thumbs(path, meta["frames"], alive))
        if dropped is not None:
            raise _DroppedError(dropped)
        report(meta)

    inspect_file(path.read_bytes(), ext, decoder, check_first)


def _thumbs(path: Path, frames: int, alive: Callable[[], None]) -> list[np.ndarray]:
    wanted = set(sample_indices(frames).tolist())
    found = []
    with open(path, "rb") as file:
        for i, frame in enumerate(Reader(file).decode()):
            if i % 32 == 0:
                alive()
            if i in wanted:
                found.append(thumbnail(frame))
    return found


Send = Callable[[tuple[str, object]], None]


def serve(conn: Connection, answer: Callable[..., None]) -> None:
    """The child: jobs come in, answer(*job, send) sends any number of ("alive", None) and ("known", found); then goes
    ("done", None) if the last found stands, or ("rejected", reason)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    while True:
        try:
            job = conn.recv()
        except EOFError:
            return
        try:
            answer(*job, conn.send)
            conn.send(("done", None))
        except _DroppedError as e:
            conn.send(("rejected", e.args[0]))
        except DecodeError as e:
            conn.send(("rejected", Rejected(e.reason, str(e).removeprefix(e.reason).removeprefix(": "))))
        except OSError as e:
            conn.send(("rejected", Rejected("unreadable", e.strerror or "")))
        except MemoryError:
            conn.send(("rejected", Rejected("too_large", "out of memory")))


def _look_into(
    decoder: str,
    recipe: Recipe | None,
    filters: Filters,
    path: str,
    ext: str,
    spans: Sequence[Span],
    send: Send,
) -> None:
    """Found is a list of Sample and Rejected."""
    alive: Callable[[], None] = lambda: send(("alive", None))  # noqa: E731
    if recipe and ext not in IMAGE_EXTENSIONS:
        with open(path, "rb") as file:
            if not file.read(1):
                raise DecodeError("empty")
            send(("known", encode_clips(file, spans, recipe, filters, alive)))
    elif any(span != (None, None) for span in spans):
        raise DecodeError("not_a_video", "a picture has no segments")
    else:
        original(
            Path(path), ext, decoder, filters, lambda meta: send(("known", [EncodedSample(meta)])), alive
        )


def _serve(conn: Connection, decoder: str, recipe: Recipe | None, filters: Filters) -> None:
    serve(conn, partial(_look_into, decoder, recipe, filters))


class WorkerPool:
    """Child processes, one per calling thread, that answer jobs; one that dies or is late is replaced.

    target: what a child runs, with its end of a pipe and `wishes`. timeout: seconds without a sign of progress.
    """

    def __init__(self, target: Callable[..., None], wishes: tuple, timeout: float):
        self._target, self._timeout, self._wishes = target, timeout, wishes
        self._local, self._lock = threading.local(), threading.Lock()
        self._children: list[BaseProcess] = []
        self._spawn = multiprocessing.get_context("spawn")

    def ask(self, *job: Any) -> Any:
        """What a child found, or Rejected."""
        if getattr(self._local, "child", None) is None:
            self._start()
        conn, known = self._local.conn, None
        try:
            conn.send(job)
            deadline = time.monotonic() + self._timeout
            while conn.poll(max(0.0, deadline - time.monotonic())):
                kind, value = conn.recv()
                if kind == "alive":
                    deadline = time.monotonic() + self._timeout
                elif kind == "known":
                    known = value
                elif kind == "done" and known is not None:
                    return known
                else:
                    return value
            failure = Rejected("timeout", f"no answer in {self._timeout:g} s")
        except (EOFError, OSError):
            self._local.child.join()
            failure = Rejected(
                "decoder_crash", f"the decoder's process ended with {self._local.child.exitcode}"
            )
        self._local.child.kill()
        self._local.child = None
        return known if known is not None else failure

    def _start(self) -> None:
        ours, theirs = self._spawn.Pipe()
        child = self._spawn.Process(target=self._target, args=(theirs, *self._wishes), daemon=True)
        with self._lock:  # so that no other child is started while `theirs` is open here
            child.start()
            theirs.close()
            self._children.append(child)
        self._local.child, self._local.conn = child, ours

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.join()


class FileInspector(WorkerPool):
    """Looks into files."""

    def __init__(
        self, decoder: str, timeout: float, recipe: Recipe | None = None, filters: Filters = NO_FILTERS
    ):
        super().__init__(_serve, (decoder, recipe, filters), timeout)

    def __call__(
        self, path: Path, ext: str, spans: Sequence[Span] = ((None, None),)
    ) -> list[EncodedSample | Rejected]:
        """What the file gives. Where it is rejected as a whole: the reason, for each of `spans`."""
        found = self.ask(str(path), ext, spans)
        if isinstance(found, Rejected):
            return [found._replace(item=i, start=start, end=end) for i, (start, end) in enumerate(spans)]
        return found

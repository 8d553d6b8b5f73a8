"""What is in a file, found out in a child process: a decoder that crashes or hangs costs one file, not the run."""

import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidssl.data.decoders import IMAGE_EXTENSIONS, DecordVideo, ImageVideo, PyAVVideo, Video
from vidssl.errors import DecodeError

GREY_LEVELS = 6.0  # decord and PyAV convert some pixel formats (10 bit, odd sizes) a little differently
SLACK = 0.05  # grey levels by which a neighbour may look nearer than the frame itself
LARGE = 400_000  # pixels; larger frames are compared in fewer places, for time and memory
EVEN = 1e-4  # seconds that a frame may be off i / fps where only the fps is written down
SECONDS = 2e-3  # decord keeps time stamps in 32 bits


class Rejected(NamedTuple):
    reason: str
    detail: str


def probe(data: bytes, ext: str, decoder: str, report: Callable[[dict], None]) -> None:
    """Calls `report` with what a sample's meta says about its frames; a second time when more is known.

    The first report holds whatever comes after: frames are those of a full decode with PyAV, and "times" (seconds, one
    a frame; null: evenly spaced) makes PyAV serve exactly these by counting from the start. Then decord, which may
    crash, is compared with that (unless `decoder` is "pyav" or the file is damaged); where it fails, PyAV's seeking is.
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
    looks = 6 if truth.size[0] * truth.size[1] < LARGE else 3
    anchors = np.unique(np.linspace(0, len(truth) - 1, looks).astype(int))
    near = np.unique(np.concatenate([anchors - 1, anchors, anchors + 1]).clip(0, len(truth) - 1))
    frames = dict(zip(near.tolist(), map(_thin, truth.get(near)), strict=True))
    if decoder == "auto" and not truth.errors and _serves(DecordVideo, data, meta, truth, anchors, frames):
        report({**meta, "decoder": "decord"})
    elif truth.packets_tell and _serves(PyAVVideo, data, meta, truth, anchors, frames):
        report(meta)


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
    kind: type[DecordVideo] | type[PyAVVideo], data: bytes, meta: dict, truth: Video, anchors: np.ndarray, frames: dict
) -> bool:
    """Whether `kind` gives the true frames: one by one backwards (each a seek), then in one forward run."""
    try:
        video = kind(data, meta)
        if len(video) != len(truth) or np.abs(video.times - truth.times).max() > SECONDS:
            return False
        order = [[i] for i in anchors[::-1].tolist()] + [list(frames)]
        return all(_same(i, got, frames) for wanted in order for i, got in zip(wanted, video.get(wanted), strict=True))
    except DecodeError:
        return False


def _same(i: int, got: np.ndarray, frames: dict[int, np.ndarray]) -> bool:
    """Whether `got` (u8 [H,W,3]) is frame i, and not rather its neighbour; `frames` are thinned."""
    thin = _thin(got)
    off = {j: np.abs(np.subtract(thin, frames[j], dtype=np.int16)).mean() for j in (i - 1, i, i + 1) if j in frames}
    return off[i] <= GREY_LEVELS and off[i] <= min(off.values()) + SLACK


def _thin(frame: np.ndarray) -> np.ndarray:
    """Every k-th pixel of u8 [H,W,3], about 60,000: enough to tell frames apart, in a tenth of the time."""
    k = max(1, math.isqrt(frame.shape[0] * frame.shape[1] // 60_000))
    return frame[::k, ::k].copy()


def _serve(conn: Connection, decoder: str) -> None:
    """The child: paths come in; ("known", meta) once or twice, then ("done", None) or ("rejected", reason) go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    while True:
        try:
            path, ext = conn.recv()
        except EOFError:
            return
        try:
            probe(Path(path).read_bytes(), ext, decoder, lambda meta: conn.send(("known", meta)))
            conn.send(("done", None))
        except DecodeError as e:
            conn.send(("rejected", Rejected(e.reason, str(e).removeprefix(e.reason).removeprefix(": "))))
        except OSError as e:
            conn.send(("rejected", Rejected("unreadable", e.strerror or "")))
        except MemoryError:
            conn.send(("rejected", Rejected("too_large", "out of memory")))


class Prober:
    """Looks into files, one child process per calling thread; a child that dies or is late is replaced."""

    def __init__(self, decoder: str, timeout: float):
        self._decoder, self._timeout = decoder, timeout  # seconds a file
        self._local, self._lock = threading.local(), threading.Lock()
        self._children: list[BaseProcess] = []
        self._spawn = multiprocessing.get_context("spawn")

    def __call__(self, path: Path, ext: str) -> dict | Rejected:
        """meta of the file's frames, or why it is rejected."""
        if getattr(self._local, "child", None) is None:
            self._start()
        conn, deadline, known = self._local.conn, time.monotonic() + self._timeout, None
        try:
            conn.send((str(path), ext))
            while conn.poll(max(0.0, deadline - time.monotonic())):
                kind, value = conn.recv()
                if kind == "known":
                    known = value
                elif kind == "done" and known is not None:
                    return known
                else:
                    return value
            failure = Rejected("timeout", f"no answer in {self._timeout:g} s")
        except (EOFError, OSError):
            self._local.child.join()
            failure = Rejected("decoder_crash", f"the decoder's process ended with {self._local.child.exitcode}")
        self._local.child.kill()
        self._local.child = None
        return known if known is not None else failure

    def _start(self) -> None:
        ours, theirs = self._spawn.Pipe()
        child = self._spawn.Process(target=_serve, args=(theirs, self._decoder), daemon=True)
        with self._lock:  # so that no other child is started while `theirs` is open here
            child.start()
            theirs.close()
            self._children.append(child)
        self._local.child, self._local.conn = child, ours

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.join()

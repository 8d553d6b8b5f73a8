"""Measures the contents of a file: its frames, their times and size, and which decoders return the right
frames.

`FileInspector` does this in child processes, where files are also cut and re-encoded if there is a recipe, so
that a decoder that crashes or hangs costs one file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import EncodedSample, Span, encode_clips
from data_prep.filters import NO_FILTERS, Filters, Rejected, evenly_spaced_indices
from data_prep.frame_folder import folder_as_video
from data_prep.reader import Reader
from data_prep.recipe import Recipe
from data_prep.thumbnails import thumbnail
from data_prep.workers import WorkerPool
from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import Video
from vidssl.data.decoding.image import ImageVideo
from vidssl.data.decoding.presentation import display_facts
from vidssl.data.decoding.pyav import PyAVVideo
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.isolation import Reporter

MAX_DIFFERENCE = (
    6.0  # mean grey levels; decord and PyAV convert some pixel formats (10 bit, odd sizes) differently
)
NEIGHBOUR_SLACK = 0.05  # grey levels by which a neighbour may match better than the frame itself
LARGE_FRAME = 400_000  # pixels; larger frames are compared at fewer positions, for time and memory
FEW_FRAMES = 48  # so are shorter videos, of which each position may decode a good part
THIN_FRAME = (
    60_000  # pixels of a frame that are compared: enough to tell frames apart, in a tenth of the time
)
EVEN_S = 1e-4  # seconds; a frame may be this far from i / fps if only the fps is recorded
TIMES_S = 2e-3  # seconds; decord keeps time stamps in 32 bits

Inspected = list[EncodedSample | Rejected]


def inspect_file(data: bytes, ext: str, decoder: str) -> Iterator[dict]:
    """Yields the meta of a file's frames, and again when more is known; the last one counts.

    The first is safe whatever happens later: the frames are those of a full decode by PyAV, and "times"
    (seconds, one per frame; null: evenly spaced) makes PyAV serve exactly these by counting from the start.
    Then PyAV's seeking is compared with that decode, and decord, which may crash (unless `decoder` is "pyav"
    or the file is damaged).
    """
    if not data:
        raise DecodeError("empty")
    if ext in IMAGE_EXTENSIONS:
        yield meta_of(ImageVideo(data))
        return
    with PyAVVideo(data) as truth:
        yield from compare_decoders(data, truth, decoder)


def compare_decoders(data: bytes, truth: PyAVVideo, decoder: str) -> Iterator[dict]:
    """`inspect_file` for a video. truth: without meta, so that it counts frames."""
    meta = meta_of(truth)
    even = np.abs(truth.times - np.arange(len(truth)) / (meta["fps"] or 1.0)).max() < EVEN_S
    yield {**meta, "times": None if even else truth.times.round(6).tolist()}
    is_large = truth.size[0] * truth.size[1] >= LARGE_FRAME
    positions = 3 if is_large or len(truth) < FEW_FRAMES else 6
    anchors = np.unique(np.linspace(0, len(truth) - 1, positions).astype(int))
    compared = np.unique(np.concatenate([anchors - 1, anchors, anchors + 1]).clip(0, len(truth) - 1))
    frames = dict(zip(compared.tolist(), map(thin, truth.get(compared)), strict=True))
    seeks = truth.packets_match and decodes_right(PyAVVideo, data, meta, truth, anchors, frames)
    if seeks:
        yield meta
    if decoder != "auto" or truth.errors:
        return
    # Without torch, which takes seconds: this process has no other use for it.
    from vidssl.data.decoding.decord import DecordVideo

    if decodes_right(DecordVideo, data, meta, truth, anchors, frames):
        yield {**meta, "decoder": "pyav" if seeks else "decord", "decord": True}


def meta_of(video: Video) -> dict:
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
        **display_facts(video.crop, video.not_applied),
        **({"damaged_packets": video.errors} if video.errors else {}),
        **({"time_repairs": dict(repairs)} if (repairs := getattr(video, "time_repairs", None)) else {}),
    }


def decodes_right(
    open_with: Callable[[bytes, dict], Video],
    data: bytes,
    meta: dict,
    truth: Video,
    anchors: np.ndarray,
    frames: dict[int, np.ndarray],
) -> bool:
    """Whether a decoder returns the true frames: single anchors in backward order (each a seek), then all in
    one run.

    anchors i64 [k]: frame indices. frames: index -> true frame, thinned, for the anchors and their
    neighbours.
    """
    try:
        with open_with(data, meta) as video:
            if len(video) != len(truth) or np.abs(video.times - truth.times).max() > TIMES_S:
                return False
            requests = [[i] for i in anchors[::-1].tolist()] + [list(frames)]
            return all(
                is_frame(i, decoded, frames)
                for indices in requests
                for i, decoded in zip(indices, video.get(indices), strict=True)
            )
    except DecodeError:
        return False


def is_frame(i: int, decoded: np.ndarray, frames: dict[int, np.ndarray]) -> bool:
    """Whether `decoded` (u8 [H,W,3]) is frame i rather than one of its neighbours; `frames` are thinned."""
    pixels = thin(decoded)
    difference = {
        j: np.abs(np.subtract(pixels, frames[j], dtype=np.int16)).mean()
        for j in (i - 1, i, i + 1)
        if j in frames
    }
    return difference[i] <= MAX_DIFFERENCE and difference[i] <= min(difference.values()) + NEIGHBOUR_SLACK


def thin(frame: np.ndarray) -> np.ndarray:
    """Every k-th row and column of u8 [H,W,3], about THIN_FRAME pixels."""
    k = max(1, math.isqrt(frame.shape[0] * frame.shape[1] // THIN_FRAME))
    return frame[::k, ::k].copy()


def inspect_job(
    decoder: str,
    recipe: Recipe | None,
    filters: Filters,
    report: Reporter,
    path: str,
    ext: str,
    spans: Sequence[Span],
    frame_rate: str | None = None,
) -> Inspected | Rejected:
    """In a child process: inspects or re-encodes a file. Returns its samples, or why it has none.

    frame_rate: frames per second of a folder of frames, which is always encoded; None: a file.
    """
    if frame_rate is not None:
        video = folder_as_video(Path(path), frame_rate, report.progress)
        return encode_clips(video, spans, recipe or Recipe(), filters, report.progress)
    if recipe and ext not in IMAGE_EXTENSIONS:
        with open(path, "rb") as file:
            if not file.read(1):
                raise DecodeError("empty")
            return encode_clips(file, spans, recipe, filters, report.progress)
    if any(span != (None, None) for span in spans):
        raise DecodeError("not_a_video", "a picture has no segments")
    return inspect_original(Path(path), ext, decoder, filters, report)


def inspect_original(
    path: Path, ext: str, decoder: str, filters: Filters, report: Reporter
) -> Inspected | Rejected:
    """Inspects a file whose bytes are kept; filters are applied to the first thing that is known of it."""
    known: Inspected = []
    for meta in inspect_file(path.read_bytes(), ext, decoder):
        rejected = None if known else filter_original(path, meta, filters, report)
        if rejected is not None:
            return rejected
        known = [EncodedSample(meta)]
        report.partial(known)
    return known


def filter_original(path: Path, meta: dict, filters: Filters, report: Reporter) -> Rejected | None:
    rejected = filters.check_size(min(meta["height"], meta["width"]))
    if rejected is not None or meta["decoder"] == "image":
        return rejected
    return filters.check_clip(meta["duration"], lambda: thumbnails(path, meta["frames"], report))


def thumbnails(path: Path, frames: int, report: Reporter) -> list[np.ndarray]:
    """Luma thumbnails, f32 [32,32] each, of frames evenly spread over the video."""
    wanted = set(evenly_spaced_indices(frames).tolist())
    found = []
    with open(path, "rb") as file, closing(Reader(file)) as reader:
        for i, frame in enumerate(reader.decode()):
            if i % 32 == 0:
                report.progress()
            if i in wanted:
                found.append(thumbnail(frame))
    return found


class FileInspector:
    """Inspects files in child processes; may be called by several threads.

    timeout_s: seconds without progress until a file counts as hanging. job: replaces `inspect_job` in tests.
    """

    def __init__(
        self,
        decoder: str,
        timeout_s: float,
        recipe: Recipe | None = None,
        filters: Filters = NO_FILTERS,
        job: Callable[..., Any] = inspect_job,
    ):
        self._pool = WorkerPool(partial(job, decoder, recipe, filters), timeout_s)

    def __call__(
        self,
        path: Path,
        ext: str,
        spans: Sequence[Span] = ((None, None),),
        frame_rate: str | None = None,
    ) -> Inspected:
        """Returns the samples of a file, or a rejection for each of `spans` if the file is rejected."""
        result = self._pool.run(str(path), ext, spans, frame_rate)
        if isinstance(result, Rejected):
            return [result._replace(item=i, start=start, end=end) for i, (start, end) in enumerate(spans)]
        return result

    def close(self) -> None:
        self._pool.close()

"""Features of many videos on the disk: `vidssl embed`.

A row is a video, or a window of it. Rows are computed in blocks that each have a checksum
(feature_cache.py), by any number of processes; a block is always computed in the same batches, so that
neither their number nor a kill changes a bit. embedding_files.py then writes the rows that could be decoded.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, check_free_space, read_json_object
from vidssl.data.dataset import do_nothing
from vidssl.data.shards import Sample
from vidssl.evaluation.extractor import FeatureExtractor, cache_provenance
from vidssl.evaluation.feature_cache import ROWS_PER_BLOCK, FeatureShape, FeatureStore
from vidssl.evaluation.features import FeatureLoader, FeatureStorage, fill_store, videos_per_batch
from vidssl.evaluation.frozen_encoder import FrozenEncoder, Output, join_clips, row_shape
from vidssl.evaluation.processes import Processes
from vidssl.evaluation.report import is_same_encoder, weights_hash
from vidssl.evaluation.views import MediaSource, View

PARTS = "parts"  # folder of OUT with what only an unfinished embedding needs
PLAN = "plan.json"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
WHOLE = (0.0, math.inf)  # seconds
SAME_TIME_S = 1e-6  # seconds; rests of a video shorter than this make no window


class IdentifiedSource(MediaSource, Protocol):
    """A source of media bytes with a hash of what it holds."""

    @property
    def hash(self) -> str: ...


class EmbeddingRow(NamedTuple):
    """What a row of features is of: seconds `start` to `end` of a sample."""

    key: str
    start: float
    end: float


class RejectedRow(NamedTuple):
    """A video, or a window of it, without features."""

    key: str
    start: float | None  # None, and end: the whole file
    end: float | None
    reason: str
    detail: str = ""


class EmbeddingPlan(NamedTuple):
    """Everything that decides the features."""

    source: IdentifiedSource
    samples: list[Sample]  # of each row
    spans: list[tuple[float, float]] | None  # of each row, in seconds; None: whole videos
    view: View
    output: Output
    dtype: torch.dtype

    @property
    def rows(self) -> list[EmbeddingRow]:
        spans = self.spans or [WHOLE] * len(self.samples)
        pairs = zip(self.samples, spans, strict=True)
        return [EmbeddingRow(s.key, start, min(end, duration_of(s))) for s, (start, end) in pairs]


def duration_of(sample: Sample) -> float:
    """Seconds, as pack measured them; 0 of a sample that it did not measure, and of an image."""
    return float(sample.meta.get("duration", 0.0))


def window_spans(duration: float, window: float, hop: float) -> list[tuple[float, float]]:
    """Windows of `window` seconds, one every `hop` seconds while they fit; one more at the end where a rest
    is left. A video that is not longer than a window is one as a whole, an image too."""
    if duration <= window:
        return [WHOLE]
    count = int((duration - window) / hop + SAME_TIME_S) + 1
    starts = [round(i * hop, 6) for i in range(count)]
    if starts[-1] + window < duration - SAME_TIME_S:
        starts.append(round(duration - window, 6))
    return [(start, round(start + window, 6)) for start in starts]


def make_embedding_plan(
    source: IdentifiedSource,
    samples: Sequence[Sample],
    view: View,
    output: Output,
    dtype: torch.dtype,
    window: float | None = None,
    hop: float | None = None,
) -> EmbeddingPlan:
    """window, hop: seconds; None: whole videos, and windows that follow each other. Raises UserError if
    windows are asked for of samples of which no duration is known."""
    if window is None:
        return EmbeddingPlan(source, list(samples), None, view, output, dtype)
    if unmeasured := [sample.key for sample in samples if "duration" not in sample.meta]:
        raise UserError(
            f"--window: these shards do not say how long {unmeasured[0]} is (their index is not pack's): "
            "pack the videos, or embed whole ones"
        )
    pairs = [(s, span) for s in samples for span in window_spans(duration_of(s), window, hop or window)]
    return EmbeddingPlan(source, [s for s, _ in pairs], [span for _, span in pairs], view, output, dtype)


def short_windows(plan: EmbeddingPlan) -> str | None:
    """A line if windows are shorter than a clip, whose last frame is then repeated."""
    if plan.spans is None:
        return None
    view = plan.view
    pairs = list(zip(plan.samples, plan.spans, strict=True))
    rates = [view.fps or float(s.meta.get("fps") or 0) / (view.stride or 1) for s, _ in pairs]
    needed = [(view.frames - 1) / rate if rate else 0.0 for rate in rates]
    lengths = [min(end, duration_of(sample)) - start for sample, (start, end) in pairs]
    short = [n for n, length in zip(needed, lengths, strict=True) if n > length > 0]
    if not short:
        return None
    return (
        f"{len(short)} of {len(pairs)} windows are shorter than a clip of {view.frames} frames (up to "
        f"{max(short):.3g} s), whose last frame is repeated there: give a longer --window, or a higher --fps"
    )


class Embedding(NamedTuple):
    """Computed rows: those that could be decoded are `kept`, numbers in the plan."""

    features: Tensor  # [rows of the plan, ...], mapped from the disk
    kept: list[int]
    rejected: list[RejectedRow]
    precision: str  # of matrix products


class RowComputer(NamedTuple):
    """Computes rows of a plan in this process."""

    store: FeatureStore
    rows: Callable[[list[int]], Iterator[tuple[int, Tensor | str]]]  # of numbers in the plan
    processes: Processes


def make_row_computer(
    plan: EmbeddingPlan,
    encoder: FrozenEncoder,
    out: Path,
    accelerator: Accelerator,
    storage: FeatureStorage,
    wait: Callable[[], None] = do_nothing,
) -> RowComputer:
    """storage: workers and limits of decoding; wait: see FeatureLoader."""
    fitting = videos_per_batch(plan.view, accelerator.device, storage.encode_batch)
    # A divisor of a block: then its batches are the same wherever computing starts
    batch = max(n for n in range(1, ROWS_PER_BLOCK + 1) if ROWS_PER_BLOCK % n == 0 and n <= max(1, fitting))
    encoder.to(accelerator.device)
    loader = FeatureLoader(
        partial(encoder.encode, output=plan.output),
        plan.source,
        plan.samples,
        plan.view,
        accelerator,
        FeatureStorage(**{**vars(storage), "encode_batch": batch}),
        "embed",
        wait,
        plan.spans,
    )
    per_clip = loader.shape()
    tokens = join_clips(torch.zeros(per_clip[1:]), plan.output, plan.view.segments).shape[0]
    shape = FeatureShape(len(plan.samples), 1, tokens, per_clip.width)
    store = FeatureStore(out / PARTS, provenance_of(plan, encoder, accelerator), shape, plan.dtype)

    def rows(numbers: list[int]) -> Iterator[tuple[int, Tensor | str]]:
        for number, value in loader.rows(numbers, per_clip):
            joined = value if isinstance(value, str) else join_clips(value, plan.output, plan.view.segments)
            yield number, joined

    return RowComputer(store, rows, loader.processes)


def compute_embedding(
    plan: EmbeddingPlan,
    encoder: FrozenEncoder,
    out: Path,
    accelerator: Accelerator,
    storage: FeatureStorage,
    wait: Callable[[], None] = do_nothing,
) -> Embedding:
    """Computes the rows that OUT/parts does not have yet, each process its share. Collective."""
    computer = make_row_computer(plan, encoder, out, accelerator, storage, wait)
    computer.processes.run_on_main(partial(check_space_for_rows, out, computer.store))
    fill_store(computer.store, computer.rows, accelerator, wait)
    return read_embedding_rows(plan, encoder, computer.store)


def check_space_for_rows(out: Path, store: FeatureStore) -> None:
    """Raises UserError unless the rows fit on the disk, and again as the written features."""
    size = store.shape.samples * store.row_bytes
    check_free_space(out, 2 * size, "features", "free some, or give --tokens pooled")


def read_embedding_rows(plan: EmbeddingPlan, encoder: FrozenEncoder, store: FeatureStore) -> Embedding:
    """The rows of a complete store."""
    features, unreadable = store.read()
    all_rows = plan.rows
    kept = [number for number in range(len(all_rows)) if number not in unreadable]
    rejected = [RejectedRow(*all_rows[number], reason) for number, reason in sorted(unreadable.items())]
    dims = row_shape(encoder.metadata["model"], plan.view, plan.output)
    features = features.view(len(all_rows), *dims, store.shape.width)
    return Embedding(features, kept, rejected, store.provenance["precision"])


def provenance_of(plan: EmbeddingPlan, encoder: FrozenEncoder, accelerator: Accelerator) -> dict[str, Any]:
    """Everything that decides the bytes of the rows."""
    facts = {
        "encoder": weights_hash(encoder.net),
        "model": encoder.metadata["model"],
        "pixels": encoder.metadata["pixels"],
        "precision": encoder.resolved_precision,
        "device": accelerator.device.type,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "output": plan.output,
        "spans": hashlib.sha256(json.dumps(plan.spans).encode()).hexdigest(),
    }
    extractor = FeatureExtractor(encoder.encode, facts)
    return cache_provenance(extractor, plan.view, plan.source.hash, plan.samples)


def open_embedding_folder(out: Path, request: dict[str, Any]) -> bool:
    """Makes OUT/plan.json, or checks that it is of the same request. Returns whether all is written. Called
    by the process that has claimed the folder."""
    file = out / PLAN
    if file.exists():
        stored = read_json_object(file, f"remove {out}, or choose another --out")
        encoder = stored.pop("encoder", None)
        if isinstance(encoder, str):  # written before the model was stored beside the hash of its weights
            encoder = {"sha256": encoder}
        others = {key: value for key, value in request.items() if key != "encoder"}
        stored.setdefault("view", request["view"])  # files of earlier versions lack it
        if stored != json.loads(json.dumps(others)) or not is_same_encoder(encoder, request["encoder"]):
            raise UserError(
                f"{out}: holds features of other videos, another encoder or other options; "
                "choose another --out"
            )
        return (out / "embedding.json").exists()
    if names := [p.name for p in out.iterdir() if not p.name.startswith((".", PLAN))]:
        raise UserError(f"{out}: holds something else already ({names[0]}); choose a new folder")
    text = json.dumps(request, indent=1)
    atomic_write_text(file, text)
    return False

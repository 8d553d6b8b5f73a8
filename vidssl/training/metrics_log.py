"""log.jsonl: a JSON object a row, of one step or several; a progress line; the trackers of run.trackers."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vidssl.core.io import atomic_write_text
from vidssl.core.log import logger
from vidssl.core.progress import Progress
from vidssl.data.loader import Batch

HASH_PARTS = 3  # of a 63-bit hash
BITS_PER_PART = 21  # float64 sums such integers exactly over up to 2**32 processes


def count_samples(batches: Sequence[Batch]) -> dict[str, float]:
    """Numbers to sum over the processes: `undecodable_samples`, which were replaced; `hash_0`.., the 63-bit
    sum of a hash of (position, key) of every sample, in parts that a float64 all-reduce adds exactly."""
    total = 0
    undecodable = sum(len(batch.failures) for batch in batches)
    for batch in batches:
        for position, key in zip(batch.position.tolist(), batch.key, strict=True):
            digest = hashlib.sha256(f"{position} {key}".encode()).digest()
            total += int.from_bytes(digest[:8], "big")
    parts = {f"hash_{i}": (total >> i * BITS_PER_PART) % (1 << BITS_PER_PART) for i in range(HASH_PARTS)}
    return {"undecodable_samples": undecodable, **parts}


def samples_hash(metrics: dict[str, float]) -> str:
    """16 hexadecimal digits from the sum of `count_samples` over the processes: the samples of the global
    batch."""
    total = sum(int(metrics[f"hash_{i}"]) << (i * BITS_PER_PART) for i in range(HASH_PARTS))
    return f"{total % (1 << HASH_PARTS * BITS_PER_PART):016x}"


def step_row(
    loss_names: Iterable[str],
    metrics: dict[str, float],
    hparams: dict[str, float],
    throughput: dict[str, float],
    skipped: int,
    skip_reason: str | None,
) -> dict[str, Any]:
    """A row of the log.

    loss_names: keys of `metrics` to log; skipped: number of steps since the start of the run; skip_reason: of
    this step, None if it was taken.
    """
    row: dict[str, Any] = {name: metrics[name] for name in loss_names}
    row |= {**hparams, "grad_norm": metrics["grad_norm"], **throughput}
    row |= {"samples_hash": samples_hash(metrics), "undecodable_samples": int(metrics["undecodable_samples"])}
    return row | {"skipped": skipped, "skip_reason": skip_reason}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlWriter:
    """Appends JSON objects to a file, one per line. On a full disk rows are buffered and retried with the
    next write."""

    def __init__(self, path: Path):
        self.path = path
        self.buffer = b""
        self.descriptor: int | None = None

    def add(self, *rows: dict[str, Any]) -> str | None:
        """Writes the rows after those that are still buffered. Returns the reason if that failed."""
        lines = (json.dumps({k: _finite(v) for k, v in row.items()}, allow_nan=False) + "\n" for row in rows)
        self.buffer += "".join(lines).encode()
        try:
            if self.buffer and self.descriptor is None:
                self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            while self.buffer and self.descriptor is not None:
                self.buffer = self.buffer[os.write(self.descriptor, self.buffer) :]
        except OSError as e:
            return e.strerror or str(e)
        return None

    def sync(self) -> None:
        """Waits until all rows are on the disk; raises OSError if they cannot be written."""
        if reason := self.add():
            raise OSError(f"{self.path.name}: {reason}")
        if self.descriptor is not None:
            os.fsync(self.descriptor)

    def close(self) -> None:
        if reason := self.add():
            logger.warning(f"{self.path}: its last lines are lost: {reason}")
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def drop_rows_after(path: Path, step: int) -> None:
    """Removes rows after `step`, and a line that a kill cut short: a continued run writes them again."""
    if path.exists():
        kept = [line + "\n" for line in path.read_text().splitlines() if _step_of(line) <= step]
        atomic_write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    """Step of a row; infinity for an incomplete line."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


def start_trackers(accelerator: Accelerator, tree: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Starts the trackers with the configuration `tree`. Returns the function that sends them a row of the
    log."""
    flat = _flatten(tree)
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in flat.items()}
    accelerator.init_trackers("vidssl", plain)

    def track(row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        accelerator.log(numbers, step=row["step"])

    return track


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class MetricsLog:
    """Writes the rows of a run to log.jsonl, to the trackers and to a progress line; in the first process
    only."""

    def __init__(
        self, out: Path, start: int, steps: int, track: Callable[[dict[str, Any]], None] | None = None
    ):
        self.track = track
        self.disk_full = False
        self.rows = JsonlWriter(out / "log.jsonl")
        self.progress = Progress(out.name, steps, "steps", start)

    def write(self, row: dict[str, Any]) -> None:
        """row: step, loss, clips_per_s, wait, and more; steps: their number, if there are several."""
        reason = self.rows.add(row)
        if bool(reason) != self.disk_full:
            self.disk_full = bool(reason)
            if reason:
                logger.warning(f"log.jsonl: {reason}; its lines are kept in memory")
            else:
                logger.info("writing to log.jsonl works again")
        if self.track:
            try:
                self.track(row)
            except OSError as e:
                logger.warning(f"logging step {row['step']} to a tracker failed: {e}")
        shown = {"loss": f"{row['loss']:.4f}", "clips/s": f"{row['clips_per_s']:.0f}"}
        shown["wait"] = f"{row['wait']:.0%}"
        if "memory" in row:
            shown["GB"] = f"{row['memory'] / 1e9:.1f}"
        if row.get("skipped"):
            shown["skipped"] = str(row["skipped"])
        self.progress.update(row.get("steps", 1), shown)

    def close(self) -> None:
        self.rows.close()
        self.progress.close()

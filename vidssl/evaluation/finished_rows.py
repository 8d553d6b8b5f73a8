"""Finished rows of an evaluation on disk, so that an early end loses none and the same command goes on.

OUT/finished.jsonl: a line with the fingerprint of the evaluation, then one for each finished row with its
predictions, or for the label-free scores of a control. It is removed when the report is written."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidssl.core.errors import Interrupted, Preempted, UserError
from vidssl.core.io import make_folder
from vidssl.core.log import logger
from vidssl.evaluation.report import PredictionRow

FILE = "finished.jsonl"


class FinishedRows:
    """The rows that an evaluation has finished, in the order in which they were computed."""

    def __init__(self, out: Path, fingerprint: str):
        """fingerprint: of everything that decides the rows. Raises UserError if the file in `out` is of
        another evaluation."""
        self.path = out / FILE
        self.fingerprint = fingerprint
        # keys of a probe: (label, control, fraction, seed)
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        self.predictions: dict[tuple[str, ...], list[PredictionRow]] = {}
        self.scores: dict[str, dict[str, float]] = {}  # control -> label-free scores of train
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        """Reads whole lines; the last one may be half written, and is cut off."""
        *lines, rest = self.path.read_bytes().split(b"\n")
        first = json.loads(lines[0]) if lines else {}
        if lines and first.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"{self.path}: holds {len(lines) - 1} finished rows of another evaluation (its "
                "configuration, encoder, data or code differ); choose another out=, or remove the file"
            )
        if rest:
            os.truncate(self.path, self.path.stat().st_size - len(rest))
        for line in lines[1:]:
            entry = json.loads(line)
            if "scores" in entry:
                self.scores[entry["control"]] = entry["scores"]
            else:
                run = tuple(entry["run"])
                self.rows[run] = entry["row"]
                self.predictions[run] = [PredictionRow(*run, *p) for p in entry["predictions"]]
        if self.rows:
            logger.info(f"{self.path}: goes on after {len(self.rows)} finished rows")

    def add(self, run: tuple[str, ...], row: dict[str, Any], predictions: list[PredictionRow]) -> None:
        self._append({"run": run, "row": row, "predictions": [p[len(run) :] for p in predictions]})
        self.rows[run] = row
        self.predictions[run] = predictions

    def add_scores(self, control: str, scores: dict[str, float]) -> None:
        self._append({"control": control, "scores": scores})
        self.scores[control] = scores

    def _append(self, entry: dict[str, Any]) -> None:
        make_folder(self.path.parent)
        with open(self.path, "ab") as f:
            start = f.tell()
            if not start:
                f.write(json.dumps({"fingerprint": self.fingerprint}).encode() + b"\n")
            try:
                f.write(json.dumps(entry).encode() + b"\n")
                f.flush()
                os.fsync(f.fileno())
            except OSError:  # a full disk: no half line stays
                f.truncate(start)
                raise

    def remove(self) -> None:
        """Called when the report holds the rows."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def keeps(finished: FinishedRows, also: str = "") -> Iterator[None]:
    """Says, where an evaluation ends early, what is kept of it. also: what is kept beside the rows."""
    try:
        yield
    except (Preempted, KeyboardInterrupt) as e:
        reason = "interrupted" if isinstance(e, KeyboardInterrupt) else str(e)
        line = f"{reason}: kept: {_describe(finished)}{also}; the same command goes on"
        raise (Interrupted(line) if isinstance(e, KeyboardInterrupt) else Preempted(line)) from e
    except (UserError, OSError):
        if finished.rows:
            logger.warning(f"kept: {_describe(finished)}{also}")
        raise


def _describe(finished: FinishedRows) -> str:
    return f"{len(finished.rows)} finished rows are in {finished.path}" if finished.rows else "no row"

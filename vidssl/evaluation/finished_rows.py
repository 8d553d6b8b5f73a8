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
        self._length = 0  # bytes of the whole lines of the file
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        """Reads whole lines. The last one may be half written; `_append` cuts it off."""
        data = self.path.read_bytes()
        *lines, rest = data.split(b"\n")
        self._length = len(data) - len(rest)
        try:
            entries = [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError) as e:
            raise UserError(f"{self.path}: damaged ({e}); remove it: its rows are computed again") from None
        if entries and entries[0].get("fingerprint") != self.fingerprint:
            rows = sum("run" in entry for entry in entries)
            raise UserError(
                f"{self.path}: holds {rows} finished rows of another evaluation (its "
                "configuration, encoder, data or code differ); choose another out=, or remove the file"
            )
        for entry in entries[1:]:
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
        """Called by the process that has claimed the folder."""
        make_folder(self.path.parent)
        data = json.dumps(entry).encode() + b"\n"
        if not self._length:
            data = json.dumps({"fingerprint": self.fingerprint}).encode() + b"\n" + data
        try:
            with open(self.path, "ab") as f:
                f.truncate(self._length)
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        except OSError:
            # A full disk: no half line stays. Closing the file has written what it could.
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._length)
            raise
        self._length += len(data)

    def remove(self) -> None:
        """Called when the report holds the rows."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def keeps(finished: FinishedRows, also: str = "") -> Iterator[FinishedRows]:
    """Yields the rows. Says, where an evaluation ends early, what is kept of it. also: what is kept beside
    the rows."""
    try:
        yield finished
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

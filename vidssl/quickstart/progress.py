"""How far the trainings of a quickstart are, from the logs that they write."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vidssl.core.progress import Progress
from vidssl.quickstart.programs import METHODS, Quickstart

MAX_ROW_BYTES = 4096  # of a log, or more


def last_step(log: Path) -> int:
    """The step of the last whole row of a log.jsonl that may still grow; 0: there is none."""
    if not log.exists():
        return 0
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_ROW_BYTES))
        *rows, _ = file.read().split(b"\n")
    return json.loads(rows[-1])["step"] if rows else 0


class TrainingProgress:
    """Context of the programs: the steps of all trainings together, as a bar on a terminal, a line a minute
    elsewhere."""

    def __init__(self, quick: Quickstart):
        self.quick = quick
        steps = sum(quick.lengths(method)["steps"] for method in METHODS)
        self.progress = Progress("pre-training", steps, "steps", self.done())

    def done(self) -> int:
        return sum(last_step(self.quick.run(method) / "log.jsonl") for method in METHODS)

    def look(self, running: Sequence[str]) -> None:
        """running: names of programs."""
        self.progress.update(self.done() - self.progress.done, {"running": " + ".join(running)})

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()

"""How far the trainings of a quickstart are, from the logs that they write."""

from collections.abc import Sequence
from pathlib import Path

from vidssl.core.io import last_json_row
from vidssl.core.progress import Progress
from vidssl.quickstart.programs import METHODS, Quickstart


def last_step(log: Path) -> int:
    """The step of the last row of a log.jsonl; 0: there is none."""
    return last_json_row(log).get("step", 0)


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

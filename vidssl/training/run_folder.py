"""The folder of a run: its claim, configuration, log, and the list of samples that could not be decoded."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vidssl import config
from vidssl.core.errors import Interrupted, Preempted, UserError
from vidssl.core.io import claim_folder, os_errors_as_user_errors
from vidssl.core.log import logger
from vidssl.data.loader import Batch
from vidssl.training.checkpoint import AsyncWriter, quarantine
from vidssl.training.distributed import Strategy
from vidssl.training.metrics_log import JsonlWriter, MetricsLog, drop_rows_after, start_trackers

# Why a run ends before its last step: a signal; the features have collapsed, which is a failure; the held-out
# error falls no more, which is not.
RunEnding = Literal["stopped", "collapsed", "over"]


class RunFolder:
    """Context of a run that writes into `out`, a folder that it has claimed; all processes enter it, the
    first one writes shared files."""

    def __init__(
        self, out: Path, tree: dict[str, Any], start: int, steps: int, strategy: Strategy, tracks: bool
    ):
        """tree: the resolved configuration; start: steps that are done already; tracks: whether to start
        trackers."""
        self.out = out
        self.tree = tree
        self.start = start
        self.steps = steps
        self.strategy = strategy
        self.tracks = tracks
        self.metrics_log: MetricsLog | None = None
        self.bad_samples = JsonlWriter(out / "bad_samples.jsonl")

    def __enter__(self) -> "RunFolder":
        self.strategy.run_on_main(self._open)
        self.strategy.barrier()
        return self

    def _open(self) -> None:
        with os_errors_as_user_errors(self.out):
            for name in ("log.jsonl", "bad_samples.jsonl"):
                drop_rows_after(self.out / name, self.start)
            quarantine(self.out / "checkpoints", self.start)
            config.save(self.tree, self.out / "config.yaml")
            track = start_trackers(self.strategy.accelerator, self.tree) if self.tracks else None
            self.metrics_log = MetricsLog(self.out, self.start, self.steps, track)

    def log(self, step: int, row: dict[str, Any], batches: list[Batch]) -> None:
        """Writes the row of the log that ends with a step, if one does; every process lists the samples of
        its own batches of the step that were replaced."""
        if self.metrics_log and row:
            self.metrics_log.write({"step": step, **row})
        bad = [{"step": step, "key": key, "reason": reason} for b in batches for key, reason in b.failures]
        self.bad_samples.add(*bad)

    @contextlib.contextmanager
    def log_on_error(self, step: int, row: dict[str, Any], batches: list[Batch]) -> Iterator[None]:
        """Context that logs a step if it ends the run with a UserError."""
        try:
            yield
        except UserError:
            self.log(step, row, batches)
            raise

    def sync_log(self) -> None:
        """Waits until the log is on the disk, so that it is never behind a checkpoint."""
        if self.metrics_log:
            self.metrics_log.rows.sync()

    def __exit__(self, *_: object) -> None:
        self.bad_samples.close()
        if self.metrics_log:
            self.metrics_log.close()

    def finish(
        self,
        step: int,
        end: RunEnding | None,
        writer: AsyncWriter,
        signal_number: int | None,
        work_follows: bool = False,
    ) -> None:
        """Called after the last step. Raises UserError, Preempted or Interrupted unless the run is complete
        and saved. end: what ended it before its last step, if anything did; signal_number: the signal that
        ended it, if one did; work_follows: the run has more to do than
        its steps."""
        for line in writer.pop_errors():
            logger.warning(f"step {step}: {line}")
        if writer.failed:
            raise UserError(f"{self.out}: the state after step {step} could not be written: {writer.failed}")
        if step < self.steps and end == "collapsed":
            raise UserError(
                f"{self.out}: stopped at step {step}: the features have collapsed (run.stop_on_collapse)"
            )
        is_cut_off = step < self.steps and end != "over"
        if is_cut_off or (work_follows and signal_number is not None):
            saved = f"ended after step {step}, which is saved" if step else "ended before the first step"
            ended = f"{saved}; the same command continues the run"
            if signal_number == signal.SIGINT:
                raise Interrupted(f"{self.out}: Ctrl-C: {ended}")
            raise Preempted(f"{self.out}: SIGTERM: {ended}")


@contextlib.contextmanager
def claim_run(out: Path, program: str, strategy: Strategy) -> Iterator[None]:
    """Context in which no other process may claim the run's folder. Collective: if one has, all processes
    raise UserError."""
    with contextlib.ExitStack() as claims:

        def claim() -> None:
            claims.enter_context(claim_folder(out, program))

        strategy.run_on_main(claim)
        yield

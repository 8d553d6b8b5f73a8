"""The steps since the last row of log.jsonl: their metrics, the decisions about them, and the row that sums
them up (run.log_every)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidssl.core.log import logger
from vidssl.training.distributed import Strategy
from vidssl.training.metrics_log import step_row
from vidssl.training.perf import Throughput
from vidssl.training.run_folder import RunFolder
from vidssl.training.state import RunState


class PendingStep(NamedTuple):
    """A step that the host has not read."""

    step: int  # steps that are done with it
    losses: list[str]  # names of losses among `names`
    names: list[str]
    values: Tensor  # f64 [names], of all processes, on the device


class ReadStep(NamedTuple):
    """A step that the guard has counted."""

    step: int
    losses: list[str]
    metrics: dict[str, float]
    skip_reason: str | None


class StepLog:
    """With `every` 1 each step is read before it is taken or skipped. Else its metrics stay on the device,
    which decides by the guard's limits; before the next row the host reads them and counts the same
    decisions."""

    def __init__(
        self, every: int, strategy: Strategy, state: RunState, throughput: Throughput, folder: RunFolder
    ):
        """every: steps of a row. state: the guard of which counts the steps."""
        self.every = every
        self.strategy = strategy
        self.guard = state.guard
        self.throughput = throughput
        self.folder = folder
        self.pending: list[PendingStep] = []
        self.done: list[ReadStep] = []  # in the next row
        self.hparams: dict[str, float] = {}
        self.metrics: dict[str, float] = {}  # of the last row
        state.before_save = self.write_rest

    def ends_row(self, step: int) -> bool:
        """Whether a row ends with this step; one may be shorter than `every`."""
        return step % self.every == 0

    def add(
        self,
        step: int,
        losses: dict[str, Tensor],
        norm: Tensor,
        sums: dict[str, float],
        hparams: dict[str, float],
    ) -> Tensor | bool:
        """Adds step `step` (from 1). Returns whether it is to be taken, perhaps as bool [] on the device.
        sums: of `count_samples`, and signals. Collective."""
        means = {**losses, "grad_norm": norm}
        values = self.strategy.reduce_metrics(means, sums)
        self.pending.append(PendingStep(step, list(losses), [*means, *sums], values))
        self.hparams = hparams
        if self.every > 1:
            return self.guard.accepts(dict(zip(means, values, strict=False)))
        self.read()
        return self.done[-1].skip_reason is None

    def read(self, keep_limits: bool = False) -> None:
        """Counts the pending steps in the guard. keep_limits: see LossGuard.check_step."""
        if not self.pending:
            return
        numbers = iter(torch.cat([pending.values for pending in self.pending]).tolist())
        last = self.pending[-1].step
        for step, losses, names, _ in self.pending:
            metrics = dict(zip(names, numbers, strict=False))
            reason = self.guard.check_step(metrics, keep_limits or step < last)
            if reason:
                logger.info(f"step {step}: skipped: {reason}")
            self.done.append(ReadStep(step, losses, metrics, reason))
        self.pending = []

    def row(self) -> dict[str, Any]:
        """The next row of the log, by `sum_up`; schedules are those of its last step."""
        self.read()
        steps, self.done = self.done, []
        self.metrics = sum_up(steps)
        reason = next((step.skip_reason for step in reversed(steps) if step.skip_reason), None)
        losses = dict.fromkeys(name for step in steps for name in step.losses)
        speed = self.throughput.row()
        row = step_row(losses, self.metrics, self.hparams, speed, self.guard.skipped, reason)
        return row if len(steps) == 1 else {"steps": len(steps), **row}

    def write_rest(self) -> None:
        """Writes the row of the steps that have none, where a run is cut off. The guard's limits stay as they
        are: the run that goes on makes new ones where one without a cut does."""
        self.read(keep_limits=True)
        if self.done:
            self.folder.log(self.done[-1].step, self.row(), [])


def sum_up(steps: Sequence[ReadStep]) -> dict[str, float]:
    """Metrics of several steps: of losses and gradient norm the mean over the steps that were taken (over all
    if none was), of what is counted the sum."""
    taken = [step for step in steps if step.skip_reason is None] or steps
    means = {"grad_norm", *(name for step in steps for name in step.losses)}
    found = {}
    for name in dict.fromkeys(name for step in steps for name in step.metrics):
        counted = taken if name in means else steps
        values = [step.metrics[name] for step in counted if name in step.metrics]
        found[name] = sum(values) / (len(values) if name in means else 1)
    return found

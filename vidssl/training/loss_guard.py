"""Decides which optimizer steps are skipped, and when the run rolls back."""

import math
import statistics
from collections import deque
from typing import Any

HISTORY = 128  # accepted steps whose mean and deviation define a spike
MIN_HISTORY = 32  # accepted steps before a spike can be detected


class LossGuard:
    """Skips steps whose loss or gradient norm is not finite or (with loss_spike_std) far above its recent
    mean.

    A skipped step leaves the weights as they are. After more than `max_consecutive_skips` in a row, weights
    and optimizer are rolled back to the last checkpoint while the data go on, so that the batches since then
    are left out (as in PaLM, arXiv 2204.02311, section 5.1); after `max_rollbacks` of these the run stops.
    Every decision is a function of the losses and norms, which are the same in every process; the state is
    part of the checkpoints. In fp16 a step with a non-finite gradient norm is skipped by the GradScaler
    itself and not counted.
    """

    def __init__(
        self,
        max_consecutive_skips: int,
        max_rollbacks: int,
        loss_spike_std: float | None,
        has_grad_scaler: bool = False,
    ):
        """loss_spike_std: deviations above the mean; None: only non-finite values are skipped.
        has_grad_scaler: gradients are fp16, whose GradScaler skips steps with non-finite gradients itself."""
        self.max_consecutive_skips = max_consecutive_skips
        self.max_rollbacks = max_rollbacks
        self.loss_spike_std = loss_spike_std
        self.has_grad_scaler = has_grad_scaler
        self.consecutive_skips = 0
        self.skipped = 0  # in the whole run
        self.rollbacks = 0
        self.history: dict[str, deque[float]] = {
            name: deque(maxlen=HISTORY) for name in ("loss", "grad_norm")
        }

    def check_step(self, metrics: dict[str, float]) -> str | None:
        """Counts a step by its loss and grad_norm. Returns the reason to skip it, or None to take it."""
        reasons = (self._reason(name, metrics[name]) for name in self.history)
        reason = next((r for r in reasons if r), None)
        if reason is not None:
            self.consecutive_skips += 1
            self.skipped += 1
            return reason
        self.consecutive_skips = 0
        for name, values in self.history.items():
            if math.isfinite(metrics[name]):
                values.append(metrics[name])
        return None

    def _reason(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return None if self.has_grad_scaler and name == "grad_norm" else f"{name} {value}"
        values = self.history[name]
        if self.loss_spike_std is not None and len(values) >= MIN_HISTORY:
            limit = statistics.fmean(values) + self.loss_spike_std * statistics.pstdev(values)
            if value > limit:
                recent = f"mean + {self.loss_spike_std:g} std of the last {len(values)} accepted steps"
                return f"{name} {value:.4g} exceeds {limit:.4g} ({recent})"
        return None

    @property
    def should_rollback(self) -> bool:
        return self.consecutive_skips > self.max_consecutive_skips

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {
            "consecutive_skips": self.consecutive_skips,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "history": {name: list(values) for name, values in self.history.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.consecutive_skips = state["consecutive_skips"]
        self.skipped = state["skipped"]
        self.rollbacks = state["rollbacks"]
        for name, values in self.history.items():
            values.extend(state["history"][name])

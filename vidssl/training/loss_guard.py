"""Decides which optimizer steps are skipped, and when the run rolls back."""

import math
import statistics
import sys
from collections import deque
from typing import Any

import torch
from torch import Tensor

from vidssl.core.constants import upload

HISTORY = 128  # accepted steps whose mean and deviation define a spike
MIN_HISTORY = 32  # accepted steps before a spike can be detected
# Skipped steps in a row with which a GradScaler of fp16 takes its scale from 2^16, its first one, to 1. If
# gradients still are not finite, the scale is not why.
SCALER_SKIPS = 16


class LossGuard:
    """Skips steps whose loss or gradient norm is not finite or (with loss_spike_std) far above its recent
    mean.

    A skipped step leaves the weights as they are. After more than `max_consecutive_skips` in a row, weights
    and optimizer are rolled back to the last checkpoint while the data go on, so that the batches since then
    are left out (as in PaLM, arXiv 2204.02311, section 5.1); after `max_rollbacks` of these the run stops.
    Every decision is a function of the losses and norms, which are the same in every process; the state is
    part of the checkpoints. In fp16 a gradient that is not finite may only mean that the GradScaler's scale
    is too large: such steps count as skipped, but SCALER_SKIPS more of them in a row are tolerated.
    """

    def __init__(
        self,
        max_consecutive_skips: int,
        max_rollbacks: int,
        loss_spike_std: float | None,
        has_grad_scaler: bool = False,
    ):
        """loss_spike_std: deviations above the mean; None: only non-finite values are skipped.
        has_grad_scaler: gradients are scaled (fp16), and each skipped step halves the scale."""
        self.max_consecutive_skips = max_consecutive_skips
        self.max_rollbacks = max_rollbacks
        self.loss_spike_std = loss_spike_std
        self.has_grad_scaler = has_grad_scaler
        self.consecutive_skips = 0
        self.consecutive_overflows = 0  # those of finite loss and scaled gradients that are not
        self.skipped = 0  # in the whole run
        self.rollbacks = 0
        self.history: dict[str, deque[float]] = {
            name: deque(maxlen=HISTORY) for name in ("loss", "grad_norm")
        }

        self.limits = self._limits()  # of the next steps

    def accepts(self, metrics: dict[str, Tensor]) -> Tensor:
        """Whether to take a step, by its loss and grad_norm f64 []: bool [] on their device, as `check_step`
        decides it."""
        values = torch.stack([metrics[name] for name in self.history])
        limits = torch.tensor([self.limits[name] for name in self.history], dtype=torch.float64)
        return (values.isfinite() & (values <= upload(limits, values.device))).all()

    def check_step(self, metrics: dict[str, float], keep_limits: bool = False) -> str | None:
        """Counts a step by its loss and grad_norm. Returns the reason to skip it, or None to take it.
        keep_limits: the next steps have the limits of this one."""
        reason = self._count(metrics)
        if not keep_limits:
            self.limits = self._limits()
        return reason

    def _count(self, metrics: dict[str, float]) -> str | None:
        reasons = (self._reason(name, metrics[name]) for name in self.history)
        reason = next((r for r in reasons if r), None)
        if reason is not None:
            self.consecutive_skips += 1
            is_overflow = math.isfinite(metrics["loss"]) and not math.isfinite(metrics["grad_norm"])
            self.consecutive_overflows += self.has_grad_scaler and is_overflow
            self.skipped += 1
            return reason
        self.end_skips()
        for name, values in self.history.items():
            if math.isfinite(metrics[name]):
                values.append(metrics[name])
        return None

    def _reason(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} {value}"
        if value > self.limits[name]:
            count = len(self.history[name])
            recent = f"mean + {self.loss_spike_std:g} std of the last {count} accepted steps"
            return f"{name} {value:.4g} exceeds {self.limits[name]:.4g} ({recent})"
        return None

    def _limits(self) -> dict[str, float]:
        """Above which loss and grad_norm are spikes."""
        limits = {}
        for name, values in self.history.items():
            limits[name] = sys.float_info.max
            if self.loss_spike_std is not None and len(values) >= MIN_HISTORY:
                limits[name] = statistics.fmean(values) + self.loss_spike_std * statistics.pstdev(values)
        return limits

    @property
    def should_rollback(self) -> bool:
        tolerated = self.max_consecutive_skips + min(self.consecutive_overflows, SCALER_SKIPS)
        return self.consecutive_skips > tolerated

    def end_skips(self) -> None:
        """Called when a step is taken or the run has been rolled back: the next skip is a first one."""
        self.consecutive_skips = 0
        self.consecutive_overflows = 0

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {
            "consecutive_skips": self.consecutive_skips,
            "consecutive_overflows": self.consecutive_overflows,
            "skipped": self.skipped,
            "loss_spike_std": self.loss_spike_std,
            "rollbacks": self.rollbacks,
            "history": {name: list(values) for name, values in self.history.items()},
            "limits": self.limits,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.consecutive_skips = state["consecutive_skips"]
        self.consecutive_overflows = state.get("consecutive_overflows", 0)
        self.skipped = state["skipped"]
        self.rollbacks = state["rollbacks"]
        for name, values in self.history.items():
            values.extend(state["history"][name])
        # their deviations may have been changed since
        is_same = state.get("loss_spike_std") == self.loss_spike_std
        self.limits = state["limits"] if is_same and "limits" in state else self._limits()

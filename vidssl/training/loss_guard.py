"""Which optimiser steps are skipped, and when the run rolls back."""

import math
import statistics
from collections import deque
from typing import Any

WINDOW, MIN_HISTORY = 128, 32  # accepted steps that say what is usual; and how many it takes to say so


class LossGuard:
    """Which steps are not taken: those whose loss or gradients are not finite or, if asked, far above the usual.

    A step that is not taken leaves the weights as they are. After more than `skip` in a row the weights and the
    optimiser go back to the last checkpoint while the data go on, so that the batches since then are left out (as in
    PaLM, arXiv 2204.02311, section 5.1); after `rollbacks` of these the run stops. All of it is a function of the
    losses and norms, which are the same in every process, and its state is part of the checkpoints.
    """

    def __init__(self, skip: int, rollbacks: int, spike: float | None, scaled: bool = False):
        """scaled: the gradients are fp16, whose scaler itself leaves out a step of gradients that are not finite."""
        self.skip, self.rollbacks, self.loss_spike_std, self.scaled = skip, rollbacks, spike, scaled
        self.consecutive_skips = self.skipped = self.rolled_back = (
            0  # not taken in a row, in all; times gone back
        )
        self.history: dict[str, deque[float]] = {
            "loss": deque(maxlen=WINDOW),
            "grad_norm": deque(maxlen=WINDOW),
        }

    def reason_to_skip(self, now: dict[str, float]) -> str | None:
        """Why the step is not to be taken; None: it is. now: its loss and grad_norm."""
        why = next((why for name in self.history if (why := self._wrong(name, now[name]))), None)
        if why is None:
            self.consecutive_skips = 0
            for name, window in self.history.items():
                if math.isfinite(now[name]):
                    window.append(now[name])
        else:
            self.consecutive_skips += 1
            self.skipped += 1
        return why

    def _wrong(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return None if self.scaled and name == "grad_norm" else f"{name} {value}"
        window = self.history[name]
        if self.loss_spike_std is not None and len(window) >= MIN_HISTORY:
            limit = statistics.fmean(window) + self.loss_spike_std * statistics.pstdev(window)
            if value > limit:
                return f"{name} {value:.4g}, over {limit:.4g}"
        return None

    @property
    def should_rollback(self) -> bool:
        """Too many in a row to go on from these weights."""
        return self.consecutive_skips > self.skip

    def state(self) -> dict[str, Any]:
        """Plain data, for the checkpoint."""
        counts = {
            "consecutive_skips": self.consecutive_skips,
            "skipped": self.skipped,
            "rolled_back": self.rolled_back,
        }
        return {**counts, "history": {name: list(window) for name, window in self.history.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.consecutive_skips, self.skipped, self.rolled_back = (
            state["consecutive_skips"],
            state["skipped"],
            state["rolled_back"],
        )
        for name, window in self.history.items():
            window.extend(state["history"][name])

"""The checkpoints of a run: what it has learned goes into them while it goes on, and comes back."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vidssl.checkpoint import Writer, copied, load_checkpoint, save_checkpoint
from vidssl.errors import UserError
from vidssl.exchange import as_checkpoint, write_run
from vidssl.health import Health
from vidssl.objective.objective import Objective
from vidssl.survive import Guard, same_everywhere


class Resume:
    """Everything that a run of these parts must find again; `about` (provenance) says what it is of."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        optimizer: Any,
        guard: Guard,
        health: Health,
        out: Path,
        about: dict[str, Any],
    ):
        self.accelerator, self.objective, self.optimizer = accelerator, objective, optimizer
        self.guard, self.health, self.out, self.about = guard, health, out, about
        self.writer = Writer()

    def load(self, state: dict[str, Any]) -> int:
        """Be where a checkpoint was -> its step."""
        self._learned(state)
        self.guard.load(state["guard"])
        self.health.load(state["health"])
        return state["step"]

    def _learned(self, state: dict[str, Any]) -> None:
        same_everywhere(self.accelerator, state["step"])
        self.objective.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def go_back(self, why: str) -> int:
        """To what was learned up to the last checkpoint -> its step; an error when that was done too often."""
        guard, state = self.guard, None
        self.writer.wait()
        self.accelerator.wait_for_everyone()
        if guard.rolled_back < guard.rollbacks:
            state = load_checkpoint(self.out / "checkpoints")
        if state is None:
            raise UserError(
                f"{why} ({guard.row} steps in a row, gone back {guard.rolled_back} times); what was learned up to the "
                f"last checkpoint is in {self.out}; a smaller optim.lr, a longer warm-up or optim.clip_grad may help"
            )
        self._learned(state)
        guard.rolled_back, guard.row = guard.rolled_back + 1, 0
        return state["step"]

    def save(self, step: int, run: Any, lines: Any) -> None:
        """Copy what was learned up to this step, and write it while the next ones run, once the log's lines are on the
        disk. run: the `run` section."""
        self.writer.wait()  # so that there are never two copies
        scaler = self.accelerator.scaler
        state = {"model": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": scaler.state_dict() if scaler else None, "provenance": self.about}
        state |= {"guard": self.guard.state(), "health": self.health.state()}
        found, state = copied((as_checkpoint(self.objective, self.about["config"]), state))

        def write() -> None:
            write_run(self.out, found, {**self.about, "step": step}, run.snapshots)  # a finished run has an encoder
            save_checkpoint(self.out / "checkpoints", step, state, run.keep, run.keep_every)

        self.writer.start(f"the checkpoint of step {step}", lines.sync, write)

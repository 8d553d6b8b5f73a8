"""The checkpoints of a run: what it has learned goes into them while it goes on, and comes back."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.objective.objective import Objective
from vidssl.pretrained.init import as_checkpoint, write_run
from vidssl.training.checkpoint import (
    AsyncWriter,
    gather_to_cpu,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from vidssl.training.distributed import check_ranks_agree, shard_like
from vidssl.training.feature_stats import FeatureStats
from vidssl.training.loss_guard import LossGuard
from vidssl.training.metrics_log import JsonlWriter


class TrainState:
    """Everything that a run of these parts must find again; `about` (provenance) says what it is of."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        optimizer: Any,
        guard: LossGuard,
        feature_stats: FeatureStats,
        out: Path,
        about: dict[str, Any],
    ):
        self.accelerator, self.objective, self.optimizer = accelerator, objective, optimizer
        self.guard, self.feature_stats, self.out, self.about = guard, feature_stats, out, about
        self.writer = AsyncWriter()

    def load(self, state: dict[str, Any] | None) -> int:
        """Be where a checkpoint was, if there is one -> its step. All processes must ask."""
        check_ranks_agree(self.accelerator, state)
        if state is None:
            return 0
        self._load_weights(state)
        self.guard.load(state["guard"])
        self.feature_stats.load(state["feature_stats"])
        return state["step"]

    def _load_weights(self, state: dict[str, Any]) -> None:
        places = self.objective.state_dict()
        model = {k: shard_like(v, places[k]) if k in places else v for k, v in state["model"].items()}
        self.objective.load_state_dict(model)
        groups, saved = self.optimizer.param_groups, state["optimizer"]
        for group, old in zip(groups, saved["param_groups"], strict=True):
            old["fused"] = group["fused"]  # a matter of speed, which may change
        self.optimizer.load_state_dict({**saved, "state": self._moments(saved)})
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _moments(self, saved: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
        """AdamW's, of the parameters that have kept their shape."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = {i: of for i, of in saved["state"].items() if of["exp_avg"].shape == params[i].shape}
        return {i: {k: shard_like(v, params[i]) for k, v in of.items()} for i, of in kept.items()}

    def load_optimizer_state(self, place: Path) -> None:
        """The moments, too, of the checkpoint of another run whose weights this one starts from (`start_from`); what
        is no such checkpoint, but a run's folder or a public file, has none."""
        if not (place / "state.json").is_file():
            return
        saved, groups = read_checkpoint(place)["optimizer"], self.optimizer.state_dict()["param_groups"]
        if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in groups]:
            raise UserError(
                f"run.init: {place} has other groups of parameters; its run's folder gives weights alone"
            )
        self.optimizer.load_state_dict({"state": self._moments(saved), "param_groups": groups})

    def rollback(self, why: str) -> int:
        """To what was learned up to the last checkpoint -> its step; an error when that was done too often."""
        guard, state = self.guard, None
        self.writer.wait()
        self.accelerator.wait_for_everyone()
        if guard.rolled_back < guard.rollbacks:
            state = load_checkpoint(self.out / "checkpoints")
            check_ranks_agree(self.accelerator, state)
        if state is None:
            raise UserError(
                f"{why} ({guard.consecutive_skips} steps in a row, gone back {guard.rolled_back} times); what was learned up to the "
                f"last checkpoint is in {self.out}; a smaller optim.lr, a longer warm-up or optim.clip_grad may help"
            )
        self._load_weights(state)
        guard.rolled_back, guard.consecutive_skips = guard.rolled_back + 1, 0
        return state["step"]

    def save(self, step: int, run: Any, lines: JsonlWriter | None) -> None:
        """Copy what was learned up to this step, and write it while the next ones run, once the log's lines are on the
        disk. run: the `run` section. Of shards, all processes must take part; the one that has the lines writes."""
        self.writer.wait()  # so that there are never two copies
        learned = {"model": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        learned = gather_to_cpu(learned, keep=lines is not None)
        if lines is None:
            return
        scaler = self.accelerator.scaler
        state = {**learned, "scaler": scaler.state_dict() if scaler else None, "provenance": self.about}
        state |= {"guard": self.guard.state(), "feature_stats": self.feature_stats.state()}

        def write() -> None:
            self.export(step, learned["model"], run.snapshots)  # a finished run has an encoder
            save_checkpoint(self.out / "checkpoints", step, state, run.keep_last, run.keep_every)

        self.writer.start(f"the checkpoint of step {step}", lines.sync, write)

    def export(self, step: int, learned: dict[str, Tensor], snapshot: bool) -> None:
        """encoder.safetensors and what stands beside it. learned: the objective's state dict, whole."""
        found = as_checkpoint(self.objective, self.about["config"], learned)
        write_run(self.out, found, {**self.about, "step": step}, snapshot)

"""Saves and restores the state of a training run; checkpoints are written in the background (files: checkpoint.py)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from vidssl import config
from vidssl.core.errors import UserError
from vidssl.objective.objective import Objective
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.init import load_pretrained, save_run_encoder, to_checkpoint
from vidssl.pretrained.load import read_checkpoint_file
from vidssl.training.checkpoint import AsyncWriter, load_checkpoint, read_checkpoint, save_checkpoint
from vidssl.training.distributed import Strategy
from vidssl.training.loss_guard import LossGuard
from vidssl.training.schema import TrainConfig


class Resumable(Protocol):
    """A part of a run with state of its own (plain data that JSON can hold) that checkpoints contain."""

    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...


class RunState:
    """Weights, optimizer, scaler, loss guard and further parts of a run, and the folder of its checkpoints."""

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module,
        optimizer: Any,
        guard: LossGuard,
        out: Path,
        provenance: dict[str, Any],
        schema: type[Any],
        steps: int,
        mutable: tuple[str, ...],
        keep_last: int = 2,
        keep_every: int = 0,
        **parts: Resumable,
    ):
        """schema: class of the configuration; steps: optimizer steps of the run; mutable: configuration keys that may
        change when a run is continued; keep_last, keep_every: see save_checkpoint."""
        self.strategy = strategy
        self.model = model
        self.optimizer = optimizer
        self.guard = guard
        self.parts: dict[str, Resumable] = {"guard": guard, **parts}
        self.out = out
        self.provenance = provenance
        self.schema = schema
        self.steps = steps
        self.mutable = mutable
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.writer = AsyncWriter()

    def restore(self) -> int:
        """Loads the newest checkpoint of the run's folder. Returns its step; 0 if there is none. Collective.

        Raises UserError if the folder holds another run.
        """
        state = load_checkpoint(self.out / "checkpoints")
        self._check_ranks_agree(state)
        if state is None:
            return 0
        check_same_run(state, self.provenance, self.steps, self.mutable, self.out, self.schema)
        self.strategy.load_state(self.model, self.optimizer, state)
        for name, part in self.parts.items():
            part.load(state[name])
        return state["step"]

    def rollback(self, reason: str) -> int:
        """Goes back to the last checkpoint; the data and the guard's history go on. Returns its step. Collective.

        Raises UserError with `reason` if there is no checkpoint or the limit of rollbacks is reached.
        """
        guard, state = self.guard, None
        self.writer.wait()
        self.strategy.barrier()
        if guard.rolled_back < guard.rollbacks:
            state = load_checkpoint(self.out / "checkpoints")
            self._check_ranks_agree(state)
        if state is None:
            raise UserError(
                f"{reason} ({guard.consecutive_skips} steps in a row, {guard.rolled_back} rollbacks); the last "
                f"checkpoint is in {self.out}; a smaller optim.lr, a longer warm-up or optim.clip_grad may help"
            )
        self.strategy.load_state(self.model, self.optimizer, state)
        guard.rolled_back += 1
        guard.consecutive_skips = 0
        return state["step"]

    def save(self, step: int, before_write: Callable[[], None]) -> None:
        """Copies the state after `step` steps, and writes it while the next steps run.

        All processes with strategy.participates_in_save must call it; the first one writes. before_write: called
        first, so that the log on the disk is never behind a checkpoint.
        """
        self.writer.wait()  # so that there is never more than one copy
        state = self.strategy.full_state(self.model, self.optimizer)
        if not self.strategy.is_main:
            return
        state["provenance"] = self.provenance
        state |= {name: part.state() for name, part in self.parts.items()}

        def write() -> None:
            self.export(step, state["model"])
            save_checkpoint(self.out / "checkpoints", step, state, self.keep_last, self.keep_every)

        self.writer.start(f"the checkpoint of step {step}", before_write, write)

    def export(self, step: int, weights: dict[str, Tensor]) -> None:
        """Called with the whole state dict of the model before each checkpoint is written; does nothing here."""

    def _check_ranks_agree(self, state: dict[str, Any] | None) -> None:
        import torch

        mine = torch.tensor([state["step"] if state else 0], device=self.strategy.device)
        steps = sorted(set(self.strategy.accelerator.gather(mine).tolist()))
        if len(steps) > 1:
            raise UserError(
                f"the processes have read checkpoints of different steps {steps} (0: none): the folder is not shared"
            )


class TrainState(RunState):
    """The state of a pre-training run; each checkpoint also exports the encoder."""

    def __init__(
        self,
        strategy: Strategy,
        objective: Objective,
        *args: Any,
        snapshots: bool = False,
        **options: Any,
    ):
        """snapshots: keep the encoder of every checkpoint; the other arguments: see RunState."""
        super().__init__(strategy, objective, *args, **options)
        self.objective = objective
        self.snapshots = snapshots

    def init_from(self, init: Path) -> None:
        """Loads the optimizer's moments if `init` is a step checkpoint; other sources carry weights only."""
        if not (init / "state.json").is_file():
            return
        saved = read_checkpoint(init)["optimizer"]
        groups = self.optimizer.state_dict()["param_groups"]
        if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in groups]:
            raise UserError(
                f"run.init: {init} has other groups of parameters; its run's folder gives weights alone"
            )
        moments = self.strategy.moments(self.optimizer, saved)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def export(self, step: int, weights: dict[str, Tensor]) -> None:
        """Writes encoder.safetensors and the files beside it. weights: the objective's state dict, unsharded."""
        cfg = config.from_tree(self.provenance["config"], TrainConfig, "provenance")
        found = to_checkpoint(self.objective, cfg.encoder_arguments(), cfg.method.predictor, weights)
        save_run_encoder(self.out, found, {**self.provenance, "step": step}, self.snapshots)

    def export_missing(self, step: int) -> None:
        """Exports the restored weights of a finished run whose encoder.safetensors is gone. Collective."""
        if not self.strategy.on_main((self.out / "encoder.safetensors").exists):
            state = self.strategy.full_state(self.model, self.optimizer)
            if self.strategy.is_main:
                self.export(step, state["model"])


def init_from_pretrained(objective: Objective, cfg: TrainConfig) -> None:
    """Loads the weights of run.init: a run, a published checkpoint, or a step checkpoint (RUN/checkpoints/step-N)."""
    source = str(cfg.run.init)
    if (Path(source) / "state.json").is_file():
        checkpoint = read_step_checkpoint(Path(source), objective)
    else:
        checkpoint = read_checkpoint_file(source)[0]
    load_pretrained(objective, checkpoint, cfg.model, cfg.method, source)


def read_step_checkpoint(folder: Path, objective: Objective) -> Checkpoint:
    """The weights of a pre-training run at the step of one of its checkpoints."""
    try:
        state = read_checkpoint(folder)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"run.init: {folder}: cannot be read ({str(e).strip().splitlines()[0]})") from None
    tree = state["provenance"]["config"]
    if "method" not in tree:
        raise UserError(f"run.init: {folder} is not of a pre-training run; give the run's folder")
    cfg = config.from_tree(tree, TrainConfig, str(folder))
    return to_checkpoint(objective, cfg.encoder_arguments(), cfg.method.predictor, state["model"])


def check_same_run(
    state: dict[str, Any],
    provenance: dict[str, Any],
    steps: int,
    mutable: tuple[str, ...],
    out: Path,
    schema: type[Any] = TrainConfig,
) -> None:
    """Raises UserError unless a run with `provenance` may continue the checkpoint `state`.

    Data and configuration must be the same, except for the keys in `mutable`; `steps` may not be exceeded already. The
    stored configuration is read by today's `schema`, so that options added since then have their defaults.
    """
    before = state["provenance"]
    if before["data"] != provenance["data"]:
        raise UserError(f"{out}: this run was started on other data (the hash differs)")
    if state["step"] > steps:
        raise UserError(f"{out}: {state['step']} steps are done, more than the {steps} of this configuration")
    then = without_paths(config.to_tree(config.from_tree(before["config"], schema, str(out))))
    now = without_paths(provenance["config"])
    differing = [
        f"{key} is {old!r} there, {new!r} here" for key, old, new in config.differences(then, now, mutable)
    ]
    if differing:
        raise UserError(
            f"{out} holds another run: {'; '.join(differing[:3])}. Give another output folder, or the same values"
        )


def without_paths(cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the folders of extra streams: the hash of their data is compared instead."""
    data = cfg["data"]
    streams = [{**stream, "train": None} for stream in data.get("extra_streams", [])]
    return {**cfg, "data": {**data, "extra_streams": streams}}

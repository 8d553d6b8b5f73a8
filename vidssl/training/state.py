"""Saves and restores the state of a training run; checkpoints are written in the background (files:
checkpoint.py)."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from vidssl import config
from vidssl.core.errors import Preempted, UserError
from vidssl.core.io import check_free_space
from vidssl.core.log import logger
from vidssl.objective.objective import Objective
from vidssl.pretrained.init import (
    TERM,
    add_joint_predictor,
    pretrained_weights,
    same_parts,
    save_run_encoder,
    stored_names,
    to_checkpoint,
)
from vidssl.pretrained.load import read_checkpoint_file
from vidssl.pretrained.step_checkpoint import encoder_of_state, evaluated_encoder
from vidssl.training.checkpoint import (
    TENSOR_FILES,
    AsyncWriter,
    list_checkpoints,
    load_checkpoint,
    provenance,
    read_checkpoint,
    save_checkpoint,
)
from vidssl.training.diagnostics import Diagnostics
from vidssl.training.distributed import Strategy
from vidssl.training.loss_guard import LossGuard
from vidssl.training.schema import TrainConfig, resume_mutable

ADVICE = "a smaller optim.lr, a longer warm-up or optim.clip_grad may help"


class Resumable(Protocol):
    """A part of a run with state of its own (plain data that JSON can hold) that checkpoints contain."""

    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...


class RunState:
    """Weights, optimizer, scaler, loss guard and further parts of a run; the folder of its checkpoints."""

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
        mutable_keys: tuple[str, ...],
        keep_last: int = 2,
        keep_every: int = 0,
        **parts: Resumable,
    ):
        """schema: class of the configuration; steps: optimizer steps of the run; mutable_keys: configuration
        keys that may change when a run is continued; keep_last, keep_every: see save_checkpoint."""
        self.strategy = strategy
        self.model = model
        self.optimizer = optimizer
        self.guard = guard
        self.parts: dict[str, Resumable] = {"guard": guard, **parts}
        self.out = out
        self.provenance = provenance
        self.schema = schema
        self.steps = steps
        self.mutable_keys = mutable_keys
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.writer = AsyncWriter()
        self.before_save: Callable[[], None] = lambda: None  # counts in the guard what it has not seen
        self.saved_step = 0
        # the step whose state is whole; None from the decision about a step until all of it has followed
        self.whole_step: int | None = None

    def restore(self) -> int:
        """Loads the newest checkpoint of the run's folder. Returns its step; 0 if there is none. Collective.

        Raises UserError if the folder holds another run.
        """
        checkpoint, plain = self._read_newest()
        if plain is None:
            return 0
        self.strategy.load_state(self.model, self.optimizer, checkpoint)
        for name, part in self.parts.items():
            # a part that is newer than the checkpoint starts anew
            part.load(plain.get(name, {}))
        self.saved_step = plain["step"]
        return self.saved_step

    def rollback(self, step: int, reason: str | None) -> int:
        """Goes back to the last checkpoint; data and the guard's history go on. Returns its step. Collective.

        step: the last skipped step. Raises UserError with `reason` if there is no checkpoint or the limit of
        rollbacks is reached.
        """
        guard = self.guard
        stopped = (
            f"step {step}: {reason} ({guard.consecutive_skips} steps in a row, {guard.rollbacks} rollbacks)"
        )
        self.writer.wait()
        if not self.strategy.run_on_main(lambda: bool(list_checkpoints(self.out / "checkpoints"))):
            raise UserError(f"{stopped}; there is no checkpoint yet; {ADVICE}")
        if guard.rollbacks >= guard.max_rollbacks:  # the limit may have been lowered since
            raise UserError(
                f"{stopped}; the limit max_rollbacks={guard.max_rollbacks} is reached; "
                f"the last checkpoint is in {self.out}; {ADVICE}"
            )
        checkpoint, plain = self._read_newest()
        assert plain is not None
        self.strategy.load_state(self.model, self.optimizer, checkpoint)
        guard.rollbacks += 1
        guard.end_skips()
        saved = plain["step"]
        logger.info(
            f"restored the checkpoint of step {saved}; data and schedule continue from step {step + 1}"
        )
        return saved

    def log_write_errors(self, step: int) -> None:
        """Warns of checkpoints that could not be written."""
        for line in self.writer.pop_errors():
            logger.warning(f"step {step}: {line}; the run goes on")

    def save(self, step: int, before_write: Callable[[], None]) -> None:
        """Copies the state after `step` steps, and writes it while the next steps run.

        All processes with strategy.participates_in_save must call it; the first one writes. before_write:
        called first, so that the log on the disk is never behind a checkpoint.
        """
        self.before_save()
        self.saved_step = step
        self.writer.wait()  # so that there is never more than one copy
        checkpoint = self.strategy.full_state(self.model, self.optimizer)
        if not self.strategy.is_main:
            return
        checkpoint["provenance"] = self.provenance
        checkpoint |= {name: part.state() for name, part in self.parts.items()}

        def write() -> None:
            check_finite(checkpoint["model"])
            self.export(step, checkpoint["model"])
            save_checkpoint(self.out / "checkpoints", step, checkpoint, self.keep_last, self.keep_every)

        self.writer.start(f"the checkpoint of step {step}", before_write, write)

    def check_space(self) -> None:
        """Raises UserError in all processes unless the disk has room for the checkpoints. Collective.

        A new checkpoint is whole before the oldest is deleted, so one more than `keep_last` is needed.
        """
        weights = sum(v.numel() * v.element_size() for v in self.model.state_dict().values())
        moments = sum(2 * p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

        def check() -> None:
            folder = self.out / "checkpoints"
            held = sum(f.stat().st_size for c in list_checkpoints(folder) for f in c.iterdir())
            needed = (self.keep_last + 1) * (weights + moments) + weights
            what = f"{self.keep_last + 1} checkpoints (one more than are kept)"
            check_free_space(self.out, needed - held, what, "free some, or choose another place")

        self.strategy.run_on_main(check)

    @contextlib.contextmanager
    def save_last_step(self, before_write: Callable[[], None]) -> Iterator[None]:
        """Context that saves the last whole step if it ends before that was done: by an exception, or by a
        signal that ended the wait for data. Only where one process can save without the others.

        before_write: see `save`.
        """
        try:
            yield
        except (Exception, Preempted):
            if self._has_unsaved_step:
                step = self.whole_step
                try:
                    self.save(step or 0, before_write)
                    self.writer.wait()
                    logger.warning(f"{self.out}: an error ends the run; step {step} is saved")
                except (OSError, RuntimeError) as e:  # the GPU's state may be lost
                    logger.warning(f"{self.out}: step {step} could not be saved: {e}")
            raise
        if self._has_unsaved_step:
            self.save(self.whole_step or 0, before_write)

    @property
    def _has_unsaved_step(self) -> bool:
        return (self.whole_step or 0) > self.saved_step and self.strategy.saves_alone

    def export(self, step: int, weights: dict[str, Tensor]) -> None:
        """Called with the whole state dict of the model before each checkpoint is written; hook for
        subclasses."""

    def _read_newest(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Returns the newest checkpoint (in the first process, the only one that reads files) and, in all
        processes, its plain data; None if there is no checkpoint."""
        found: list[dict[str, Any]] = []

        def read() -> dict[str, Any] | None:
            checkpoint = load_checkpoint(self.out / "checkpoints")
            if checkpoint is None:
                return None
            check_same_run(checkpoint, self.provenance, self.steps, self.mutable_keys, self.out, self.schema)
            found.append(checkpoint)
            return {name: value for name, value in checkpoint.items() if name not in TENSOR_FILES}

        plain = self.strategy.run_on_main(read)
        return (found[0] if found else None), plain


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raises OSError, as a file that cannot be written does, if a weight is not finite: the run would roll
    back to it."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise OSError(f"{name} is not finite; earlier checkpoints are kept")


class TrainState(RunState):
    """The state of a pre-training run; each checkpoint also exports the encoder."""

    def __init__(
        self,
        cfg: TrainConfig,
        strategy: Strategy,
        objective: Objective,
        optimizer: Any,
        diagnostics: Diagnostics,
        data_hash: str,
    ):
        """The state of the run `cfg` before anything is restored."""
        run = cfg.run
        guard = LossGuard(
            run.max_consecutive_skips,
            run.max_rollbacks,
            run.loss_spike_std,
            has_grad_scaler=strategy.scaler is not None,
        )
        super().__init__(
            strategy,
            objective,
            optimizer,
            guard,
            Path(run.out),
            provenance(config.to_tree(cfg), data_hash)
            | {
                "encoder": {
                    "arguments": cfg.encoder_arguments(),
                    "evaluated": stored_names(objective).evaluated,
                }
            },
            TrainConfig,
            run.steps,
            resume_mutable(cfg),
            run.keep_last,
            run.keep_every,
            feature_stats=diagnostics.stats,
            held_out=diagnostics.rule,
        )
        self.rule = diagnostics.rule
        self.cfg = cfg
        self.objective = objective

    def may_be_due(self, step: int) -> bool:
        """Whether `is_due` may hold after `step` steps."""
        run = self.cfg.run
        return step == run.steps or step % run.save_every == 0

    def is_due(self, step: int) -> bool:
        """Whether the run is to be saved after `step` steps: the last one, or one of run.save_every that
        follows no skipped step."""
        at_end = step == self.cfg.run.steps
        return at_end or (self.may_be_due(step) and not self.guard.consecutive_skips)

    def restore_or_init(self) -> int:
        """Loads the newest checkpoint of the run's folder, or else the weights of run.init. Returns the step
        of the checkpoint; 0 if there is none. Collective."""
        start = self.restore()
        if not start and self.cfg.run.init:
            self.init_from(self.cfg.run.init)
        return start

    def init_from(self, source: str) -> None:
        """Loads the weights of `source` (see initial_weights) and, of a step checkpoint, the optimizer's
        moments.

        Collective. Raises UserError if the weights or the parameter groups do not fit.
        """
        weights: dict[str, Tensor] = {}
        optimizer: dict[str, Any] = {}

        def read() -> list[str]:
            found, saved = initial_weights(self.objective, self.cfg, source)
            weights.update(found)
            if saved is not None:
                self._check_same_groups(saved, source)
                optimizer.update(saved)
            fresh = {parts_of(name) for name, _ in self.objective.named_parameters() if name not in found}
            if fresh:
                logger.info(f"run.init: {source} has no {', '.join(sorted(fresh))} that fits: drawn anew")
            return list(found)

        loaded = self.strategy.run_on_main(read)
        self.strategy.load_weights(self.objective, weights, strict=False)
        self.objective.start_averages(loaded)
        self.strategy.load_moments(self.objective, self.optimizer, optimizer or None)

    def export(self, step: int, weights: dict[str, Tensor]) -> None:
        """Writes encoder.safetensors and the files beside it. weights: the objective's whole state dict."""
        cfg = self.cfg
        found = to_checkpoint(self.objective, cfg.encoder_arguments(), cfg.method.predictor, weights)
        is_best = self.rule.best_step == step
        save_run_encoder(self.out, found, {**self.provenance, "step": step}, cfg.run.snapshots, is_best)

    def export_missing(self, step: int) -> None:
        """Exports the restored weights of a finished run whose encoder.safetensors is gone. Collective."""
        if not self.strategy.run_on_main((self.out / "encoder.safetensors").exists):
            checkpoint = self.strategy.full_state(self.model, self.optimizer)
            if self.strategy.is_main:
                self.export(step, checkpoint["model"])

    def _check_same_groups(self, saved: dict[str, Any], source: str) -> None:
        saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
        current_sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if saved_sizes != current_sizes:
            raise UserError(
                f"run.init: {source}: its optimizer groups differ; give the run folder to load weights only"
            )


def parts_of(name: str) -> str:
    """The part of a method that a parameter belongs to, by its dotted name."""
    parts = TERM.sub("", name).split(".")
    return ".".join(parts[:2]) if parts[0] == "target" else parts[0]


def initial_weights(
    objective: Objective, cfg: TrainConfig, source: str
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Returns the weights that a run starts from, by their names in the objective, and the optimizer's state
    or None.

    source: a run's folder or a published checkpoint (encoder, and a joint predictor), or a step checkpoint
    (RUN/checkpoints/step-00000100), of which every part is taken that both methods have, with its moments.
    Raises UserError if it is damaged or does not fit the configuration.
    """
    if not (Path(source) / "state.json").is_file():
        checkpoint = read_checkpoint_file(source)[0]
        return pretrained_weights(objective, checkpoint, cfg.model, cfg.method, source), None
    try:
        saved = read_checkpoint(Path(source))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"run.init: {source}: cannot be read ({str(e).strip().splitlines()[0]})") from None
    tree = saved["provenance"]["config"]
    if "method" not in tree:
        raise UserError(f"run.init: {source} is a fine-tuning checkpoint; give the run's folder")
    stored = config.from_tree(tree, TrainConfig, source)
    state = saved["model"]
    evaluated, _ = evaluated_encoder(saved["provenance"], state)
    checkpoint = encoder_of_state(state, stored.encoder_arguments(), evaluated)
    add_joint_predictor(checkpoint, stored.method.predictor, state)
    weights = pretrained_weights(objective, checkpoint, cfg.model, cfg.method, source)
    methods = [config.to_tree(c)["method"] for c in (stored, cfg)]
    same = same_parts(objective, state, *methods)
    weights |= {name: state[stored_name] for name, stored_name in same.items()}
    optimizer = saved["optimizer"]
    names = {name: name for name in weights} | same
    moments = {n: optimizer["state"][m] for n, m in names.items() if m in optimizer["state"]}
    return weights, {**optimizer, "state": moments}


def check_same_run(
    checkpoint: dict[str, Any],
    provenance: dict[str, Any],
    steps: int,
    mutable_keys: tuple[str, ...],
    out: Path,
    schema: type[Any] = TrainConfig,
) -> None:
    """Raises UserError unless a run with `provenance` may continue `checkpoint`.

    Data and configuration must be the same, except for the keys in `mutable_keys`; `steps` may not be
    exceeded already. The stored configuration is read by today's `schema`, so that options added since then
    have their defaults. A line tells of another precision, which `auto` may be on another machine.
    """
    before = checkpoint["provenance"]
    if before["data"] != provenance["data"]:
        raise UserError(f"{out}: this run was started on other data (the hash differs)")
    check_same_networks(before.get("networks", {}), provenance.get("networks", {}), out)
    if checkpoint["step"] > steps:
        raise UserError(
            f"{out}: {checkpoint['step']} steps are done, more than the {steps} of this configuration"
        )
    completed = config.to_tree(config.from_tree(before["config"], schema, str(out)))
    if added := missing_keys(before["config"], completed):
        logger.info(f"{out}: options that are newer than this run have their defaults: {', '.join(added)}")
    precisions = [tree["efficiency"]["precision"] for tree in (completed, provenance["config"])]
    if precisions[0] != precisions[1]:
        logger.warning(
            f"{out}: efficiency.precision was {precisions[0]}, the run goes on in {precisions[1]}: "
            f"give efficiency.precision={precisions[0]} to keep it"
        )
    then = without_paths(completed)
    now = without_paths(provenance["config"])
    different = config.differences(then, now, mutable_keys)
    differing = [f"{key} is {old!r} there, {new!r} here" for key, old, new in different]
    if [key for key, _, _ in different] == ["run.steps"]:
        raise UserError(
            f"{out}: run.steps {differing[0].removeprefix('run.steps ')}, and the schedules end at it. "
            "Train longer with run.init of this folder in a new one, or plan it from the start with "
            "optim.schedule_steps (configs/run/infinite.yaml)"
        )
    if differing:
        raise UserError(
            f"{out} holds another run: {'; '.join(differing[:3])}. "
            "Give another output folder, or the same values"
        )


def check_same_networks(before: dict[str, str], now: dict[str, str], out: Path) -> None:
    """Raises UserError if a network that the method reads is another than at the start of the run. before,
    now: path -> hash of its files."""
    for path, digest in now.items():
        if before.get(path, digest) != digest:
            raise UserError(
                f"{out}: {path}, which this run reads, has changed since this run was started (its hash "
                "differs): put the old file back, or give another output folder"
            )


def missing_keys(stored: Any, full: Any, key: str = "") -> list[str]:
    """Dotted keys of `full` that `stored` lacks."""
    if not isinstance(stored, dict) or not isinstance(full, dict):
        return []
    paths = {name: f"{key}.{name}".lstrip(".") for name in full}
    absent = [paths[name] for name in full if name not in stored]
    return absent + [m for n in full if n in stored for m in missing_keys(stored[n], full[n], paths[n])]


def without_paths(cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the folders of extra streams: the hash of their data is compared instead."""
    data = cfg["data"]
    streams = [{**stream, "train": None} for stream in data.get("extra_streams", [])]
    return {**cfg, "data": {**data, "extra_streams": streams}}

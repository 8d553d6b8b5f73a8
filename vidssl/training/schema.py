"""The configuration of a pre-training run, without torch."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from vidssl.config import (
    Choice,
    Fraction,
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Spec,
    Text,
)
from vidssl.core.cpus import available_cpus
from vidssl.core.errors import UserError
from vidssl.data.schema import AUGMENT_PARTS, MUTABLE_KEYS, DataConfig, check_local_folders
from vidssl.model.schema import MODEL_PARTS, NATIVE_SIZE_KEYS
from vidssl.objective.schema import MethodConfig
from vidssl.pretrained.sources import check_source
from vidssl.training import config_checks

if TYPE_CHECKING:
    from vidssl.objective.objective import Objective


Tracker = Literal["tensorboard", "wandb", "trackio"]

STREAM_WORKERS = 2  # by default with data.reader=stream, on any machine


@dataclass(frozen=True)
class RunConfig:
    """The `run` section: output folder, length, seed, checkpoints, safeguards."""

    out: Text  # folder
    steps: PositiveInt  # optimizer steps
    batch: PositiveInt  # clips a step, over all processes
    init: Text | None = None  # a checkpoint to start from: a run folder, or a public one
    seed: NonNegativeInt = 0
    lanes: PositiveInt = 8  # a multiple of every number of processes that may be used
    shuffle_window: PositiveInt = 4096  # samples that are shuffled among themselves in a lane
    save_every: PositiveInt = 500  # steps between checkpoints
    keep_last: PositiveInt = 2  # newest checkpoints kept
    keep_every: NonNegativeInt = 0  # checkpoints at multiples of this number of steps are kept too; 0: none
    snapshots: bool = (
        False  # keep the encoder of every checkpoint, to evaluate it over the course of training
    )
    max_consecutive_skips: NonNegativeInt = (
        3  # skipped steps in a row that are tolerated; one more rolls back
    )
    max_rollbacks: NonNegativeInt = 2  # rollbacks to the last checkpoint before the run stops
    # skip a step whose loss or gradient norm exceeds its recent mean by this many standard deviations; None:
    # never
    loss_spike_std: PositiveFloat | None = None
    feature_stats_every: PositiveInt = 100  # steps between measurements of the features
    stop_on_collapse: bool = False  # stop when the features have collapsed; else a collapse is only logged
    # steps between measurements of the held-out error (data.val), a multiple of save_every; None: save_every
    validate_every: PositiveInt | None = None
    validate_clips: PositiveInt = 128  # of data.val, at most, evenly spaced
    # measurements of the held-out error in a row without a lower one, after which the run ends, complete;
    # None: it goes on to `steps`
    patience: PositiveInt | None = None
    # steps of a row of log.jsonl: more keep the device from waiting for the host
    log_every: PositiveInt = 1
    trackers: tuple[Tracker, ...] = ()  # besides log.jsonl; with pictures at each save


def default_workers() -> int:
    """Loader processes that the cores of this machine keep busy beside each training process on it."""
    return min(16, max(2, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


@dataclass(frozen=True)
class EfficiencyConfig:
    """The `efficiency` section: changes only the speed, up to rounding. With data.reader=stream `workers`
    also changes the order of the samples."""

    # loader processes for each training process; None: one fewer than its share of the CPUs, 2 to 16, and 2
    # with data.reader=stream
    workers: NonNegativeInt | None = None
    micro_batches: PositiveInt = (
        1  # parts in which a process computes its share of the batch (gradient accumulation)
    )
    # of the forward pass; auto: bf16 where the GPU has it in hardware, fp32 elsewhere
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = (
        False  # torch.compile the transformer blocks: needs a C++ compiler, and minutes at the start
    )
    fused: bool = True  # the optimizer's step is one kernel
    activation_checkpointing: bool = False  # recompute the blocks' activations in the backward pass
    decode_in_subprocess: bool = True  # a file that hangs or crashes a decoder then costs only itself
    tune_malloc: bool = (
        True  # on CPUs, keep freed memory in the process instead of returning it to the system
    )
    threads: PositiveInt | None = None  # of torch on the CPU, for each process; None: torch's own choice
    peer_timeout_s: PositiveInt = 600  # seconds that a process waits for another one before it gives up

    @property
    def num_workers(self) -> int:
        return default_workers() if self.workers is None else self.workers

    def resolved(self) -> "EfficiencyConfig":
        """This configuration with the precision that `auto` is on this machine."""
        # imported here, so that a configuration is checked without torch
        from vidssl.core.precision import resolve_precision

        return replace(self, precision=resolve_precision(self.precision))


Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OptimConfig:
    """The `optim` section: AdamW and its schedules. Rates are absolute (without lr_batch), steps are
    optimizer steps.

    An infinite run (Ibrahim et al. 2024, arXiv 2403.08763) has lr_decay "cosine" to the constant rate
    final_lr within `schedule_steps`; it can be continued with a larger run.steps. An annealing branch is a
    run of its own with run.init=THAT_RUN, lr at the constant rate, no warm-up and lr_decay "exponential" (as
    in the paper) or another.
    """

    lr: PositiveFloat  # the largest, at the end of the warm-up
    warmup_lr: NonNegativeFloat = 0.0  # at the start of the warm-up
    final_lr: NonNegativeFloat = 0.0  # at the end of the decay
    lr_batch: PositiveInt | None = (
        None  # value of run.batch to which the three rates refer; None: they are absolute
    )
    lr_scaling: Literal["linear", "sqrt"] = (
        "linear"  # with run.batch / lr_batch: MAE, VideoMAE (256); DINOv2 (1024)
    )
    warmup: NonNegativeInt = 0  # steps
    lr_decay: Literal["cosine", "linear", "exponential", "constant"] = (
        "cosine"  # of lr to final_lr after the warm-up
    )
    ipe_scale: PositiveFloat = (
        1.0  # schedules are stretched over ipe_scale x run.steps and cut there (V-JEPA: 1.25)
    )
    schedule_steps: PositiveInt | None = (
        None  # length of all schedules after the warm-up; None: until run.steps
    )
    layer_lr_decay: Fraction = (
        1.0  # factor on the rate from each encoder layer to the one below (fine-tuning)
    )
    weight_decay: NonNegativeFloat = 0.05  # of AdamW
    final_weight_decay: NonNegativeFloat | None = None  # at the end of a cosine; None: constant
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # of AdamW
    eps: PositiveFloat = 1e-8  # of AdamW
    clip_grad: PositiveFloat | None = None  # largest norm of the gradients
    clip_per_module: bool = (
        False  # clip the encoder and the rest separately (V-JEPA), not all parameters together
    )
    clip_start: NonNegativeInt = 0  # first step that is clipped (V-JEPA does not clip during its warm-up)
    decay_tokens: bool = True  # weight decay on tokens and learned positions: V-JEPA and MAE yes, VideoMAE no

    def __post_init__(self) -> None:
        if self.lr_decay == "exponential" and not self.final_lr:
            raise UserError(
                "optim.final_lr: an exponential decay cannot end at 0; give a rate, or another optim.lr_decay"
            )
        if self.schedule_steps is not None and self.lr_decay != "constant" and not self.final_lr:
            raise UserError(
                "optim.final_lr: with optim.schedule_steps training goes on at this rate; give one above 0"
            )
        if self.schedule_steps is not None and self.ipe_scale != 1:
            raise UserError(
                "optim.schedule_steps and optim.ipe_scale both set the length of the schedules: "
                "give one of them"
            )

    def scaled(self, batch: int) -> "OptimConfig":
        """This configuration with absolute rates for a global batch of `batch` clips.

        Source: Goyal et al. 2017 (arXiv 1706.02677), VideoMAE run_mae_pretraining.py; square-root scaling:
        DINOv2.
        """
        if self.lr_batch is None:
            return self
        ratio = batch / self.lr_batch
        factor = ratio if self.lr_scaling == "linear" else math.sqrt(ratio)
        return replace(
            self,
            lr=factor * self.lr,
            warmup_lr=factor * self.warmup_lr,
            final_lr=factor * self.final_lr,
            lr_batch=None,
        )

    def is_open_ended(self, *momenta: tuple[float, float]) -> bool:
        """Whether no step depends on run.steps. momenta: of each EMA, at the first and last step."""
        constant_decay = self.final_weight_decay in (None, self.weight_decay)
        constant_momenta = all(first == last for first, last in momenta)
        constant = self.lr_decay == "constant" and constant_decay and constant_momenta
        return self.schedule_steps is not None or constant


@dataclass(frozen=True)
class OnlineProbeConfig:
    """The `online_probe` section: labelled shards for a quick measure of the features during training, on the
    mean token of the middle clip of each video. Report the results of probe.py instead."""

    train: Names | None = None  # packed folders with labels; None: no online probe
    test: Names | None = None  # the same labels on other samples
    every: PositiveInt = 1000  # steps
    samples: PositiveInt = 512  # at most, of train and of test each, evenly spaced
    label: Text | None = None  # the label set; None: the first
    stride: PositiveInt | None = None  # frames; with fps None as well: that of `data`
    fps: PositiveFloat | None = None  # frames per second
    memory_mb: NonNegativeInt = (
        512  # limit of the decoded clips in memory, in 2**20 bytes, checked at the start
    )

    def __post_init__(self) -> None:
        if (self.train is None) != (self.test is None):
            raise UserError("online_probe: give train and test, or neither")
        if self.stride is not None and self.fps is not None:
            raise UserError("online_probe: give stride (in frames) or fps (frames per second), not both")


@dataclass(frozen=True)
class TrainConfig:
    """All sections of vidssl/train.py."""

    method: MethodConfig
    model: Annotated[Spec, Choice(MODEL_PARTS, NATIVE_SIZE_KEYS)]  # the encoder
    data: DataConfig
    augment: Annotated[Spec, Choice(AUGMENT_PARTS)]  # how a clip is cropped, and changed
    optim: OptimConfig
    run: RunConfig
    online_probe: OnlineProbeConfig
    efficiency: EfficiencyConfig

    def __post_init__(self) -> None:
        config_checks.check_sizes(self)
        config_checks.check_augmentation(self)
        config_checks.check_validation(self)
        if self.run.init is not None and Path(self.run.init) == Path(self.run.out):
            raise UserError("run.init: give another folder than run.out, which the same command continues")
        for key, (first, last) in self.method.momenta.items():
            if self.optim.schedule_steps is not None and first != last == 1:
                raise UserError(
                    f"{key}: a momentum of 1 freezes the EMA encoder, while a run with "
                    "optim.schedule_steps goes on"
                )

    def resolved(self) -> "TrainConfig":
        """This configuration with what depends on the machine (see EfficiencyConfig.resolved)."""
        return replace(self, efficiency=self.efficiency.resolved())

    def check_before_work(self) -> None:
        """Raises UserError for what can be known before torch is imported and data are opened."""
        if self.data.reader == "indexed":
            for i, stream in enumerate(self.data.streams()):
                key = f"data.extra_streams[{i - 1}].train" if i else "data.train"
                check_local_folders(key, stream.train)
        if self.run.init is not None:
            check_source(self.run.init, "run.init")
        check_local_folders("data.val", self.data.val or [])
        check_local_folders("online_probe.train", self.online_probe.train or [])
        check_local_folders("online_probe.test", self.online_probe.test or [])
        config_checks.check_batch(self, int(os.environ.get("WORLD_SIZE", "1")))
        config_checks.check_output(self.run)

    def notes(self) -> list[str]:
        """A line for each pair of keys that has another effect than it seems to."""
        return config_checks.surprising_keys(self)

    @property
    def num_workers(self) -> int:
        """Loader processes for each training process."""
        # the order of a stream depends on their number, which the machine may not choose therefore
        if self.data.reader == "stream" and self.efficiency.workers is None:
            return STREAM_WORKERS
        return self.efficiency.num_workers

    @property
    def validate_every(self) -> int:
        """Steps between measurements of the held-out error."""
        return self.run.validate_every or self.run.save_every

    @property
    def is_open_ended(self) -> bool:
        """Whether no step depends on run.steps, so that a finished run can be continued with a larger one."""
        return self.optim.is_open_ended(*self.method.momenta.values())

    def build_objective(self) -> "Objective":
        """The method with fresh weights drawn from run.seed."""
        # imported here, so that a configuration is checked without torch
        from vidssl.objective.build import build_objective
        from vidssl.pretrained.load import load_teacher

        frames = [self.data.frames, *(stream.clip_frames for stream in self.data.streams())]
        size = self.augment.arguments["size"]
        windows = self.data.windows_of_clips
        objective = build_objective(
            self.method, self.model, frames, size, self.run.seed, load_teacher, windows
        )
        if objective.needs_motion and not self.data.motion_vectors:
            raise UserError(
                f"method.score.kind {self.method.score.kind} needs the motion vectors of the codec: "
                "give data.motion_vectors=true"
            )
        return objective

    def encoder_arguments(self) -> dict[str, Any]:
        """Arguments of the run's Encoder for its file header, without training-only arguments (drop_path)."""
        model = {k: v for k, v in self.model.arguments.items() if k != "drop_path"}
        size = self.augment.arguments["size"]
        frames = self.method.encoder_frames(self.data.frames, model["tubelet"])
        return model | {"frames": frames, "height": size, "width": size}


# Keys that may change when a run is continued. Data may move to another path, since their hash is compared.
RESUME_MUTABLE = (
    "efficiency",
    "online_probe",
    "run.out",
    "run.save_every",
    "run.keep_last",
    "run.keep_every",
    "run.snapshots",
    "run.max_consecutive_skips",
    "run.max_rollbacks",
    "run.loss_spike_std",
    "run.feature_stats_every",
    "run.stop_on_collapse",
    "run.validate_every",
    "run.validate_clips",
    "run.patience",
    "run.log_every",
    "run.trackers",
    *(f"data.{key}" for key in MUTABLE_KEYS),
)


def resume_mutable(cfg: TrainConfig) -> tuple[str, ...]:
    """Keys that may change when the run `cfg` is continued."""
    return (*RESUME_MUTABLE, "run.steps") if cfg.is_open_ended else RESUME_MUTABLE

"""The configuration of a pre-training run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from vidssl.config import Choice, NonNegativeInt, PositiveFloat, PositiveInt, Spec, Text
from vidssl.core.errors import UserError
from vidssl.core.io import check_writable
from vidssl.data.augment import AUGMENTS
from vidssl.data.dataset import DataConfig
from vidssl.data.order import check_split
from vidssl.model.vit import MODELS
from vidssl.objective.build import MethodConfig, build_objective
from vidssl.objective.objective import Objective
from vidssl.pretrained.load import NATIVE_SIZE_KEYS, load_teacher
from vidssl.training.metrics_log import Tracker, check_trackers
from vidssl.training.online_probe import OnlineProbeConfig
from vidssl.training.optim import OptimConfig


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
    trackers: tuple[Tracker, ...] = ()  # besides log.jsonl


@dataclass(frozen=True)
class EfficiencyConfig:
    """The `efficiency` section: changes only the speed, up to rounding. With data.reader=stream `workers`
    also changes the order of the samples."""

    workers: NonNegativeInt = 2  # loader processes for each training process
    micro_batches: PositiveInt = (
        1  # parts in which a process computes its share of the batch (gradient accumulation)
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass
    compile: bool = (
        False  # torch.compile the transformer blocks: needs a C++ compiler, and minutes at the start
    )
    fused: bool = True  # the optimizer's step is one kernel
    activation_checkpointing: bool = False  # recompute the blocks' activations in the backward pass
    decode_in_subprocess: bool = True  # a file that hangs or crashes a decoder then costs only itself
    cache_mb: NonNegativeInt = 0  # decoded frames that each loader process may hold, in 2**20 bytes
    tune_malloc: bool = (
        True  # on CPUs, keep freed memory in the process instead of returning it to the system
    )
    threads: PositiveInt | None = None  # of torch on the CPU, for each process; None: torch's own choice
    peer_timeout_s: PositiveInt = 600  # seconds that a process waits for another one before it gives up


@dataclass(frozen=True)
class TrainConfig:
    """All sections of vidssl/train.py."""

    method: MethodConfig
    model: Annotated[Spec, Choice(MODELS, NATIVE_SIZE_KEYS)]
    data: DataConfig
    augment: Annotated[Spec, Choice(AUGMENTS)]
    optim: OptimConfig
    run: RunConfig
    online_probe: OnlineProbeConfig
    efficiency: EfficiencyConfig

    def __post_init__(self) -> None:
        target = self.method.target
        if target.kind == "ema" and self.optim.schedule_steps is not None and self.momentum[1] == 1:
            raise UserError(
                "method.target.momentum: a momentum of 1 freezes the EMA encoder, while a run with "
                "optim.schedule_steps goes on"
            )

    @property
    def momentum(self) -> tuple[float, float]:
        """EMA momentum at the first and the last step; (1, 1) if the target is fixed."""
        return self.method.target.arguments.get("momentum", (1.0, 1.0))

    @property
    def is_open_ended(self) -> bool:
        """Whether no step depends on run.steps, so that a finished run can be continued with a larger one."""
        return self.optim.is_open_ended(self.momentum)

    def build_objective(self) -> Objective:
        """The method with fresh weights drawn from run.seed."""
        frames = [stream.frames for stream in self.data.streams()]
        size = self.augment.arguments["size"]
        return build_objective(self.method, self.model, frames, size, self.run.seed, load_teacher)

    def encoder_arguments(self) -> dict[str, Any]:
        """Arguments of the run's Encoder for its file header, without training-only arguments (drop_path)."""
        model = {k: v for k, v in self.model.arguments.items() if k != "drop_path"}
        size = self.augment.arguments["size"]
        return model | {"frames": self.data.frames, "height": size, "width": size}


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
    "run.trackers",
    "data.train",
    "data.cache_dir",
    "data.cache_gb",
    "data.decode_timeout_s",
    "data.memory_mb",
)


def resume_mutable(cfg: TrainConfig) -> tuple[str, ...]:
    """Keys that may change when the run `cfg` is continued."""
    return (*RESUME_MUTABLE, "run.steps") if cfg.is_open_ended else RESUME_MUTABLE


def check_output(run: RunConfig) -> None:
    """Raises UserError if the run's folder cannot be written or a tracker is not installed."""
    check_writable(Path(run.out))
    check_trackers(run.trackers)


def check_batch(cfg: TrainConfig, world: int) -> None:
    """Raises UserError if the clips of a step cannot be divided evenly over lanes, processes and
    micro-batches."""
    for stream, clips in enumerate(cfg.data.clips(cfg.run.batch)):
        name = f"data.extra_streams[{stream - 1}].clips"
        if stream == 0:
            name = "run.batch" + (" less data.extra_streams's clips:" if cfg.data.extra_streams else "")
        check_split(clips, cfg.run.lanes, world, name, cfg.data.repeat)
        share = clips // world
        if share % cfg.efficiency.micro_batches:
            raise UserError(
                f"efficiency.micro_batches {cfg.efficiency.micro_batches} "
                f"does not divide {share} clips a process"
            )

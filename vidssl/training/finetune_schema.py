"""The configuration of vidssl/finetune.py."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vidssl.config import (
    Arguments,
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
from vidssl.config.signatures import PartTable
from vidssl.core.errors import UserError
from vidssl.core.io import check_no_shards, check_writable
from vidssl.data.schema import AUGMENT_PARTS, check_local_folders
from vidssl.pretrained.sources import check_source
from vidssl.training.config_checks import check_trackers
from vidssl.training.schema import EfficiencyConfig, OptimConfig, Tracker

HEAD_PARTS = PartTable("vidssl.training.finetuning", "FINETUNE_HEADS")


@dataclass(frozen=True)
class FinetuneDataConfig:
    """The `data` section: labelled shards; clips have the frames and size that the encoder was trained on."""

    train: Names  # packed folders with labels
    test: Names
    label: Text | None = None  # the label set; None: the only one
    stride: PositiveInt | None = None  # frames; None (and fps None): as in pre-training
    fps: PositiveFloat | None = None  # frames per second
    # host: all training videos are decoded once and kept in memory, as stored
    cache: Literal["none", "host"] = "none"
    max_decode_error_rate: Fraction = 0.05  # of training samples; the run stops above it

    def __post_init__(self) -> None:
        if self.stride is not None and self.fps is not None:
            raise UserError("data: give stride (in frames) or fps (frames per second), not both")


@dataclass(frozen=True)
class TuneConfig:
    """The `tune` section: options that change the result."""

    epochs: PositiveInt
    batch: PositiveInt  # videos per step, over all processes
    repeat: PositiveInt = 1  # clips per video (repeated augmentation)
    warmup: NonNegativeFloat = 5.0  # epochs
    drop_path: Fraction = 0.0
    label_smoothing: Fraction = 0.1
    mixup: NonNegativeFloat = 0.0  # alpha of the Beta distribution (arXiv 1710.09412); 0: off
    cutmix: NonNegativeFloat = (
        0.0  # the same (arXiv 1905.04899); with both, each is used in half of the steps
    )
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of train, selects the epoch; 0: the last epoch
    segments: PositiveInt = 5  # clips per test video, evenly spaced
    crops: PositiveInt = 3  # square crops per test clip
    allow_unreadable: bool = False  # count an unreadable test video as wrong and list it, instead of an error
    max_consecutive_skips: NonNegativeInt = (
        3  # skipped steps in a row that are tolerated; one more rolls back
    )
    max_rollbacks: NonNegativeInt = 2  # rollbacks to the last checkpoint before the run stops
    # skip a step whose loss or gradient norm exceeds its recent mean by this many standard deviations; None:
    # never
    loss_spike_std: PositiveFloat | None = None
    trackers: tuple[Tracker, ...] = ()  # besides log.jsonl
    lanes: PositiveInt = 8  # a multiple of every number of processes that may be used
    seed: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All sections of vidssl/finetune.py."""

    encoder: Text  # a run folder, a file of ours, or a public checkpoint
    out: Text  # folder
    random_init: bool = False  # the same encoder untrained, for comparison
    data: FinetuneDataConfig
    augment: Annotated[Spec, Choice(AUGMENT_PARTS, supplied=("size",))]
    head: Annotated[Spec, Choice(HEAD_PARTS, supplied=("dim", "classes"))]
    optim: Annotated[Spec, Arguments(OptimConfig, supplied=("warmup",))]
    tune: TuneConfig
    efficiency: EfficiencyConfig

    def __post_init__(self) -> None:
        if self.augment.kind == "crop_pair":
            raise UserError("augment.kind crop_pair makes pairs for pre-training: give random_crop here")

    def check_before_work(self) -> None:
        """Raises UserError for what can be known before torch is imported and data are opened."""
        check_source(self.encoder, "encoder")
        check_local_folders("data.train", self.data.train)
        check_local_folders("data.test", self.data.test)
        check_divisible(self.tune, self.efficiency, int(os.environ.get("WORLD_SIZE", "1")))
        check_trackers(self.tune.trackers, "tune.trackers")
        check_writable(Path(self.out))
        check_no_shards(Path(self.out), "out")

    def notes(self) -> list[str]:
        """A line for each pair of keys that has another effect than it seems to."""
        tune = self.tune
        if tune.warmup < tune.epochs:
            return []
        return [
            f"tune.warmup {tune.warmup:g} is not shorter than tune.epochs {tune.epochs}: "
            "the rate only rises, and never decays"
        ]


# Keys that may change when a run is continued. Of data the hashes are compared.
RESUME_MUTABLE = (
    "out",
    "data.train",
    "data.test",
    "data.cache",
    "data.max_decode_error_rate",
    "tune.allow_unreadable",
    "tune.max_consecutive_skips",
    "tune.max_rollbacks",
    "tune.loss_spike_std",
    "tune.trackers",
    "efficiency",
)


def check_divisible(tune: TuneConfig, efficiency: EfficiencyConfig, world: int) -> None:
    """Raises UserError if the batch cannot be divided evenly over lanes, processes and micro-batches."""
    clips = tune.batch * tune.repeat // world
    for what, n, divisor_name, divisor in (
        ("tune.batch", tune.batch, "tune.lanes", tune.lanes),
        ("tune.lanes", tune.lanes, "the number of processes", world),
        ("clips per process", clips, "efficiency.micro_batches", efficiency.micro_batches),
    ):
        if n % divisor:
            raise UserError(f"{what} {n}: give a multiple of {divisor_name}, {divisor}")
    if (tune.mixup or tune.cutmix) and tune.batch % (2 * tune.lanes):
        raise UserError(
            f"tune.batch {tune.batch}: mixup and cutmix need a multiple of 2 x tune.lanes, {2 * tune.lanes}"
        )

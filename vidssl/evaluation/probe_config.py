"""The configuration of vidssl/probe.py."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from vidssl.config import Choice, Names, NonNegativeInt, PositiveFloat, PositiveInt, Spec, Text
from vidssl.config.signatures import PartTable
from vidssl.core.errors import UserError
from vidssl.data.schema import check_local_folders
from vidssl.pretrained.sources import check_source

PROTOCOLS = PartTable("vidssl.evaluation.protocols", "PROTOCOLS")
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class ProbeData:
    """The `data` section of a probe."""

    train: Names  # packed folders with labels
    test: Names
    labels: Names | None = None  # label sets to probe; None: all that train and test have in common
    tags: tuple[str, ...] = ()  # label sets whose class names are tags joined by "|" (multi-label)
    numbers: tuple[str, ...] = ()  # label sets whose class names are numbers (regression)
    frames: PositiveInt | None = None  # per clip; None: the encoder's own (an image model has none)
    size: PositiveInt | None = None  # pixels; None: the encoder's own
    stride: PositiveInt | None = None  # frames; None (and fps None): as the encoder was trained
    fps: PositiveFloat | None = None  # frames per second
    train_fractions: tuple[
        OpenFraction, ...
    ] = ()  # low-shot subsets of train, one per seed; (): all of train
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    cache_dir: Text | None = None  # folder for remote shards; None: the user's cache folder
    cache_gb: PositiveFloat = 100  # its size limit

    def __post_init__(self) -> None:
        if self.stride is not None and self.fps is not None:
            raise UserError("data: give stride (in frames) or fps (frames a second), not both")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """All sections of vidssl/probe.py."""

    encoder: Text  # a run folder, a file of ours, a public checkpoint, timm:NAME or hf:FOLDER_OR_NAME
    encoder_file: Text | None = None  # weights of a timm model; None: timm downloads them
    out: Text  # folder
    random_init: bool = False  # the same encoder untrained, for comparison
    data: ProbeData
    probe: Annotated[Spec, Choice(PROTOCOLS)]

    def check_before_work(self) -> None:
        """Raises UserError for what can be known before torch is imported and data are opened."""
        check_source(self.encoder, "encoder", libraries=True)
        check_local_folders("data.train", self.data.train)
        check_local_folders("data.test", self.data.test)

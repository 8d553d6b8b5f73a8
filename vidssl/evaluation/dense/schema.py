"""The configuration of vidssl/dense.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from vidssl.config import Choice, PositiveFloat, PositiveInt, Spec, Text
from vidssl.config.signatures import PartTable
from vidssl.core.io import check_no_shards, check_writable
from vidssl.data.schema import check_local_folders
from vidssl.pretrained.sources import check_source

TASKS = PartTable("vidssl.evaluation.dense.tasks", "TASKS")


@dataclass(frozen=True)
class DenseData:
    """The `data` section: the folder of a data set, with its lists of train and test."""

    test: Text  # folder whose test list is evaluated
    format: Text  # davis, jhmdb, nyu or synthetic
    train: Text | None = None  # folder whose train list is for training and selection; None: that of test
    max_train_sequences: PositiveInt | None = None  # evenly spaced over the train list; None: all
    decode_timeout_s: PositiveFloat = 300  # seconds; a sequence that takes longer to read is an error
    decode_memory_mb: PositiveInt = 4096  # 2**20 bytes by which a sequence may grow the decoding process


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """All sections of vidssl/dense.py."""

    encoder: Text  # as in vidssl/probe.py
    encoder_file: Text | None = None  # weights of a timm model; None: timm downloads them
    out: Text  # folder
    data: DenseData
    task: Annotated[Spec, Choice(TASKS)]

    def check_before_work(self) -> None:
        """Raises UserError for what can be known before torch is imported and data are opened."""
        check_source(self.encoder, "encoder", libraries=True)
        check_local_folders("data.test", [self.data.test])
        check_local_folders("data.train", [self.data.train] if self.data.train else [])
        check_writable(Path(self.out))
        check_no_shards(Path(self.out), "out")

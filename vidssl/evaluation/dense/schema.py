"""The configuration of vidssl/dense.py."""

from dataclasses import dataclass
from typing import Annotated

from vidssl.config import Choice, Count, Spec
from vidssl.evaluation.dense.depth import Depth
from vidssl.evaluation.dense.propagation import Keypoints, Masks

TASKS = {"depth": Depth, "masks": Masks, "keypoints": Keypoints}


@dataclass(frozen=True)
class DenseData:
    """The `data` section: a data set's own folder, which has lists of train and test."""

    test: str  # its test list is evaluated
    format: str  # davis, jhmdb, nyu or synthetic
    train: str | None = None  # its train list is for heads and choices; None: the folder of test
    limit: Count | None = None  # sequences of train at most, evenly spread over the list


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """All sections of vidssl/dense.py."""

    encoder: str  # as vidssl/probe.py takes it
    encoder_file: str | None = None  # weights of a timm model; None: timm downloads them
    out: str  # folder
    data: DenseData
    task: Annotated[Spec, Choice(TASKS)]

"""The configuration of vidssl/probe.py."""

from dataclasses import dataclass
from typing import Annotated

from vidssl.config import Choice, Spec, Text
from vidssl.evaluation.heads import Attentive, Linear
from vidssl.evaluation.neighbours import Knn, Retrieval
from vidssl.evaluation.probe_data import ProbeData

PROTOCOLS = {"attentive": Attentive, "linear": Linear, "knn": Knn, "retrieval": Retrieval}


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """All sections of vidssl/probe.py."""

    encoder: Text  # a run folder, a file of ours, a public checkpoint, timm:NAME or hf:FOLDER_OR_NAME
    encoder_file: Text | None = None  # weights of a timm model; None: timm downloads them
    out: Text  # folder
    random_init: bool = False  # the same encoder untrained, for comparison
    data: ProbeData
    probe: Annotated[Spec, Choice(PROTOCOLS)]

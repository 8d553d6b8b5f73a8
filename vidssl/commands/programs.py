"""The programs that take YAML files and key=value, with their configuration classes; without torch."""

import importlib
from typing import NamedTuple


class Program(NamedTuple):
    """module and name of a configuration class; folders: of configs/ that hold files for it; shares_work:
    whether it takes --processes."""

    module: str
    name: str
    folders: tuple[str, ...]
    shares_work: bool = True

    def cls(self) -> type:
        return getattr(importlib.import_module(self.module), self.name)


PROGRAMS = {
    "train": Program("vidssl.training.schema", "TrainConfig", ("recipe", "method", "model", "data", "run")),
    "probe": Program("vidssl.evaluation.probe_config", "ProbeConfig", ("probe",)),
    "finetune": Program("vidssl.training.finetune_schema", "FinetuneConfig", ("finetune",)),
    "dense": Program("vidssl.evaluation.dense.schema", "DenseConfig", ("dense",), shares_work=False),
    "zoo-run": Program("vidssl.zoo.config", "ZooConfig", ("zoo", "ablation"), shares_work=False),
}

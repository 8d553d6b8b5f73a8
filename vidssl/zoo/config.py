"""The configuration of a zoo: runs, probes, and what is equal between the runs. Without torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from vidssl.config import NonNegativeInt, PositiveFloat, PositiveInt, Text, load_config
from vidssl.core.errors import UserError
from vidssl.core.io import check_writable
from vidssl.data.schema import check_local_folders
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.training.schema import TrainConfig

UNTRAINED = "untrained"  # the name of the baseline among the runs
Equal = Literal["clips", "flops"]
Program = TypeVar("Program")


@dataclass(frozen=True)
class ZooConfig:
    """All keys of vidssl zoo-run."""

    runs: dict[str, list[str]]  # name -> arguments of train.py
    out: Text  # folder
    shared: tuple[str, ...] = ()  # arguments of train.py for all runs; those of a run come after them
    probes: dict[str, list[str]] = field(default_factory=dict)  # name -> arguments of probe.py
    # values of run.seed: every run is made once with each
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    equal: Equal = "clips"  # what all runs get the same of: clips seen, or counted FLOPs
    budget: PositiveFloat | None = None  # clips or FLOPs of each run; None: those of the first run
    snapshots: PositiveInt = 1  # encoders of each run that are probed, evenly spaced, the last one included
    at_once: PositiveInt = 1  # programs that run at the same time
    # limit of all work; steps are measured first, and all runs shortened alike; None: no limit
    minutes: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError(
                "runs: none is given; name one with the arguments of train.py: NAME: [FILES, key=value]"
            )
        for key, names in (("runs", self.runs), ("probes", self.probes)):
            for name in names:
                if not re.fullmatch(r"\w[\w.-]*", name) or name == UNTRAINED:
                    raise UserError(
                        f"{key}.{name}: becomes a folder: give another name (letters, digits, _ - .)"
                    )

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def run_folder(self, name: str, seed: int) -> Path:
        return self.folder / "runs" / f"{name}-seed{seed}"

    def probe_folder(self, probe: str, name: str, seed: int, step: int) -> Path:
        return self.folder / "probes" / probe / f"{name}-seed{seed}-step{step:08d}"

    def untrained_folder(self, probe: str) -> Path:
        return self.folder / "probes" / probe / UNTRAINED

    def train_arguments(self, name: str, out: Path, *more: str) -> list[str]:
        """Arguments of train.py for a run."""
        return [*self.shared, *self.runs[name], f"run.out={out}", *more]

    def probe_arguments(self, probe: str, encoder: Path, out: Path, *more: str) -> list[str]:
        """Arguments of probe.py."""
        return [*self.probes[probe], f"encoder={encoder}", f"out={out}", *more]

    def train_config(self, name: str, *more: str) -> TrainConfig:
        """The configuration of a run as its arguments give it, and `more`. Raises UserError with the run's
        name."""
        arguments = self.train_arguments(name, self.run_folder(name, self.seeds[0]), *more)
        return _loaded(f"runs.{name}", arguments, TrainConfig)

    def probe_config(self, probe: str) -> ProbeConfig:
        """The configuration of a probe. Raises UserError with its name."""
        arguments = self.probe_arguments(probe, Path("ENCODER"), self.untrained_folder(probe))
        return _loaded(f"probes.{probe}", arguments, ProbeConfig)

    def check_before_work(self) -> None:
        """Raises UserError for what can be known before torch is imported and data are opened."""
        check_writable(self.folder)
        configs = {name: self.train_config(name) for name in self.runs}
        probes = {probe: self.probe_config(probe) for probe in self.probes}
        for name, cfg in configs.items():
            try:
                cfg.check_before_work()
            except UserError as e:
                raise UserError(f"runs.{name}: {e}") from None
        for probe, found in probes.items():
            check_local_folders(f"probes.{probe}: data.train", found.data.train)
            check_local_folders(f"probes.{probe}: data.test", found.data.test)


def _loaded(where: str, arguments: Sequence[str], cls: type[Program]) -> Program:
    try:
        return load_config(arguments, cls)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None

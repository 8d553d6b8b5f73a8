"""Measurements of the features during training: statistics that show a collapse, and an online probe."""

import contextlib
import math
import time
from dataclasses import replace

import torch

from vidssl.core.log import logger
from vidssl.data.loader import Batch
from vidssl.objective.objective import Objective
from vidssl.training.distributed import Strategy
from vidssl.training.feature_stats import FeatureStats
from vidssl.training.online_probe import OnlineProbe
from vidssl.training.schema import TrainConfig


class Diagnostics:
    """Feature statistics (feature_stats.py) and online probe (online_probe.py) when they are due."""

    def __init__(self, cfg: TrainConfig, objective: Objective, strategy: Strategy):
        """Collective if there is an online probe, whose clips are decoded here."""
        self.run = cfg.run
        self.compiled = cfg.efficiency.compile
        self.every = cfg.online_probe.every
        # of the encoder's clip; those that are loaded may be longer
        self.frames = cfg.encoder_arguments()["frames"]
        self.objective = objective
        self.strategy = strategy
        self.stats = FeatureStats()
        self.probe: OnlineProbe | None = None
        if cfg.online_probe.train is not None:
            self.probe = OnlineProbe(
                cfg.online_probe,
                replace(cfg.data, frames=self.frames),
                cfg.augment.arguments["size"],
                workers=cfg.num_workers,
                isolate=cfg.efficiency.decode_in_subprocess,
                loads_clips=strategy.runs_diagnostics,
                barrier=strategy.barrier,
            )

    @property
    def should_stop(self) -> bool:
        """Whether the run is to stop because its features have collapsed; decided by the first process."""
        return self.strategy.is_main and self.run.stop_on_collapse and self.stats.collapsed

    def measure_if_due(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """The measurements that are due after `step` steps, for the log, and the seconds that they took;
        batches: those of the last step."""
        if not self.strategy.runs_diagnostics:
            return {}
        start_s = time.perf_counter()
        self.stats.add_clips(batches[0].video[:, :, : self.frames])
        metrics: dict[str, float] = {}
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
            if step % self.run.feature_stats_every == 0 or step in (1, self.run.steps):
                metrics |= self.stats.measure(self.objective, self.strategy.autocast)
                self._warn_of_missing(step, metrics)
                warning = self.stats.detector.warning()
                if warning and self.strategy.is_main:
                    logger.warning(f"step {step}: {warning}")
            if self.probe and (step % self.every == 0 or step == self.run.steps):
                metrics |= self.probe.measure(self.objective, self.strategy.autocast)
        return {**metrics, "diagnostics_s": time.perf_counter() - start_s} if metrics else {}

    def _warn_of_missing(self, step: int, metrics: dict[str, float]) -> None:
        missing = [name for name, value in metrics.items() if not math.isfinite(value)]
        if missing and self.strategy.is_main:
            logger.warning(
                f"step {step}: the features are not finite or have no spectrum: {', '.join(missing)}"
            )

"""Measurements during training: statistics of the features that show a collapse, the held-out error, and an
online probe; pictures for trackers."""

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch

from vidssl.core.log import logger
from vidssl.data.loader import Batch
from vidssl.objective.objective import Objective
from vidssl.training.distributed import Strategy
from vidssl.training.feature_stats import Autocast, FeatureStats
from vidssl.training.online_probe import OnlineProbe
from vidssl.training.run_folder import RunEnding
from vidssl.training.schema import TrainConfig
from vidssl.training.validation import HeldOutRule, Validation


class PictureLog(Protocol):
    """Pictures of what a run sees and predicts, for its trackers (vidssl/pictures/tracked.py)."""

    def log(
        self, step: int, objective: Objective, video: torch.Tensor, autocast: Autocast
    ) -> dict[str, float]:
        """Sends the pictures after `step` steps. Returns what the log says of it."""


class Diagnostics:
    """Feature statistics (feature_stats.py), held-out error (validation.py) and online probe
    (online_probe.py) when they are due."""

    def __init__(
        self,
        cfg: TrainConfig,
        objective: Objective,
        strategy: Strategy,
        pictures: PictureLog | None = None,
    ):
        """Collective if there is an online probe or a held-out error, whose clips are decoded here. pictures:
        of the first process; None: there are no trackers."""
        self.pictures = pictures
        self.run = cfg.run
        self.compiled = cfg.efficiency.compile
        self.every = cfg.online_probe.every
        # of the encoder's clip; those that are loaded may be longer
        self.frames = cfg.encoder_arguments()["frames"]
        self.objective = objective
        self.strategy = strategy
        self.stats = FeatureStats(strategy.clip_share)
        self.validate_every = cfg.validate_every
        self.validation: Validation | None = None
        if cfg.data.val is not None:
            self.validation = Validation(
                cfg,
                objective,
                loads_clips=strategy.runs_diagnostics,
                world=strategy.world,
                barrier=strategy.barrier,
            )
        identity = None if self.validation is None else self.validation.identity
        self.rule = HeldOutRule(cfg.run.patience, identity)
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
    def signals(self) -> dict[str, bool]:
        """Which measurements ask for the end of the run, for `ending`; decided by the first process."""
        main = self.strategy.is_main
        collapsed = main and self.run.stop_on_collapse and self.stats.collapsed
        return {"collapsed": collapsed, "over": main and self.rule.is_over}

    def stats_are_due(self, step: int) -> bool:
        return step % self.run.feature_stats_every == 0 or step in (1, self.run.steps)

    def error_is_due(self, step: int) -> bool:
        return self.validation is not None and (step % self.validate_every == 0 or step == self.run.steps)

    def probe_is_due(self, step: int) -> bool:
        return self.probe is not None and (step % self.every == 0 or step == self.run.steps)

    def needs_row(self, step: int) -> bool:
        """Whether step `step` has a row of the log of its own end: for a measurement after it, or since one
        before it may end the run."""
        may_end = self.run.stop_on_collapse or self.run.patience is not None
        return any(
            is_due(after)
            for is_due in (self.stats_are_due, self.error_is_due, self.probe_is_due)
            for after in (step, *([step - 1] if may_end else []))
        )

    def measure_before(self, start: int) -> None:
        """Measures the held-out error if no step is done; the row of the first step reports it. start: steps
        that are done."""
        if start == 0 and self.validation and self.strategy.runs_diagnostics:
            self.rule.add(0, self.validation.measure(self.objective, self.strategy.autocast))

    def measure_if_due(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """The measurements that are due after `step` steps, for the log, and the seconds that they took;
        batches: those of the last step."""
        start_s = time.perf_counter()
        measures = self.strategy.runs_diagnostics
        self.stats.add_clips(batches[0].video[:, :, : self.frames])
        metrics: dict[str, float] = {}
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
            if self.stats_are_due(step):
                metrics |= self.stats.measure(self.objective, self.strategy.autocast)
                self._warn_of_missing(step, metrics)
                warning = self.stats.detector.warning()
                if warning and self.strategy.is_main:
                    logger.warning(f"step {step}: {warning}")
            if measures and self.error_is_due(step):
                metrics |= self._validate(step)
            if step == 1:
                metrics |= {f"{name}_start": value for name, value in self.rule.first.items()}
            if measures and self.probe and self.probe_is_due(step):
                metrics |= self.probe.measure(self.objective, self.strategy.autocast)
            if self.pictures and (step % self.run.save_every == 0 or step in (1, self.run.steps)):
                video = batches[0].video
                metrics |= self.pictures.log(step, self.objective, video, self.strategy.autocast)
        return {**metrics, "diagnostics_s": time.perf_counter() - start_s} if metrics else {}

    def _validate(self, step: int) -> dict[str, float]:
        assert self.validation is not None
        was_over = self.rule.is_over
        found = self.validation.measure(self.objective, self.strategy.autocast)
        self.rule.add(step, found)
        if self.rule.is_over and not was_over and self.strategy.is_main:
            logger.info(f"step {step}: the run ends here: {self.rule.line}")
        return found

    def _warn_of_missing(self, step: int, metrics: dict[str, float]) -> None:
        missing = [name for name, value in metrics.items() if not math.isfinite(value)]
        if missing and self.strategy.is_main:
            logger.warning(
                f"step {step}: the features are not finite or have no spectrum: {', '.join(missing)}"
            )


def ending(metrics: Mapping[str, float]) -> RunEnding | None:
    """What ends the run now. metrics: sums over the processes of `stop` and of Diagnostics.signals,
    of the last row of the log, if there is one."""
    if metrics.get("stop"):
        return "stopped"
    if metrics.get("collapsed"):
        return "collapsed"
    return "over" if metrics.get("over") else None

"""Held-out prediction error during training: the loss on fixed clips of data.val with fixed masks and draws,
and the rule that ends a run by it."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import starmap
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset

from vidssl.core.constants import upload
from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.core.pixels import normalise
from vidssl.core.rng import GlobalBatch, KeyedRNG
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Sample, Shards
from vidssl.data.timing import middle_rate
from vidssl.evaluation.evaluate import shared_samples, warn_of_shared_groups
from vidssl.evaluation.isolated_clips import IsolatedEvalClips
from vidssl.evaluation.views import EvalClips, View
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.masks import count_cut_groups
from vidssl.objective.objective import Masks, Objective
from vidssl.training.distributed import unsharded
from vidssl.training.feature_stats import Autocast
from vidssl.training.online_probe import decode_all, evenly_spaced
from vidssl.training.schema import TrainConfig

MIN_CLIPS_OF_MEAN = 8  # clips whose mean target is a prediction
# No training step has this number, what rises over the run has risen at it, and run.steps may change
FIRST_STEP = 1 << 40
# Samples of data.train up to which all are compared with data.val, in seconds; of more those in common shards
MAX_COMPARED = 1_000_000
DISTANCES = ("l1", "l2", "smooth_l1")  # errors by which a mean can be compared with its parts


class HeldOutRule:
    """Judges the held-out errors of a run: the step with the lowest one, and whether the run is to end.

    The error is val_ratio where there is one: a loss of features that change may fall because they have
    become poorer, which the loss of their mean does as well. Else it is val_loss.
    """

    def __init__(self, patience: int | None, clips: Mapping[str, Any] | None = None):
        """patience: measurements in a row without a lower error, after which the run ends; None: it goes on
        to run.steps. clips: Validation.identity of what is measured; None: nothing is."""
        self.patience = patience
        self.clips = clips
        self.first: dict[str, float] = {}  # measured before the first step
        self.best: float | None = None
        self.best_step: int | None = None
        self.without_gain = 0

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: of Validation.measure after `step` steps; those before the first step count as no best."""
        if step == 0:
            self.first = metrics
            return
        error = held_out_error(metrics)
        # NaN, of weights that were not finite, is no bound
        if self.best is None or math.isnan(self.best) or error < self.best:
            self.best = error
            self.best_step = step
            self.without_gain = 0
        else:
            self.without_gain += 1

    @property
    def is_over(self) -> bool:
        return self.patience is not None and self.without_gain >= self.patience

    @property
    def line(self) -> str:
        """Why the run ends."""
        return (
            f"the held-out error has not fallen for {self.without_gain} measurements; it was lowest, "
            f"{self.best:.4f}, after step {self.best_step}"
        )

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain data."""
        names = ("first", "best", "best_step", "without_gain", "clips")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned; of a checkpoint without it nothing is known. Errors on other clips
        are not compared: the rule then starts anew. States that do not name the clips are of these."""
        before = state.get("clips") or self.clips
        if before is None or self.clips in (None, before):
            self.__dict__.update({**state, "clips": before})
            return
        if state["best"] is not None:
            changed = "data.val" if self.clips["data"] != before["data"] else "run.validate_clips"
            logger.warning(
                f"{changed}: the held-out clips are others than in the checkpoint, so the lowest error "
                f"({state['best']:.4f} after step {state['best_step']}) and run.patience count anew"
            )


def held_out_error(metrics: dict[str, float]) -> float:
    """Of a measurement, by which HeldOutRule judges."""
    return metrics.get("val_ratio", metrics["val_loss"])


class Validation:
    """Decodes the clips once and keeps them in memory."""

    def __init__(
        self,
        cfg: TrainConfig,
        objective: Objective,
        *,
        loads_clips: bool = True,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
    ):
        """Every process constructs it; only those with `loads_clips` decode and can measure. world: number of
        processes. barrier: see OnlineProbe."""
        assert cfg.data.val is not None
        run = cfg.run
        if objective.couples_clips and world > 1:
            raise UserError(
                "data.val: the method compares the clips of all processes with one another: leave data.val "
                "out, or train in one process"
            )
        self.seed = run.seed
        self.has_ratio = isinstance(objective, MaskedPrediction) and cfg.method.error.kind in DISTANCES
        data = replace(cfg.data, frames=cfg.data.clip_frames)
        size = cfg.augment.arguments["size"]
        view = View(data.frames, *middle_rate(data.stride, data.fps), segments=1, crops=1, size=size)
        shards = Shards(cfg.data.val, data.cache_dir, data.cache_gb)
        listed = shards.list_samples()
        if loads_clips:
            warn_of_training_samples(cfg.data, shards, listed)
        samples = evenly_spaced(listed, run.validate_clips)
        eval_clips = EvalClips(shards, samples, view, 1)
        clips: Dataset = eval_clips
        if cfg.efficiency.decode_in_subprocess:
            clips = IsolatedEvalClips(eval_clips, data.decode_timeout_s, data.memory_mb << 20)
        # The same in all processes, also where no clips are decoded
        self.identity = {"data": shards.hash, "number": len(samples)}
        places = list(range(len(samples)))
        decoded = decode_all("data.val", clips, places, cfg.num_workers, loads_clips, barrier)
        self.clips = decoded.clips
        if loads_clips and not len(self.clips):
            raise UserError(f"data.val: {', '.join(shards.folders)}: no sample can be decoded")
        # Clips that share the draws of a step, as in training: by the configuration, so that the error does
        # not depend on how the processes divide a step
        clips_of_step = cfg.data.clips(run.batch)[0]
        group = clips_of_step // count_cut_groups(objective.mask, clips_of_step)
        self.group = min(group, max(1, len(self.clips)))
        if objective.couples_clips:
            self.clips = self.clips[: len(self.clips) // self.group * self.group]
        # clips of a forward pass: no more than in training, for the memory
        self.batch = min(self.group, clips_of_step // (world * cfg.efficiency.micro_batches))
        if loads_clips and self.has_ratio and len(self.clips) < MIN_CLIPS_OF_MEAN:
            self.has_ratio = False
            logger.info(
                f"data.val: {len(self.clips)} clips are too few for val_ratio ({MIN_CLIPS_OF_MEAN} or more): "
                "the held-out error is val_loss"
            )

    @torch.no_grad()
    def measure(self, objective: Objective, autocast: Autocast = contextlib.nullcontext) -> dict[str, float]:
        """val_loss: the loss, with the weights of its parts at the end of the run. val_ratio: that loss over
        the one of predicting, at each place, the mean target of all clips; only of distances, where clips
        have targets before their masks are known; NaN where the targets do not differ. With sharded weights
        (FSDP2) every process must call this. autocast: context of the forward passes."""
        device = next(objective.parameters()).device
        total = of_mean = 0.0
        was_training = objective.training
        objective.eval()
        with unsharded(objective), unchanged_buffers(objective), autocast():
            mean = self._mean_target(objective, device)
            for number, group in enumerate(torch.arange(len(self.clips)).split(self.group)):
                for positions in group.split(self.batch):
                    video = normalise(self.clips[positions].to(device))
                    batch = GlobalBatch(int(group[0]), len(group))
                    rng = KeyedRNG(self.seed, FIRST_STEP + number, positions, batch)
                    masks = draw_masks(objective, video, rng)
                    share = len(positions) / len(self.clips)
                    total += share * float(objective(video, rng.to(device), masks)["loss"])
                    if mean is not None:
                        of_mean += share * error_of_mean(objective, video, mean)
        objective.train(was_training)
        found = {"val_loss": total}
        return found if mean is None else found | {"val_ratio": total / of_mean if of_mean else math.nan}

    def _mean_target(self, objective: Objective, device: torch.device) -> Tensor | None:
        """f32 [1, N, K]: the mean over the clips of the target at each place; None where that means
        nothing."""
        if not self.has_ratio:
            return None
        total: Tensor | None = None
        for clips in self.clips.split(self.batch):
            target = objective.target_features(normalise(clips.to(device)))
            if target is None:
                return None
            of_clips = target.double().sum(0, keepdim=True)
            total = of_clips if total is None else total + of_clips
        return None if total is None else (total / len(self.clips)).float()


def warn_of_training_samples(data: DataConfig, val: Shards, listed: list[Sample]) -> None:
    """Warns if samples of data.val, or others of their groups, are trained on, as may be meant: to see how
    well they are learned. listed: the samples of `val`. Without an index (data.reader=stream) it is not
    known."""
    if data.reader == "stream":
        return
    same: set[int] = set()
    of_groups: set[int] = set()
    for stream in data.streams():
        train = Shards(stream.train, data.cache_dir, data.cache_gb, data.on_missing)
        is_read = np.isin(train.table.sha256, val.table.sha256) | (train.n <= MAX_COMPARED)
        numbers = [
            (shard, i) for shard in np.flatnonzero(is_read).tolist() for i in range(train.counts[shard])
        ]
        shared = shared_samples(starmap(train.sample, numbers), listed)
        same |= shared.same
        of_groups |= shared.of_groups
    if same:
        logger.warning(
            f"data.val: {len(same)} of its {len(listed)} samples are in data.train, too, "
            f"{listed[min(same)].key} first: the error on them is not one on held-out videos"
        )
    warn_of_shared_groups(len(of_groups - same), len(listed), "data.val", "data.train")


def error_of_mean(objective: Any, video: Tensor, mean: Tensor) -> float:
    """The mean error of `mean` f32 [1, N, K] as the prediction of the targets of clips; objective: a
    MaskedPrediction."""
    target = objective.target_features(video).float()[:, None]
    return float(objective.error(mean[:, None].expand_as(target), target).mean())


def draw_masks(objective: Objective, video: Tensor, rng: KeyedRNG) -> Masks:
    """The masks of clips, drawn on the host, on the device of the video."""
    masks = objective.draw_masks(video.shape, rng)
    return tree_map_only(Tensor, partial(upload, device=video.device), masks)


@contextlib.contextmanager
def unchanged_buffers(objective: Objective) -> Iterator[None]:
    """Context after which running statistics, queues and centres are as before."""
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in objective.named_buffers():
            buffer.copy_(before[name])

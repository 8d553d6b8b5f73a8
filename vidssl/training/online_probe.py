"""Online probe: k-NN and ridge accuracy of the features on labelled clips, measured during training."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.core.pixels import normalise
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Sample, Shards
from vidssl.data.timing import middle_rate
from vidssl.evaluation.evaluate import check_disjoint, warn_of_shared_groups
from vidssl.evaluation.isolated_clips import IsolatedEvalClips
from vidssl.evaluation.neighbours import knn_predict
from vidssl.evaluation.solvers import ridge_predict
from vidssl.evaluation.splits import labelled
from vidssl.evaluation.tasks import Task, make_task
from vidssl.evaluation.views import EvalClips, View
from vidssl.objective.objective import Objective
from vidssl.training.distributed import unsharded
from vidssl.training.feature_stats import Autocast, trained_tokens
from vidssl.training.schema import OnlineProbeConfig

KNN_K = 20  # as DINO's k-NN (arXiv 2104.14294)
RIDGE_L2 = (1e-3, 1e-2, 1e-1, 1.0)  # on standardised features; selected on a quarter of train
ENCODE_BATCH = 16  # clips per forward pass
DECODE_BATCH = 4  # clips between two barriers


class LabelledClipSet(NamedTuple):
    """Decoded clips u8 [n, 3, T, S, S] and their labels (classes, or lists of classes)."""

    clips: Tensor
    labels: list[Any]


class OnlineProbe:
    """Decodes the clips once and keeps them in memory."""

    def __init__(
        self,
        config: OnlineProbeConfig,
        data: DataConfig,
        size: int,
        *,
        workers: int = 0,
        isolate: bool = False,
        loads_clips: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ):
        """data, size (pixels): of the clips in training. workers: processes that decode; isolate: in child
        processes of theirs.

        Every process constructs the probe; only those with `loads_clips` decode and can measure. All of them
        call `barrier` after every DECODE_BATCH clips, so that none waits for another one longer than these
        take.
        """
        own_rate = config.stride or config.fps
        stride, fps = (config.stride, config.fps) if own_rate else middle_rate(data.stride, data.fps)
        view = View(data.frames, stride, fps, segments=1, crops=1, size=size)
        need_mb = 2 * config.samples * 3 * data.frames * size * size >> 20
        if need_mb > config.memory_mb:
            raise UserError(
                f"online_probe.samples {config.samples} take {need_mb} MB, "
                f"online_probe.memory_mb is {config.memory_mb}"
            )
        assert config.train is not None and config.test is not None
        shards = {"train": Shards(config.train), "test": Shards(config.test)}
        label_set = config.label or next(iter(shards["train"].classes), "")
        classes = {part: classes_of(s, label_set, part) for part, s in shards.items()}
        of_parts = {part: labelled(s, [label_set]) for part, s in shards.items()}
        shared = check_disjoint(of_parts["train"], of_parts["test"], "online_probe")
        if loads_clips:
            keys = ("online_probe.test", "online_probe.train")
            warn_of_shared_groups(shared, len(of_parts["test"]), *keys)
        samples = {part: evenly_spaced(listed, config.samples) for part, listed in of_parts.items()}
        self.task: Task
        self.task, *labels = make_task(
            label_set, classes["train"], samples["train"], samples["test"], "class", classes["test"]
        )
        self.parts: dict[str, LabelledClipSet] = {}
        for part, part_labels in zip(shards, labels, strict=True):
            eval_clips = EvalClips(shards[part], samples[part], view, 1)
            clips: Dataset = eval_clips
            if isolate:
                clips = IsolatedEvalClips(eval_clips, data.decode_timeout_s, data.memory_mb << 20)
            key = f"online_probe.{part}"
            decoded = decode_all(key, clips, part_labels, workers, loads_clips, barrier)
            if loads_clips and not decoded.labels:
                folders = ", ".join(shards[part].folders)
                raise UserError(f"online_probe: {folders}: no labelled sample can be decoded")
            self.parts[part] = decoded

    @torch.no_grad()
    def measure(self, objective: Objective, autocast: Autocast = contextlib.nullcontext) -> dict[str, float]:
        """Percent of test clips that k-NN and ridge regression classify correctly (of several labels a clip:
        mAP).
        With sharded weights (FSDP2) every process must call this. autocast: context of the forward passes."""
        features = {
            part: self._features(objective, data.clips, autocast) for part, data in self.parts.items()
        }
        mean = features["train"].mean(0)
        std = features["train"].std(0).clamp_min(1e-6)
        train = (features["train"] - mean) / std
        test = (features["test"] - mean) / std
        targets = self.task.soft_targets(self.task.label_tensor(self.parts["train"].labels, train.device))
        predictions = {
            "knn": knn_predict(train, targets, test, [KNN_K])[0],
            "linear": ridge_predict(train, targets, test, RIDGE_L2),
        }
        labels = self.parts["test"].labels
        # features that are not finite have no accuracy, not one of 0
        return {
            f"online_probe_{k}": self.task.score(p.numpy(), labels) if p.isfinite().all() else math.nan
            for k, p in predictions.items()
        }

    def _features(self, objective: Objective, clips: Tensor, autocast: Autocast) -> Tensor:
        """Means of `trained_tokens` f32 [n, D] on the CPU, by the encoder that will be evaluated."""
        encoder = objective.eval_encoder
        device = next(encoder.parameters()).device
        was_training = encoder.training
        encoder.eval()
        with unsharded(objective), autocast():
            batches = (normalise(batch.to(device)) for batch in clips.split(ENCODE_BATCH))
            features = [trained_tokens(objective, encoder, b).float().mean(1).cpu() for b in batches]
        encoder.train(was_training)
        return torch.cat(features)


def warn_of_missing_clips(key: str, reasons: Mapping[str, int], total: int) -> None:
    """Warns if clips cannot be decoded and have no part in a figure. key: of the configuration, or what the
    clips are; reasons: reason -> number of clips."""
    if reasons:
        text = ", ".join(f"{reason} {n}" for reason, n in reasons.items())
        logger.warning(
            f"{key}: {sum(reasons.values())} of {total} clips cannot be decoded ({text}): left out of its "
            "figures"
        )


def classes_of(shards: Shards, label_set: str, part: str) -> list[str]:
    """Class names of the label set. Raises UserError if the shards of this part (train, test) lack it."""
    if label_set not in shards.classes:
        available = ", ".join(shards.classes) or "none"
        raise UserError(f"online_probe.{part}: no label '{label_set}'; available: {available}")
    return shards.classes[label_set]


def evenly_spaced(samples: list[Sample], count: int) -> list[Sample]:
    """At most `count` samples, evenly spaced from the first to the last."""
    numbers = np.linspace(0, len(samples) - 1, count).round().astype(int)
    return [samples[i] for i in np.unique(numbers)] if samples else []


def decode_all(
    key: str,
    clips: Dataset,
    labels: list[Any],
    workers: int,
    loads_clips: bool,
    barrier: Callable[[], None],
) -> LabelledClipSet:
    """Decodes the clips (nothing without `loads_clips`) and calls `barrier` after every DECODE_BATCH of them.
    Clips that cannot be decoded are left out, as a line says: probe.py counts them, this is a quick measure.
    key: of the configuration, for the line."""
    batches = [range(i, min(i + DECODE_BATCH, len(labels))) for i in range(0, len(labels), DECODE_BATCH)]
    loader: Any = batches
    if loads_clips:
        sampler: Any = batches
        loader = DataLoader(clips, batch_sampler=sampler, num_workers=workers, collate_fn=list)
    decoded: list[tuple[int, Tensor]] = []
    reasons: Counter[str] = Counter()
    for batch in loader:
        if loads_clips:
            decoded += [(i, clip[0]) for i, clip in batch if isinstance(clip, Tensor)]
            reasons.update(clip for _, clip in batch if isinstance(clip, str))
        barrier()
    warn_of_missing_clips(key, reasons, len(labels))
    stacked = torch.stack([clip for _, clip in decoded]) if decoded else torch.empty(0, dtype=torch.uint8)
    return LabelledClipSet(stacked, [labels[i] for i, _ in decoded])

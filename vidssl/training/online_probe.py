"""An online probe: labelled clips through the encoder while it trains, read by nearest neighbours and by a ridge."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidssl.config import Count, Names, Positive, Size
from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.views import EvalClips, View
from vidssl.objective.objective import Objective
from vidssl.training.distributed import unsharded

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as DINO's k-NN (arXiv 2104.14294)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the standardised features, chosen on a quarter of train
BATCH = 16  # clips at a time


@dataclass(frozen=True)
class OnlineProbeConfig:
    """The `online_probe` section: labelled shards on which the features are read while training. Quick figures to follow a run
    by, of mean tokens of the middle clip; the figures to report are those of probe.py."""

    train: Names | None = None  # packed folders with labels; None: nothing is watched
    test: Names | None = None
    every: Count = 1000  # steps
    samples: Count = 512  # of each, evenly taken, at most
    label: str | None = None  # of several label sets; None: the first
    stride: Count | None = None  # between frames; with fps None as well: that of `data`
    fps: Positive | None = None
    memory_mb: Size = (
        512  # decoded clips held in memory, in 2**20 bytes; what is more is an error before the start
    )

    def __post_init__(self) -> None:
        if (self.train is None) != (self.test is None):
            raise UserError("online_probe: give train and test, or neither")


class OnlineProbe:
    """The decoded clips of both parts, u8 [n, 3, T, S, S], and their classes."""

    def __init__(
        self, online_probe: OnlineProbeConfig, frames: int, size: int, stride: int | None, fps: float | None
    ):
        rate = (
            (online_probe.stride, online_probe.fps)
            if online_probe.stride or online_probe.fps
            else (stride, fps)
        )
        self.view = View(frames, *rate, segments=1, crops=1, size=size)
        need = 2 * online_probe.samples * 3 * frames * size * size >> 20
        if need > online_probe.memory_mb:
            raise UserError(
                f"online_probe.samples {online_probe.samples} take {need} MB, online_probe.memory_mb is {online_probe.memory_mb}"
            )
        assert online_probe.train is not None and online_probe.test is not None
        sets = {
            part: Shards(folders)
            for part, folders in (("train", online_probe.train), ("test", online_probe.test))
        }
        classes = sets["train"].classes
        label = online_probe.label or next(iter(classes), "")
        for part, shards in sets.items():
            if label not in shards.classes or shards.classes[label] != classes.get(label):
                there = ", ".join(shards.classes) or "none"
                raise UserError(
                    f"online_probe.{part}: no label '{label}' with the classes of online_probe.train; it has {there}"
                )
        self.classes = len(classes[label])
        self.parts = {part: self._read(shards, online_probe.samples, label) for part, shards in sets.items()}

    def _read(self, shards: Shards, count: int, label: str) -> tuple[Tensor, Tensor]:
        samples = [s for s in shards.all() if class_of(s, label) >= 0]
        samples = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, count).round().astype(int))]
        clips, labels = [], []
        seen = EvalClips(shards, samples, self.view, 1)
        for i, sample in enumerate(samples):
            _, clip = seen[i]
            if isinstance(
                clip, Tensor
            ):  # else it cannot be decoded; this is a quick figure, and probe.py counts it
                clips.append(clip[0])
                labels.append(class_of(sample, label))
        if not clips:
            raise UserError(f"online_probe: {', '.join(shards.folders)}: no labelled sample can be decoded")
        return torch.stack(clips), torch.tensor(labels)

    @torch.no_grad()
    def measure(self, objective: Objective) -> dict[str, float]:
        """Percent of test that k nearest neighbours and a ridge classifier get right; chance is 100 / classes. With
        shards (FSDP2) all processes must measure."""
        encoder = objective.eval_encoder
        was, device = encoder.training, next(encoder.parameters()).device
        encoder.eval()
        found = {}
        for part, (clips, labels) in self.parts.items():
            with unsharded(objective):
                pooled = [encoder(normalise(b.to(device))).float().mean(1).cpu() for b in clips.split(BATCH)]
            found[part] = torch.cat(pooled), labels
        encoder.train(was)
        train, test = found["train"], found["test"]
        center, width = train[0].mean(0), train[0].std(0).clamp_min(1e-6)
        train, test = ((train[0] - center) / width, train[1]), ((test[0] - center) / width, test[1])
        right = {
            "knn": neighbours(train, test[0], self.classes),
            "linear": ridge(train, test[0], self.classes),
        }
        return {f"online_probe_{k}": 100 * float((v == test[1]).float().mean()) for k, v in right.items()}


def class_of(sample: Sample, label: str) -> int:
    """Its class in one label set; -1: none."""
    labels = sample.meta.get("labels")
    return labels.get(label, -1) if labels else sample.meta.get("label", -1)


def neighbours(train: tuple[Tensor, Tensor], test: Tensor, classes: int) -> Tensor:
    """i64 [m]: the class that the nearest of train [n, D], weighted by exp(cosine / TEMPERATURE), vote for."""
    near, ids = (F.normalize(test, dim=1) @ F.normalize(train[0], dim=1).T).topk(
        min(NEIGHBOURS, len(train[1]))
    )
    votes = F.one_hot(train[1][ids], classes) * (near / TEMPERATURE).exp()[..., None]
    return votes.sum(1).argmax(1)


def ridge(train: tuple[Tensor, Tensor], test: Tensor, classes: int) -> Tensor:
    """i64 [m]: least squares on one-hot classes, in closed form; its strength by every fourth sample of train."""
    x, y = train[0].double(), F.one_hot(train[1], classes).double()
    out = torch.arange(len(x)) % 4 == 3

    def fit(x: Tensor, y: Tensor, strength: float) -> Tensor:
        gram = x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        return torch.linalg.solve(gram, x.T @ (y - y.mean(0)))

    def score(strength: float) -> float:
        guess = x[out] @ fit(x[~out], y[~out], strength) + y[~out].mean(0)
        return float((guess.argmax(1) == train[1][out]).float().mean())

    best = max(RIDGES, key=score)
    return (test.double() @ fit(x, y, best) + y.mean(0)).argmax(1)

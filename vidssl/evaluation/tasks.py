"""What a label set asks: one class of several, any of several tags, or a number; its loss and its figures."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.data.shards import Sample
from vidssl.evaluation import metrics

Label = int | float | list[int]


@dataclass(frozen=True)
class Task:
    """names: of the classes or tags. centre, scale: mean and deviation of the numbers of train."""

    label: str
    kind: Literal["class", "tags", "number"]
    names: list[str]
    centre: float = 0.0
    scale: float = 1.0

    @property
    def metric(self) -> str:
        return {"class": "top1", "tags": "mAP", "number": "R2"}[self.kind]

    @property
    def outputs(self) -> int:
        return 1 if self.kind == "number" else len(self.names)

    def target(self, truths: list[Any], device: torch.device) -> Tensor:
        """i64 [n] classes, or f32 [n, C] tags, or f32 [n, 1] standardised numbers."""
        if self.kind == "class":
            return torch.tensor(truths, device=device)
        if self.kind == "number":
            return ((torch.tensor(truths, dtype=torch.float32, device=device) - self.centre) / self.scale)[
                :, None
            ]
        rows = torch.zeros(len(truths), len(self.names))
        for row, tags in zip(rows, truths, strict=True):
            row[list(tags)] = 1
        return rows.to(device)

    def shares(self, target: Tensor) -> Tensor:
        """The target as f32 [n, C]: what neighbours vote for."""
        return F.one_hot(target, len(self.names)).float() if self.kind == "class" else target

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.kind == "class":
            return F.cross_entropy(logits, target)
        return (F.binary_cross_entropy_with_logits if self.kind == "tags" else F.mse_loss)(logits, target)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., C] -> probabilities of classes or tags; of a number the (standardised) value."""
        return {"class": lambda x: x.softmax(-1), "tags": torch.sigmoid, "number": lambda x: x}[self.kind](
            logits
        )

    def score(self, output: np.ndarray, truths: list[Any]) -> float:
        """`metric` of outputs f64 [n, C], in percent (R2: as it is); of outputs that are not finite the worst."""
        if not np.isfinite(output).all():
            return 0.0 if self.kind != "number" else -1e9
        if self.kind == "class":
            return metrics.accuracy(metrics.true_class_rank(output, np.array(truths)) < 1)
        if self.kind == "tags":
            return round(metrics.mean_average_precision(output, self.hot(truths)), 4)
        return round(metrics.r2(output[:, 0] * self.scale + self.centre, np.array(truths)), 4)

    def hot(self, truths: list[Any]) -> np.ndarray:
        """bool [n, C] of tags."""
        return np.array([[c in tags for c in range(len(self.names))] for tags in truths])

    def figures(self, output: np.ndarray, truths: list[Any], groups: list[str], seed: int) -> dict[str, Any]:
        """Everything that is told of outputs f64 [n, C] on the test set. A row that is all NaN could not be read: it is
        wrong in every way (of a number: guessed as the mean of train)."""
        bad = np.isnan(output).all(1)
        if self.kind == "class":
            truth = np.array(truths)
            rank = np.where(
                bad, max(5, len(self.names)), metrics.true_class_rank(np.nan_to_num(output), truth)
            )
            value, ci95 = metrics.accuracy(rank < 1), metrics.bootstrap_ci(rank < 1, groups, seed)
            more: dict[str, Any] = {"accuracy": value, "chance": round(100 / len(self.names), 2)}
            more |= {
                "top5": metrics.accuracy(rank < 5),
                "mean_per_class": metrics.mean_per_class(rank < 1, truth),
            }
        elif self.kind == "tags":
            hot, worst = self.hot(truths), np.where(bad[:, None], -1.0, output)
            value = round(metrics.mean_average_precision(worst, hot), 4)
            ci95 = metrics.bootstrap_metric_ci(
                lambda i: metrics.mean_average_precision(worst[i], hot[i]), groups, seed
            )
            more = {"chance": round(100 * float(hot[:, hot.any(0)].mean()), 2)}  # a random order's, nearly
        else:
            truth, guess = np.array(truths), np.where(bad, 0.0, output[:, 0]) * self.scale + self.centre
            value = round(metrics.r2(guess, truth), 4)
            ci95 = metrics.bootstrap_metric_ci(lambda i: metrics.r2(guess[i], truth[i]), groups, seed)
            more = {"mae": round(float(np.abs(guess - truth).mean()), 4), "chance": 0.0}
        return {"metric": self.metric, "value": value, "ci95": ci95, **more}

    def word(self, truth: Label) -> str:
        """As it stands in predictions.csv."""
        if isinstance(truth, list):
            return "|".join(self.names[t] for t in truth)
        return self.names[int(truth)] if self.kind == "class" else f"{truth:g}"

    def guess(self, output: np.ndarray) -> str:
        """f64 [C] -> the class, the tags over a half, or the number."""
        if self.kind == "class":
            return self.names[int(output.argmax())]
        if self.kind == "tags":
            return self.word([int(t) for t in np.flatnonzero(output > 0.5)])
        return f"{output[0] * self.scale + self.centre:.6g}"


def class_of(sample: Sample, label: str) -> Any:
    """Index of the sample's class, or a list of indices (multi-label); None: it does not carry the label."""
    found = sample.meta.get("labels", {}).get(label)
    return None if found == -1 else found


def make_task(
    label: str, classes: list[str], train: list[Sample], test: list[Sample], kind: str
) -> tuple[Task, list[Any], list[Any]]:
    """-> (the task, the truth of every train and test sample; None where it has none).

    "tags": the class of a sample is several joined by "|" (or the label is a list). "number": it is written as one.
    """
    first, second = ([class_of(s, label) for s in samples] for samples in (train, test))
    if kind == "number":
        try:
            first, second = (
                [None if f is None else float(classes[f]) for f in part] for part in (first, second)
            )
        except ValueError as e:
            raise UserError(f"data.numbers: label '{label}' is not numeric ({e})") from None
        known = np.array([v for v in first if v is not None])
        return Task(label, "number", [label], float(known.mean()), float(known.std()) or 1.0), first, second
    if any(isinstance(f, list) for f in first + second):
        return Task(label, "tags", classes), first, second
    if kind == "tags":
        names = sorted({tag for c in classes for tag in c.split("|")})
        of = [[names.index(tag) for tag in c.split("|")] for c in classes]
        first, second = ([None if f is None else of[f] for f in part] for part in (first, second))
        return Task(label, "tags", names), first, second
    return Task(label, "class", classes), first, second

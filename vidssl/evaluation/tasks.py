"""Prediction tasks of label sets: one class of several, any of several tags, or a number; their losses and
metrics."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.data.shards import Sample
from vidssl.evaluation import metrics

Label = int | float | list[int]  # a class, a number, or tags
Kind = Literal["class", "tags", "number"]


@dataclass(frozen=True)
class Task:
    """names: of the classes or tags. mean, std: of the numbers of train."""

    label: str  # name of the label set
    kind: Kind
    names: list[str]
    mean: float = 0.0
    std: float = 1.0

    @property
    def metric(self) -> str:
        return {"class": "top1", "tags": "mAP", "number": "R2"}[self.kind]

    @property
    def num_outputs(self) -> int:
        return 1 if self.kind == "number" else len(self.names)

    def label_tensor(self, labels: list[Any], device: torch.device) -> Tensor:
        """i64 [n] classes, f32 [n, C] tags (multi-hot), or f32 [n, 1] standardised numbers."""
        if self.kind == "class":
            return torch.tensor(labels, device=device)
        if self.kind == "number":
            numbers = torch.tensor(labels, dtype=torch.float32, device=device)
            return ((numbers - self.mean) / self.std)[:, None]
        rows = torch.zeros(len(labels), len(self.names))
        for row, tags in zip(rows, labels, strict=True):
            row[list(tags)] = 1
        return rows.to(device)

    def soft_targets(self, label_tensor: Tensor) -> Tensor:
        """The label tensor as f32 [n, C] (classes one-hot): the votes of neighbours."""
        return F.one_hot(label_tensor, len(self.names)).float() if self.kind == "class" else label_tensor

    def loss(self, logits: Tensor, label_tensor: Tensor) -> Tensor:
        if self.kind == "class":
            return F.cross_entropy(logits, label_tensor)
        if self.kind == "tags":
            return F.binary_cross_entropy_with_logits(logits, label_tensor)
        return F.mse_loss(logits, label_tensor)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., C] -> probabilities of classes or tags; a number stays standardised."""
        if self.kind == "class":
            return logits.softmax(-1)
        return logits.sigmoid() if self.kind == "tags" else logits

    def score(self, outputs: np.ndarray, labels: list[Any]) -> float:
        """`metric` of outputs f64 [n, C], in percent (R2: as it is); the worst value if any output is not
        finite."""
        if not np.isfinite(outputs).all():
            return -1e9 if self.kind == "number" else 0.0
        if self.kind == "class":
            return metrics.accuracy(metrics.true_class_rank(outputs, np.array(labels)) < 1)
        if self.kind == "tags":
            return round(metrics.mean_average_precision(outputs, self.multi_hot(labels)), 4)
        return round(metrics.r2(self.to_number(outputs[:, 0]), np.array(labels)), 4)

    def multi_hot(self, labels: list[Any]) -> np.ndarray:
        """bool [n, C] of tags."""
        return np.array([[c in tags for c in range(len(self.names))] for tags in labels])

    def to_number(self, outputs: np.ndarray) -> np.ndarray:
        """Undoes the standardisation of numbers."""
        return outputs * self.std + self.mean

    def test_metrics(
        self, outputs: np.ndarray, labels: list[Any], groups: list[str], seed: int
    ) -> dict[str, Any]:
        """All metrics of outputs f64 [n, C] on the test set. A row that is all NaN could not be decoded: it
        counts as wrong in every way (a number: as if the mean of train were predicted)."""
        unreadable = np.isnan(outputs).all(1)
        arguments = (outputs, unreadable, labels, groups, seed)
        if self.kind == "class":
            return {"metric": self.metric, **self._class_metrics(*arguments)}
        if self.kind == "tags":
            return {"metric": self.metric, **self._tag_metrics(*arguments)}
        return {"metric": self.metric, **self._number_metrics(*arguments)}

    def _class_metrics(
        self, outputs: np.ndarray, unreadable: np.ndarray, labels: list[int], groups: list[str], seed: int
    ) -> dict[str, Any]:
        truth = np.array(labels)
        rank = metrics.true_class_rank(np.nan_to_num(outputs), truth)
        rank = np.where(unreadable, max(5, len(self.names)), rank)
        correct = rank < 1
        value = metrics.accuracy(correct)
        return {
            "value": value,
            "ci95": metrics.bootstrap_ci(correct, groups, seed),
            "accuracy": value,
            "chance": round(100 / len(self.names), 2),
            "top5": metrics.accuracy(rank < 5),
            "mean_per_class": metrics.mean_per_class(correct, truth),
        }

    def _tag_metrics(
        self,
        outputs: np.ndarray,
        unreadable: np.ndarray,
        labels: list[list[int]],
        groups: list[str],
        seed: int,
    ) -> dict[str, Any]:
        relevant = self.multi_hot(labels)
        outputs = np.where(unreadable[:, None], -1.0, outputs)

        def metric(rows: np.ndarray) -> float:
            return metrics.mean_average_precision(outputs[rows], relevant[rows])

        return {
            "value": round(metric(np.arange(len(labels))), 4),
            "ci95": metrics.bootstrap_metric_ci(metric, groups, seed),
            "chance": round(
                100 * float(relevant[:, relevant.any(0)].mean()), 2
            ),  # nearly that of a random order
        }

    def _number_metrics(
        self, outputs: np.ndarray, unreadable: np.ndarray, labels: list[float], groups: list[str], seed: int
    ) -> dict[str, Any]:
        truth = np.array(labels)
        predictions = self.to_number(np.where(unreadable, 0.0, outputs[:, 0]))

        def metric(rows: np.ndarray) -> float:
            return metrics.r2(predictions[rows], truth[rows])

        return {
            "value": round(metric(np.arange(len(labels))), 4),
            "ci95": metrics.bootstrap_metric_ci(metric, groups, seed),
            "mae": round(float(np.abs(predictions - truth).mean()), 4),
            "chance": 0.0,
        }

    def format_label(self, label: Label) -> str:
        """A label as written to predictions.csv."""
        if isinstance(label, list):
            return "|".join(self.names[tag] for tag in label)
        return self.names[int(label)] if self.kind == "class" else f"{label:g}"

    def format_prediction(self, output: np.ndarray) -> str:
        """f64 [C] -> the most probable class, the tags with a probability over a half, or the number."""
        if self.kind == "class":
            return self.names[int(output.argmax())]
        if self.kind == "tags":
            return self.format_label([int(tag) for tag in np.flatnonzero(output > 0.5)])
        return f"{self.to_number(output[0]):.6g}"


def class_of(sample: Sample, label: str) -> Any:
    """Index of the sample's class in a label set, or a list of indices (multi-label); None if it has no such
    label."""
    index = sample.meta.get("labels", {}).get(label)
    return None if index == -1 else index


def make_task(
    label: str, classes: list[str], train: list[Sample], test: list[Sample], kind: Kind
) -> tuple[Task, list[Any], list[Any]]:
    """Returns the task, and the label of every train and test sample (None: it has none).

    kind "tags": a class name is several tags joined by "|" (or a sample's label is a list of classes).
    "number": a class name is a number."""
    sets = [[class_of(sample, label) for sample in samples] for samples in (train, test)]
    if kind == "number":
        try:
            sets = [[None if c is None else float(classes[c]) for c in labels] for labels in sets]
        except ValueError as e:
            raise UserError(f"data.numbers: label '{label}' is not numeric ({e})") from None
        known = np.array([number for number in sets[0] if number is not None])
        task = Task(label, "number", [label], float(known.mean()), float(known.std()) or 1.0)
    elif any(isinstance(c, list) for labels in sets for c in labels):
        task = Task(label, "tags", classes)
    elif kind == "tags":
        names = sorted({tag for name in classes for tag in name.split("|")})
        tags = [[names.index(tag) for tag in name.split("|")] for name in classes]
        sets = [[None if c is None else tags[c] for c in labels] for labels in sets]
        task = Task(label, "tags", names)
    else:
        task = Task(label, "class", classes)
    train_labels, test_labels = sets
    return task, train_labels, test_labels

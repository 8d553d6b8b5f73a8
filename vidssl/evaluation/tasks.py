"""Prediction tasks of label sets: one class of several, any of several tags, or a number; their losses and
metrics."""

import math
from collections import Counter
from dataclasses import dataclass, replace
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
    """names: of the classes or tags. The other fields describe the labels that a head is trained on; see
    `fitted`."""

    label: str  # name of the label set
    kind: Kind
    names: list[str]
    mean: float = 0.0  # of the numbers
    std: float = 1.0
    classes: int | None = None  # that occur; None: all

    def fitted(self, labels: list[Any]) -> "Task":
        """The same task with the statistics of these labels: all that a head may know of labels."""
        if self.kind == "number":
            return replace(self, mean=float(np.mean(labels)), std=float(np.std(labels)) or 1.0)
        return replace(self, classes=len(set(labels))) if self.kind == "class" else self

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
            "chance": round(100 / (self.classes or len(self.names)), 2),
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
    label: str,
    classes: list[str],
    train: list[Sample],
    test: list[Sample],
    kind: Kind,
    test_classes: list[str] | None = None,
) -> tuple[Task, list[Any], list[Any]]:
    """Returns the task, and the label of every train and test sample (None: it has none).

    kind "tags": a class name is several tags joined by "|" (or a sample's label is a list of classes).
    "number": a class name is a number.
    classes, test_classes: the class names of train and of test; None: the same. They are matched by name.
    Raises UserError if a test sample has a class that train does not list."""
    test_classes = classes if test_classes is None else test_classes
    train_labels, test_labels = ([class_of(sample, label) for sample in samples] for samples in (train, test))
    if kind == "number":
        try:
            train_labels = [None if c is None else float(classes[c]) for c in train_labels]
            test_labels = [None if c is None else float(test_classes[c]) for c in test_labels]
        except ValueError as e:
            raise UserError(f"data.numbers: label '{label}' is not numeric ({e})") from None
        if wrong := [n for n in (*train_labels, *test_labels) if n is not None and not math.isfinite(n)]:
            raise UserError(f"data.numbers: label '{label}' has {wrong[0]} as a value; leave such labels out")
        task = Task(label, "number", [label])
    elif any(isinstance(c, list) for c in (*train_labels, *test_labels)):
        task = Task(label, "tags", classes)
        train_labels = match_classes(label, classes, [[name] for name in classes], train_labels)
        test_labels = match_classes(label, classes, [[name] for name in test_classes], test_labels)
    elif kind == "tags":
        names = sorted({tag for name in classes for tag in name.split("|")})
        tags, test_tags = ([name.split("|") for name in part] for part in (classes, test_classes))
        task = Task(label, "tags", names)
        train_labels = match_classes(label, names, tags, train_labels)
        test_labels = match_classes(label, names, test_tags, test_labels)
    else:
        task = Task(label, "class", classes)
        matched = match_classes(label, classes, [[name] for name in test_classes], test_labels)
        test_labels = [None if found is None else found[0] for found in matched]
    return task, train_labels, test_labels


def match_classes(
    label: str, names: list[str], meanings: list[list[str]], labels: list[Any]
) -> list[list[int] | None]:
    """Translates labels into indices of `names`. Raises UserError for a name that is not among them.

    meanings: the names for which each class of these samples stands. labels: a class, a list of classes, or
    None."""
    index = {name: number for number, name in enumerate(names)}
    matched: list[list[int] | None] = []
    unknown: Counter[str] = Counter()
    for classes in labels:
        if classes is None:
            matched.append(None)
            continue
        found = [name for c in (classes if isinstance(classes, list) else [classes]) for name in meanings[c]]
        unknown.update(name for name in found if name not in index)
        matched.append([index[name] for name in found if name in index])
    if unknown:
        examples = ", ".join(f"'{name}' ({count} samples)" for name, count in unknown.most_common(3))
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"label '{label}': test has classes that train does not: {examples}{more}; train has "
            f"{', '.join(repr(name) for name in names[:5])}{', ...' if len(names) > 5 else ''}; "
            "pack both with the same class names, or choose others with data.labels"
        )
    return matched

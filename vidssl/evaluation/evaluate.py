"""Trains on train, selects on held-out train, evaluates once on test; and the checks that keep train and test
apart."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.data.metadata import group_in
from vidssl.data.parts import distinct_keys, groups_of
from vidssl.data.shards import Sample
from vidssl.evaluation.features import TokenSource
from vidssl.evaluation.protocol import ProbeProtocol, TrainedProbe, TrainingSet, select_and_train
from vidssl.evaluation.tasks import Task


class SharedSamples(NamedTuple):
    """Numbers of test samples that are not new."""

    same: set[int]  # in train, too
    of_groups: set[int]  # of a group (a recording, a person) that train has, too; those of `same` included


def check_disjoint(train: list[Sample], test: list[Sample], section: str | None = None) -> int:
    """Raises UserError if a sample is in both. Returns the number of test samples whose group (such as a
    source video) is also in train. section: of the configuration, for the message."""
    shared = shared_samples(train, test)
    if shared.same:
        where = f"{section}: " if section else ""
        raise UserError(
            f"{where}{len(shared.same)} sample(s) are in train and in test, {test[min(shared.same)].key} "
            "first: train and test must be disjoint"
        )
    return len(shared.of_groups)


def shared_samples(train: Iterable[Sample], test: list[Sample]) -> SharedSamples:
    """Which of the test samples, or of their groups, are in train, too."""
    in_test = {(s.key, s.size) for s in test}
    groups_of_test = {group_in(s.meta) for s in test} - {None}
    keys: set[tuple[str, int]] = set()
    groups: set[str | None] = set()
    for s in train:
        if (s.key, s.size) in in_test:
            keys.add((s.key, s.size))
        if (group := group_in(s.meta)) in groups_of_test:
            groups.add(group)
    same = {n for n, s in enumerate(test) if (s.key, s.size) in keys}
    return SharedSamples(same, {n for n, s in enumerate(test) if group_in(s.meta) in groups})


def warn_of_shared_groups(shared: int, total: int, test: str, train: str) -> None:
    """Warns if samples are tested on whose groups are trained on. shared, total: numbers of test samples;
    test, train: keys of the configuration."""
    if shared:
        logger.warning(
            f"{test}: {shared} of its {total} samples are of groups (recordings, persons) that {train} has, "
            "too: figures on them are not those of new groups"
        )


def check_readable(
    unreadable: dict[int, str], samples: list[Sample], allowed: bool, name: str, section: str = "probe"
) -> None:
    """Raises UserError for samples without features, unless allowed; unlike training, evaluation never
    substitutes samples.

    unreadable: index of a sample -> reason. section: of the configuration, where `allow_unreadable` is set.
    """
    if unreadable and not allowed:
        examples = [f"{samples[index].key} ({reason})" for index, reason in list(unreadable.items())[:3]]
        raise UserError(
            f"{len(unreadable)} {name} sample(s) cannot be decoded, or their features are not finite: "
            f"{', '.join(examples)}; fix the data, "
            f"or set {section}.allow_unreadable=true (unreadable test samples then count as wrong and are "
            "listed)"
        )


class LabelledFeatures(NamedTuple):
    """The features of train or test as heads see them, with the labels of one label set."""

    source: TokenSource
    samples: list[Sample]
    labels: list[Any]  # None: the sample has no label
    unreadable: dict[int, str]  # index of a sample -> reason

    def labelled(self) -> list[int]:
        """Indices of the samples that have a label."""
        return [index for index, label in enumerate(self.labels) if label is not None]

    def usable(self) -> list[int]:
        """Indices of the samples that have a label and features."""
        return [index for index in self.labelled() if index not in self.unreadable]


class SamplePrediction(NamedTuple):
    """A test sample in predictions.csv."""

    key: str
    group: str  # "": the sample is a group of its own
    truth: str
    predicted: str  # "": it cannot be decoded
    outputs: str  # probabilities in the order of the classes, or the number


def evaluate(
    protocol: ProbeProtocol,
    task: Task,
    train: LabelledFeatures,
    test: LabelledFeatures,
    subset: list[int] | None,
    device: torch.device,
    keep: Callable[[TrainedProbe], dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], list[SamplePrediction]]:
    """Returns a row of results, and predictions of all labelled test samples; unreadable ones count as wrong.

    subset: indices of the train samples that may be used (low-shot); keep: called with the chosen head,
    returns what the row says of it.
    """
    indices = train.usable()
    if subset is not None:
        indices = sorted(set(indices) & set(subset))
    test_indices = test.usable()
    for name, found in (("train", indices), ("test", test_indices)):
        if not found:
            raise UserError(f"no usable sample of {name}: none is both labelled '{task.label}' and readable")
    labels = [train.labels[index] for index in indices]
    data = TrainingSet(train.source, indices, labels, task.label_tensor(labels, device))
    groups = groups_of([train.samples[index] for index in indices])
    probe = select_and_train(protocol, task, data, groups)
    task = probe.task

    source = probe.apply_standardisation(test.source)
    labelled = test.labelled()
    outputs = np.full((len(labelled), task.num_outputs), np.nan)
    predicted = protocol.predict([probe.model], source, test_indices, task)[0].double().numpy()
    is_finite = np.isfinite(predicted).all(1)
    if not is_finite.all():
        logger.warning(
            f"'{task.label}': the outputs of the chosen head are not finite for {(~is_finite).sum()} of "
            f"{len(test_indices)} test samples, which count as wrong: it has diverged; give lower rates, or "
            "more settings to choose from"
        )
        predicted[~is_finite] = np.nan
    outputs[np.isin(labelled, test_indices)] = predicted
    row, predictions = score_predictions(task, test, outputs, protocol.seed)
    row |= {"n_train": len(indices), "chosen": probe.selection}
    test_labels = [test.labels[index] for index in test_indices]
    extra = protocol.extra_metrics(probe.model, source, test_indices, task, test_labels)
    share = len(test_indices) / len(labelled)  # unreadable samples count as zero
    row |= {name: round(value * share, 4) for name, value in extra.items()}
    row |= keep(probe) if keep is not None else {}
    return row, predictions


def score_predictions(
    task: Task, test: LabelledFeatures, outputs: np.ndarray, seed: int
) -> tuple[dict[str, Any], list[SamplePrediction]]:
    """Metrics, and predictions of all labelled test samples. outputs f64 [n, C], in their order; the row of a
    sample that cannot be decoded is NaN."""
    indices = test.labelled()
    samples = [test.samples[index] for index in indices]
    labels = [test.labels[index] for index in indices]
    keys = zip(indices, distinct_keys(samples), strict=True)
    unreadable = {key: test.unreadable[i] for i, key in keys if i in test.unreadable}
    metrics = task.test_metrics(outputs, labels, groups_of(samples), seed)
    row = {"label": task.label, **metrics, "n_test": len(samples), "unreadable": unreadable}
    predictions = []
    for sample, label, output in zip(samples, labels, outputs, strict=True):
        readable = not np.isnan(output).all()
        prediction = SamplePrediction(
            sample.key,
            group_in(sample.meta) or "",
            task.format_label(label),
            task.format_prediction(output) if readable else "",
            " ".join(f"{value:.4g}" for value in output) if readable else "",
        )
        predictions.append(prediction)
    return row, predictions

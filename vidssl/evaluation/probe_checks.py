"""Checks of a probe before any feature is computed: do labels, subsets and held-out parts suffice?"""

from collections import Counter
from typing import Any

from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.core.splits import split_by_group
from vidssl.core.suggestions import counted
from vidssl.data.parts import distinct_keys, groups_of
from vidssl.evaluation.probe_data import LabelSet, ProbeData, ProbeSplits
from vidssl.evaluation.protocol import ProbeProtocol
from vidssl.evaluation.splits import low_shot, strata_of


def check_label_sets(data: ProbeData, protocol: ProbeProtocol, probe_splits: ProbeSplits) -> None:
    """Raises UserError, naming the key, if a head of some label set could not be trained, selected or
    tested."""
    for key, names in (("data.tags", data.tags), ("data.numbers", data.numbers)):
        if unknown := [name for name in names if name not in probe_splits.label_sets]:
            raise UserError(
                f"{key}: '{unknown[0]}' is not probed; label sets: {', '.join(probe_splits.label_sets)}"
            )
    for name, label_set in probe_splits.label_sets.items():
        for split in ("train", "test"):
            if all(label is None for label in label_set.labels[split]):
                raise UserError(
                    f"data.{split}: no sample has a label of '{name}' "
                    f"({len(label_set.labels[split])} have one of another label set)"
                )
        _warn_of_classes_without_train(name, label_set)
        for fraction in data.train_fractions:
            _check_fraction(fraction, name, label_set)
        _check_held_out(data, protocol, probe_splits, name)


def _warn_of_classes_without_train(name: str, label_set: LabelSet) -> None:
    """Says that test has classes of which train has no sample: they count as errors."""
    if label_set.task.kind != "class":
        return
    trained = set(label_set.labels["train"])
    unseen = Counter(c for c in label_set.labels["test"] if c is not None and c not in trained)
    if unseen:
        first = label_set.task.names[unseen.most_common(1)[0][0]]
        classes = counted(len(unseen), "class", "es")
        logger.warning(
            f"label '{name}': {counted(unseen.total(), 'test sample')} of {classes} without a sample in "
            f"train, such as '{first}': they count as errors"
        )


def _check_fraction(fraction: float, name: str, label_set: LabelSet) -> None:
    """Raises UserError if a low-shot list cannot have a sample of each class."""
    labels = [label for label in label_set.labels["train"] if label is not None]
    classes = len(set(labels)) if label_set.task.kind == "class" else 1
    if fraction * len(labels) < classes:
        least = -(-10_000 * classes // len(labels)) / 10_000
        raise UserError(
            f"data.train_fractions: {fraction:g} of the {len(labels)} samples of '{name}' is less than one "
            f"of each of its {classes} classes; give at least {least:g}"
        )


def _check_held_out(data: ProbeData, protocol: ProbeProtocol, splits: ProbeSplits, name: str) -> None:
    """Raises UserError if settings are to be compared and no group of train, or of a low-shot list, can be
    held out."""
    if len(protocol.hyperparameters()) < 2:
        return
    label_set = splits.label_sets[name]
    samples = splits.splits["train"].samples
    labels = label_set.labels["train"]
    groups = groups_of(samples)
    subsets: list[tuple[str, list[int]]] = [("", [i for i, label in enumerate(labels) if label is not None])]
    if data.train_fractions:
        keys = distinct_keys(samples)
        subsets = [
            (f" (data.train_fractions {fraction:g}, seed {seed})", subset)
            for fraction in data.train_fractions
            for seed in data.seeds
            for subset in [low_shot(label_set.task, keys, labels, fraction, seed)]
        ]
    for condition, subset in subsets:
        chosen: list[Any] = [labels[i] for i in subset]
        strata = strata_of(label_set.task, chosen)
        split = split_by_group([groups[i] for i in subset], strata, protocol.val_fraction, protocol.seed)
        if not split.held_out.any():
            raise UserError(
                f"probe: of '{name}'{condition}, no group of train can be held out to compare "
                f"{len(protocol.hyperparameters())} settings on; give a single setting "
                "(one value of probe.lr, weight_decay, l2, k)"
            )

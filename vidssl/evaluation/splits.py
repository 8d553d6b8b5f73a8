"""Subsets of labelled data: label sets in common, low-shot lists, and the classes that a split balances."""

from typing import Any

from vidssl.core.errors import UserError
from vidssl.core.splits import shuffle_key
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.tasks import Task, class_of


def label_sets(train: Shards, test: Shards, requested: list[str] | None) -> list[str]:
    """The label sets to probe: those requested, or all that both data sets have. Raises UserError if a
    requested one is missing. Their classes are matched by name; see `make_task`."""
    common = [name for name in train.classes if name in test.classes]
    for name in requested or common:
        if name not in common:
            raise UserError(f"data.labels: no label '{name}' in both data sets; there is {common or 'none'}")
    if not common:
        raise UserError("the data sets have no label in common: a probe needs labels (vidssl pack)")
    return requested or common


def labelled(shards: Shards, labels: list[str]) -> list[Sample]:
    """The samples that have a label in any of the label sets; the others are not even read."""
    return [s for s in shards.list_samples() if any(class_of(s, name) is not None for name in labels)]


def low_shot(task: Task, keys: list[str], labels: list[Any], fraction: float, seed: int) -> list[int]:
    """Sorted indices of a class-balanced subset: the same number of samples of each class, together
    `fraction` of all (a class with fewer gives all it has); without classes, `fraction` of all.

    Each class is ordered by sha256("SEED KEY"), so the subset depends on the keys, which must differ, and the
    seed alone, and a smaller subset is part of a larger one."""
    classes: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        if label is not None:
            classes.setdefault(label if task.kind == "class" else None, []).append(index)
    labelled_samples = sum(map(len, classes.values()))
    per_class = max(1, round(fraction * labelled_samples / max(1, len(classes))))
    chosen: list[int] = []
    for members in classes.values():
        chosen += sorted(members, key=lambda i: shuffle_key(seed, keys[i]))[:per_class]
    return sorted(chosen)


def list_text(keys: list[str], indices: list[int]) -> str:
    """A subset as it is written and hashed: the keys, sorted, one per line."""
    return "".join(f"{key}\n" for key in sorted(keys[i] for i in indices))


def strata_of(task: Task, labels: list[Any]) -> list[tuple[Any, ...]]:
    """The classes of each sample that a split of these labels balances; none for numbers."""
    if task.kind == "number":
        return [()] * len(labels)
    return [tuple(label) if task.kind == "tags" else (label,) for label in labels]

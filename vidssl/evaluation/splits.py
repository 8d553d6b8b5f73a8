"""Low-shot: class-balanced lists of train that are functions of the keys and a seed alone."""

from typing import Any

import numpy as np

from vidssl.core.errors import UserError
from vidssl.core.splits import GroupSelection, shuffle_key
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.tasks import Task, class_of


def low_shot(task: Task, keys: list[str], truths: list[Any], share: float, seed: int) -> list[int]:
    """Numbers of the chosen samples, in order: of each class equally many, `share` of all together (a class with fewer
    gives all it has); without classes, `share` of all.

    The order of a class is that of sha256("SEED KEY"), so no library decides it, and a smaller share is part of a
    larger one.
    """
    parts: dict[Any, list[int]] = {}
    for number, truth in enumerate(truths):
        if truth is not None:
            parts.setdefault(truth if task.kind == "class" else None, []).append(number)
    each = max(1, round(share * sum(map(len, parts.values())) / max(1, len(parts))))
    drawn = [sorted(part, key=lambda n: shuffle_key(seed, keys[n]))[:each] for part in parts.values()]
    return sorted(n for part in drawn for n in part)


def list_text(keys: list[str], numbers: list[int]) -> str:
    """A list as it is written and hashed: the keys, sorted, a line each."""
    return "".join(f"{key}\n" for key in sorted(keys[n] for n in numbers))


def label_sets(train: Shards, test: Shards, wanted: list[str] | None) -> list[str]:
    """The label sets to probe; each must be in both data sets with the same classes."""
    have = [name for name in train.classes if name in test.classes]
    for name in wanted or have:
        if name not in have:
            raise UserError(f"data.labels: no label '{name}' in both data sets; there is {have or 'none'}")
        if train.classes[name] != test.classes[name]:
            raise UserError(
                f"label '{name}': the classes of train and test differ; pack both with one labels.csv"
            )
    if not have:
        raise UserError("the data sets have no label in common: a probe needs labels (see data_prep.pack)")
    return wanted or have


def labelled(shards: Shards, labels: list[str]) -> list[Sample]:
    """The samples that carry any of the labels; the others are not even read."""
    return [s for s in shards.all() if any(class_of(s, name) is not None for name in labels)]


def split_by_group(classes: list[Any], groups: list[str], fraction: float, seed: int) -> np.ndarray:
    """bool [n]: which samples are held out. Whole groups (the clips of one source video are one group), class by class:
    of each class the groups, in random order, until `fraction` of its samples are held out; never its last group.
    Linear in the number of samples."""
    rng = np.random.default_rng((seed, 4))
    selection = GroupSelection(groups, classes)
    order = rng.permutation(sorted(selection.class_counts)).tolist()
    for label, candidates in sorted(selection.groups_by_class(order).items()):
        for group in candidates[:-1]:
            if selection.selected_samples[label] >= fraction * selection.samples[label]:
                break
            selection.add(group)
    return np.array([group in selection.selected for group in groups])

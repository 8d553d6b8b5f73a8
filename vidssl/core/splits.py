"""Splitting samples by group (the clips of one source video, say), and orders that no library decides."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Any


def shuffle_key(seed: int, name: str) -> bytes:
    """SHA-256 of "SEED NAME": sorting names by it is a shuffle that depends on the seed and the names
    alone."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


class GroupSelection:
    """A growing set of whole groups, with running totals for each class.

    Adding a group costs as many steps as it has classes, so a split is linear in the number of samples.
    """

    def __init__(self, groups: Iterable[str], classes: Iterable[Hashable]):
        """groups, classes: the group and the class of each sample."""
        self.class_counts: dict[str, dict[Any, int]] = {}  # samples of each class, of each group
        for group, label in zip(groups, classes, strict=True):
            counts = self.class_counts.setdefault(group, {})
            counts[label] = counts.get(label, 0) + 1
        self.selected: set[str] = set()
        self.samples: dict[Any, int] = defaultdict(int)  # of each class
        self.selected_samples: dict[Any, int] = defaultdict(int)
        self.remaining_groups: dict[Any, int] = defaultdict(int)  # groups of each class that are not selected
        for counts in self.class_counts.values():
            for label, count in counts.items():
                self.samples[label] += count
                self.remaining_groups[label] += 1

    def groups_by_class(self, order: Iterable[str]) -> dict[Any, list[str]]:
        """The groups in which each class occurs, in the given order of all groups."""
        found: dict[Any, list[str]] = {}
        for group in order:
            for label in self.class_counts[group]:
                found.setdefault(label, []).append(group)
        return found

    def add(self, group: str) -> None:
        if group in self.selected:
            return
        self.selected.add(group)
        for label, count in self.class_counts[group].items():
            self.selected_samples[label] += count
            self.remaining_groups[label] -= 1

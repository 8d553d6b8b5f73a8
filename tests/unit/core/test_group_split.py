"""vidssl.core.splits: division by whole groups, and its use by data_prep.plan."""

import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from data_prep.plan import split_train_test
from data_prep.sources import SourceItem
from vidssl.core.splits import GroupSelection, shuffle_key


def quadratic_split(items: list[SourceItem], fraction: float, seed: int) -> set[str]:
    """The groups in test, with every count taken anew in every step."""
    members: dict[str, list[SourceItem]] = defaultdict(list)
    for item in items:
        members[f"group {item.group}" if item.group else f"file {item.path}"].append(item)
    counts = {g: Counter(item.labels.get("label", "") for item in m) for g, m in members.items()}
    of_class: dict[str, list[str]] = defaultdict(list)
    for g in sorted(members, key=lambda g: shuffle_key(seed, g)):
        for c in counts[g]:
            of_class[c].append(g)
    test: set[str] = set()
    for c in sorted(of_class, key=lambda c: (len(of_class[c]), c)):
        target = max(1, round(fraction * sum(counts[g][c] for g in of_class[c])))
        for g in of_class[c]:
            have = sum(counts[other][c] for other in of_class[c] if other in test)
            if have >= target:
                break
            keeps_train = all(any(o not in test and o != g for o in of_class[k]) for k in counts[g])
            if g not in test and keeps_train and (not have or have + counts[g][c] <= target):
                test.add(g)
    return test


def make_items(n: int, classes: int, groups: int, seed: int) -> list[SourceItem]:
    rng = np.random.default_rng(seed)
    label, group = rng.integers(0, classes, n), rng.integers(0, groups, n)
    return [
        SourceItem(f"{i}.mp4", {"label": f"c{label[i]}"}, f"g{group[i]}" if i % 5 else None) for i in range(n)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_quadratic_definition(seed):
    items = make_items(120, 1 + seed % 6, 3 + 2 * seed, seed)
    fraction = (0.02, 0.2, 0.5, 0.9)[seed % 4]
    parts = split_train_test(items, "label", fraction, seed)
    in_test = {f"group {i.group}" if i.group else f"file {i.path}" for i in parts["test"]}
    assert in_test == quadratic_split(items, fraction, seed)


def test_240_000_samples_take_seconds():
    items = make_items(240_000, 1, 100_000, 0)
    began = time.process_time()
    parts = split_train_test(items, "label", 0.1, 0)
    assert len(parts["test"]) == pytest.approx(24_000, rel=0.01)
    assert time.process_time() - began < 30


def test_counts_follow_the_selected_groups():
    selection = GroupSelection(["a", "a", "b", "c"], ["x", "y", "x", "y"])
    assert selection.samples == {"x": 2, "y": 2}
    assert selection.groups_by_class(["c", "b", "a"]) == {"y": ["c", "a"], "x": ["b", "a"]}
    selection.add("a")
    selection.add("a")
    assert selection.selected_samples == {"x": 1, "y": 1}
    assert selection.remaining_groups == {"x": 1, "y": 1}

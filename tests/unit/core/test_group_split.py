"""vidssl.core.splits: division by whole groups, and its use by data_prep.plan."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from data_prep.plan import split_train_test
from data_prep.sources import SourceItem
from vidssl.core import splits
from vidssl.core.splits import TOLERANCE, split_by_group

Structure = tuple[np.ndarray, np.ndarray]  # group i64 [n] and class i64 [n] of each sample


def classes_share_groups(rng: np.random.Generator) -> Structure:
    """As Diving48: a competition has most of the dives, few competitions have many videos."""
    group = rng.choice(60, 4000, p=rng.dirichlet(np.full(60, 0.7)))
    return group, rng.zipf(1.3, 4000) % 48


def long_tail(rng: np.random.Generator) -> Structure:
    """As EPIC's nouns: a group holds many classes, rare classes are in few groups."""
    share = 1 / np.arange(1, 301) ** 1.5
    label = rng.choice(300, 8000, p=share / share.sum())
    group = rng.choice(200, 8000, p=rng.dirichlet(np.full(200, 0.7)))
    return np.where(label > 100, (7 * label + rng.integers(0, 3, 8000)) % 200, group), label


def a_giant_group(rng: np.random.Generator) -> Structure:
    return np.where(rng.random(2000) < 0.6, 0, rng.integers(1, 200, 2000)), rng.integers(0, 10, 2000)


def groups_of_one(rng: np.random.Generator) -> Structure:
    return np.arange(1500), rng.integers(0, 100, 1500)


def groups_of_one_class(rng: np.random.Generator) -> Structure:
    group = rng.integers(0, 300, 3000)
    return group, group % 50


def two_samples_a_class(rng: np.random.Generator) -> Structure:
    """The share leaves room for some classes only."""
    return np.arange(400), np.arange(400) // 2


STRUCTURES = (
    classes_share_groups,
    long_tail,
    a_giant_group,
    groups_of_one,
    groups_of_one_class,
    two_samples_a_class,
)


def split(structure: Structure, fraction: float, seed: int = 0):
    group, label = structure
    return split_by_group([f"g{g}" for g in group], [(int(c),) for c in label], fraction, seed)


@pytest.mark.parametrize("make", STRUCTURES)
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.35])
def test_share_and_classes_are_as_asked(make, fraction):
    for seed in range(2):
        group, label = structure = make(np.random.default_rng(seed))
        held_out, note, is_far = split(structure, fraction, seed)
        assert abs(held_out.mean() - fraction) <= TOLERANCE and not is_far
        assert not set(group[held_out]) & set(group[~held_out])
        assert set(label[~held_out]) == set(label)
        common = [c for c, n in Counter(label).items() if n >= 40 and len(set(group[label == c])) > 10]
        assert all(abs(held_out[label == c].mean() - fraction) < 0.2 for c in common)
        missing = set(label) - set(label[held_out])
        assert bool(missing) == bool(note)
        if make not in (long_tail, two_samples_a_class):
            assert not missing


def best_division(structure: Structure, fraction: float) -> tuple[float, int | None]:
    """Over all divisions that keep every class in train: the least distance of the share from `fraction`, and
    the least number of classes missing from the held-out part of those that are near; infinity if none."""
    group, label = structure
    names = sorted(set(group))
    best = np.inf
    fewest = None
    for chosen in product((False, True), repeat=len(names)):
        held_out = np.isin(group, [g for g, out in zip(names, chosen, strict=True) if out])
        if held_out.any() and set(label[~held_out]) == set(label):
            distance = abs(held_out.mean() - fraction)
            best = min(best, distance)
            if distance <= TOLERANCE:
                missing = len(set(label)) - len(set(label[held_out]))
                fewest = missing if fewest is None else min(fewest, missing)
    return best, fewest


@pytest.mark.parametrize("seed", range(12))
def test_of_few_groups_the_best_division_is_found(seed):
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(2, 8))
    group = np.concatenate([np.arange(groups), rng.choice(groups, 80, p=rng.dirichlet(np.full(groups, 0.5)))])
    structure = group, (group + rng.integers(0, 2, len(group))) % int(rng.integers(1, 6))
    fraction = float(rng.choice([0.05, 0.2, 0.5, 0.7]))
    best, fewest = best_division(structure, fraction)
    held_out, note, is_far = split(structure, fraction, seed)
    if best == np.inf:
        assert not held_out.any() and is_far
    elif best > TOLERANCE:
        assert abs(held_out.mean() - fraction) <= best + TOLERANCE and is_far and "instead of" in note
    else:
        assert abs(held_out.mean() - fraction) <= TOLERANCE and not is_far
        assert len(set(structure[1])) - len(set(structure[1][held_out])) == fewest


@pytest.mark.parametrize("seed", range(40))
def test_a_share_that_some_division_has_is_found(seed):
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(13, 50))
    sizes = rng.dirichlet(np.full(groups, rng.choice([0.1, 0.3, 1, 5])))
    group = np.concatenate([np.arange(groups), rng.choice(groups, 1500, p=sizes)])
    label = (group + rng.integers(0, 1 + seed % 2, len(group))) % int(rng.integers(1, 12))
    division = (rng.random(groups) < rng.choice([0.1, 0.3, 0.6]))[group]
    if division.any() and set(label[~division]) == set(label):
        held_out, _, is_far = split((group, label), float(division.mean()), seed)
        assert abs(held_out.mean() - division.mean()) <= TOLERANCE and not is_far


@pytest.mark.parametrize("groups", [12, 15])
def test_a_share_out_of_reach_still_has_every_class(groups):
    """Groups are equal; two of three would be a little nearer to the share than three, one of each class."""
    group = np.arange(4 * groups) // 4
    classes = groups // 4
    held_out, note, _ = split((group, group % classes), (classes - 0.52) / groups)
    assert held_out.sum() == 4 * classes and "instead of" in note


def test_one_group_stays_whole():
    held_out, note, is_far = split((np.zeros(9, int), np.arange(9) % 2), 0.2)
    assert not held_out.any() and is_far and "1 groups" in note


def test_the_work_is_linear_in_the_groups(monkeypatch):
    calls = Counter()
    change = splits._Partition.change

    def counting(partition, group):
        calls[len(partition.names)] += 1
        return change(partition, group)

    monkeypatch.setattr(splits._Partition, "change", counting)
    for groups in (2_000, 8_000):
        rng = np.random.default_rng(0)
        structure = np.arange(2 * groups) % groups, rng.integers(0, 100, 2 * groups)
        assert split(structure, 0.2).note is None
        assert calls[groups] < (2 * splits.MAX_PASSES + splits.CANDIDATES) * groups


def test_samples_may_have_several_classes_or_none():
    rng = np.random.default_rng(0)
    tags = [set(rng.choice(8, rng.integers(0, 4), replace=False).tolist()) for _ in range(600)]
    held_out, note, _ = split_by_group([f"g{i // 3}" for i in range(600)], tags, 0.2, 0)
    for tag in range(8):
        has_tag = np.array([tag in t for t in tags])
        assert abs(held_out[has_tag].mean() - 0.2) < 0.05
    assert note is None


def make_items(n: int, labels: dict[str, np.ndarray], groups: np.ndarray) -> list[SourceItem]:
    names = [{label_set: str(values[i]) for label_set, values in labels.items()} for i in range(n)]
    return [SourceItem(f"{i}.mp4", names[i], f"g{groups[i]}" if i % 5 else None) for i in range(n)]


@pytest.mark.parametrize("second", ["verbs", "one per group", "numbers", "tags"])
def test_pack_splits_all_label_sets(second, caplog):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 80, 900)
    values = {
        "verbs": rng.integers(0, 30, 900),
        # a class of each group cannot be both in train and in test: the first label set decides
        "one per group": groups,
        "numbers": rng.random(900),
        "tags": np.array([f"t{a}|t{b}" for a, b in rng.integers(0, 40, (900, 2))]),
    }[second]
    items = make_items(900, {"label": rng.integers(0, 12, 900), second: values}, groups)
    parts = split_train_test(items, ["label", second], 0.2, 0)
    assert abs(len(parts["test"]) / 900 - 0.2) <= TOLERANCE
    for label_set in ["label", second] if second in ("verbs", "tags") else ["label"]:
        names = {
            part: {tag for i in chosen for tag in i.labels[label_set].split("|")}
            for part, chosen in parts.items()
        }
        assert names["train"] == names["test"]


def test_pack_says_what_the_groups_do_not_allow(caplog):
    items = make_items(40, {"label": np.arange(40) % 2}, np.zeros(40, int))
    split_train_test(items, ["label"], 0.45, 0)
    assert len(caplog.records) == 1
    assert "0.200 of the samples instead of 0.45" in caplog.text

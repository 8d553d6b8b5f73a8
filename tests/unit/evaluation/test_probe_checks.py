"""What cannot work is refused before any feature is computed, with the key to change."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidssl.core.errors import UserError
from vidssl.data.format import Sample
from vidssl.evaluation.extractor import Split
from vidssl.evaluation.feature_cache import FeatureShape, FeatureStore, check_disk
from vidssl.evaluation.heads import Linear
from vidssl.evaluation.neighbours import Knn
from vidssl.evaluation.probe_checks import check_label_sets
from vidssl.evaluation.probe_config import ProbeData
from vidssl.evaluation.probe_data import LabelSet, ProbeSplits
from vidssl.evaluation.tasks import Task


def splits(train: list[Any], test: list[Any], groups: list[str] | None = None) -> ProbeSplits:
    """One label set "x" with classes a, b, c."""
    parts = {}
    for name, labels in (("train", train), ("test", test)):
        metas = [{"group": group} for group in groups] if groups and name == "train" else [{}] * len(labels)
        samples = [Sample(f"{name}{i}", "mp4", 0, 0, 0, meta) for i, meta in enumerate(metas)]
        parts[name] = Split(None, samples)
    task = Task("x", "class", ["a", "b", "c"])
    return ProbeSplits(parts, {"x": LabelSet(task, {"train": train, "test": test})}, 0)


ENOUGH = [n % 3 for n in range(30)]


@pytest.mark.parametrize(
    ("data", "protocol", "probe_splits", "words"),
    [
        ({"tags": ("y",)}, Knn(), splits(ENOUGH, [0]), "data.tags: 'y' is not probed; label sets: x"),
        ({"numbers": ("y",)}, Knn(), splits(ENOUGH, [0]), "data.numbers: 'y' is not probed"),
        ({}, Knn(), splits(ENOUGH, []), "data.test: no sample has a label of 'x'"),
        ({}, Knn(), splits(ENOUGH, [None, None]), "data.test: no sample has a label of 'x' (2 have one"),
        ({}, Knn(), splits([None], [0]), "data.train: no sample has a label of 'x'"),
        (
            {"train_fractions": (0.5, 0.05)},
            Knn(),
            splits(ENOUGH, [0]),
            "data.train_fractions: 0.05 of the 30 samples of 'x' is less than one of each of its 3 classes; "
            "give at least 0.1",
        ),
        ({}, Knn(), splits(ENOUGH, [0], ["g"] * 30), "no group of train can be held out to compare 7"),
        (
            {"train_fractions": (0.1,)},
            Linear(),
            splits(ENOUGH, [0]),
            "(data.train_fractions 0.1, seed 0), no group of train can be held out to compare 5",
        ),
    ],
)
def test_labels_that_do_not_suffice(data, protocol, probe_splits, words):
    with pytest.raises(UserError) as e:
        check_label_sets(ProbeData(train=["a"], test=["b"], **data), protocol, probe_splits)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("data", "protocol", "probe_splits"),
    [
        ({}, Knn(), splits(ENOUGH, [0, None])),
        ({"train_fractions": (0.2,)}, Knn(), splits(ENOUGH, [0])),
        # nothing is compared
        ({}, Knn(k=(1,)), splits(ENOUGH, [0], ["g"] * 30)),
        ({"train_fractions": (0.1,)}, Knn(k=(1,)), splits(ENOUGH, [0])),
    ],
)
def test_labels_that_suffice(data, protocol, probe_splits):
    check_label_sets(ProbeData(train=["a"], test=["b"], **data), protocol, probe_splits)


@pytest.mark.parametrize(
    ("test", "line"),
    [
        ([0, 1, None], ""),
        (
            [0, 2, 2],
            "'x': 2 test samples of 1 class without a sample in train, such as 'c': they count as errors",
        ),
        ([1, 2, 3, 3], "'x': 3 test samples of 2 classes without a sample in train, such as 'd'"),
    ],
)
def test_classes_of_which_train_has_no_sample_are_said(test, line, capsys):
    found = splits([n % 2 for n in range(30)], test)
    found.label_sets["x"] = found.label_sets["x"]._replace(task=Task("x", "class", ["a", "b", "c", "d"]))
    check_label_sets(ProbeData(train=["a"], test=["b"]), Knn(), found)
    said = capsys.readouterr()
    assert line in said.out + said.err and ("without a sample" in said.out + said.err) is bool(line)


def test_features_that_do_not_fit_the_disk(tmp_path, monkeypatch):
    shape = FeatureShape(10**6, 2, 500, 1000)  # 4 TB
    stores = [FeatureStore(tmp_path / "cache", {}, shape, torch.float32)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3.9e12))
    with pytest.raises(UserError, match=r"probe.cache: 4e\+03 GB .* has 3.9e\+03 GB left"):
        check_disk(tmp_path / "cache", stores)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4.1e12))
    check_disk(tmp_path / "cache", stores)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder"):
        check_disk(tmp_path / "file" / "cache", stores)


def test_features_that_are_written_need_no_space(tmp_path, monkeypatch):
    shape = FeatureShape(3, 1, 2, 4)
    store = FeatureStore(tmp_path, {}, shape, torch.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="has 0 GB left"):
        check_disk(tmp_path, [store])
    with store.lock():
        store.write((n, torch.ones(1, 2, 4)) for n in range(3))
    check_disk(Path("/proc/nowhere"), [store])

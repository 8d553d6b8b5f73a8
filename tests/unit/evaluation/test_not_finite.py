"""Features and outputs that are not finite are no figures: they are said, listed, and cost their sample."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.data.format import Sample
from vidssl.evaluation.evaluate import LabelledFeatures, check_readable, evaluate
from vidssl.evaluation.feature_cache import FeatureStore
from vidssl.evaluation.features import FeatureLoader, FeatureStorage, StoredFeatures, compute_features
from vidssl.evaluation.media_files import MediaFiles
from vidssl.evaluation.neighbours import Knn
from vidssl.evaluation.tasks import Task, make_task
from vidssl.evaluation.views import View
from vidssl.training.online_probe import LabelledClipSet, OnlineProbe

BAD = {"nan": float("nan"), "inf": float("inf"), "beyond fp16": 1e5}
CPU = torch.device("cpu")


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("bad", BAD)
def test_a_sample_without_finite_features_is_listed(bad, where, make_image, tmp_path):
    """A neighbour of nan would be the nearest of all, and a head trained on it is nan as a whole."""
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path in paths:
        with open(path, "wb") as f:
            f.write(make_image("png"))
    files = MediaFiles(paths)
    seen: list[Tensor] = []

    def encode(video: Tensor) -> Tensor:
        seen.append(video)
        features = torch.ones(len(video), 2, 4)
        features[[i for i in range(len(video)) if len(seen) == 3 and i == 0], 1, 2] = BAD[bad]
        return features

    storage = FeatureStorage(workers=0, encode_batch=1)
    view = View(frames=2, stride=1, fps=None, segments=1, crops=1, size=16)
    loader = FeatureLoader(encode, files, files.samples, view, Accelerator(cpu=True), storage, "features")
    shape = loader.shape()
    dtype = torch.float16 if bad == "beyond fp16" else torch.float32
    store = FeatureStore(tmp_path / "cache", {}, shape, dtype) if where == "disk" else None
    found = compute_features(loader, shape, where, store)
    is_lost = where == "disk" or bad != "beyond fp16"
    assert found.unreadable == ({1: "not_finite"} if is_lost else {})
    if is_lost:
        (tokens,) = found.source.batches(1, [[0, 1, 2]])
        assert tokens.isfinite().all()
        with pytest.raises(UserError, match=r"1 train sample\(s\) .* not finite: .*1\.png \(not_finite\)"):
            check_readable(found.unreadable, files.samples, False, "train")


@dataclass(frozen=True, kw_only=True)
class Diverged(Knn):
    """Outputs of which one is not finite."""

    bad: float

    def predict(self, models: list, source: Any, indices: list[int], task: Task) -> Tensor:
        outputs = super().predict(models, source, indices, task)
        outputs[:, 1, 0] = self.bad
        return outputs


@pytest.mark.parametrize("kind", ["class", "number"])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_outputs_that_are_not_finite_count_as_wrong_and_are_said(bad, kind, caplog):
    labels = [0, 1, 0, 1] if kind == "class" else [0.0, 1.0, 2.0, 3.0]
    samples = [Sample(f"s{i}", "mp4", 0, 0, 0, {}) for i in range(4)]
    torch.manual_seed(0)
    part = LabelledFeatures(StoredFeatures(torch.randn(4, 1, 1, 3), CPU), samples, labels, {})
    task = Task("x", kind, ["a", "b"])
    row, predictions = evaluate(Diverged(k=(1,), bad=BAD[bad]), task, part, part, None, CPU)
    if kind == "class":
        assert row["value"] == 75.0
    json.dumps(row, allow_nan=False)
    assert [p.predicted == "" for p in predictions] == [False, True, False, False]
    assert "'x': the outputs of the chosen head are not finite for 1 of 4 test samples" in caplog.text


def test_an_online_probe_of_features_that_are_not_finite_has_no_accuracy():
    probe = object.__new__(OnlineProbe)
    probe.task = Task("x", "class", ["a", "b"])
    probe.parts = {name: LabelledClipSet(torch.zeros(8), [0, 1] * 4) for name in ("train", "test")}
    features = torch.randn(8, 3)
    features[2, 1] = float("nan")
    probe._features = lambda *_: features  # type: ignore[method-assign]
    found = probe.measure(SimpleNamespace())  # type: ignore[arg-type]
    assert [value != value for value in found.values()] == [True, True]


@pytest.mark.parametrize("value", ["inf", "-Infinity", "nan"])
def test_numbers_that_are_not_finite_are_no_labels(value):
    train = [Sample(f"s{i}", "mp4", 0, 0, 0, {"labels": {"x": i}}) for i in range(2)]
    with pytest.raises(UserError, match=r"data\.numbers: label 'x' has"):
        make_task("x", ["1.5", value], train, train[:1], "number")


def test_settings_are_told_apart_by_an_r2_in_full():
    """R2 is no percentage: differences in the third decimal decide."""
    from vidssl.evaluation.protocol import TrainingSet, select_and_train

    @dataclass(frozen=True, kw_only=True)
    class Close(Knn):
        def predict(self, models: list, source: Any, indices: list[int], task: Task) -> Tensor:
            truth = torch.tensor([(n - task.mean) / task.std for n in indices])
            return torch.stack([truth + 0.05 * scale for scale in (1.2, 1.0, 1.1)])[..., None]

    labels = [float(n) for n in range(20)]
    task = Task("x", "number", ["x"])
    source = StoredFeatures(torch.randn(20, 1, 1, 3), CPU)
    data = TrainingSet(source, list(range(20)), labels, task.label_tensor(labels, CPU))
    chosen = select_and_train(Close(k=(1, 2, 3)), task, data, [f"{n}" for n in range(20)]).selection
    scores = [tried["held_out_R2"] for tried in chosen["tried"]]
    assert chosen["k"] == 2 and max(scores) - min(scores) < 0.005

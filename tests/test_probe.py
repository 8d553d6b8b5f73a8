"""Evaluation that does not lie: counted accuracy, test read once, nothing replaced, selection within train by group."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vidssl import probe
from vidssl.errors import UserError
from vidssl.evaluation.heads import Attentive, Labelled, fit, hold_out, standardiser
from vidssl.evaluation.metrics import accuracy, interval
from vidssl.zoo.native import load_encoder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(synthetic_shards, tmp_path_factory) -> Path:
    """An encoder after three steps."""
    out = tmp_path_factory.mktemp("encoder") / "run"
    files = ["configs/method/videomae_tiny.yaml", "configs/model/vit_micro.yaml", "configs/data/quickstart.yaml"]
    settings = [f"data.train={synthetic_shards / 'train'}", f"run.out={out}", "run.steps=3", "model.depth=1"]
    call = [sys.executable, "vidssl/train.py", *files, "configs/run/smoke.yaml", *settings]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
    return out


def arguments(run: Path, shards: Path, out: Path, *more: str, test: str = "test") -> list[str]:
    files = [str(ROOT / "configs/probe/quickstart.yaml")]
    data = [f"data.train={shards / 'train'}", f"data.test={shards / test}"]
    return [*files, f"encoder={run}", *data, f"out={out}", "probe.epochs=2", "probe.lr=[1e-3]", *more]


def read(out: Path) -> tuple[dict, list[dict]]:
    with open(out / "predictions.csv", newline="") as f:
        return json.loads((out / "probe.json").read_text()), list(csv.DictReader(f))


@pytest.fixture(scope="module")
def probed(run, synthetic_shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "probe"
    probe.main(arguments(run, synthetic_shards, out, "probe.segments=2", "probe.lr=[1e-3,1e-4]"))
    return out


def test_accuracy_is_what_a_count_of_the_predictions_gives(probed, synthetic_shards):
    report, predictions = read(probed)
    assert [(r["label"], r["control"]) for r in report["results"]] == [
        (label, control) for control in ("none", "shuffled") for label in ("appearance", "motion")
    ]
    index = json.loads((synthetic_shards / "test" / "index.json").read_text())
    for row in report["results"]:
        mine = [p for p in predictions if (p["label"], p["control"]) == (row["label"], row["control"])]
        assert len(mine) == len({p["key"] for p in mine}) == row["n_test"] == index["samples"]
        hits = sum(p["truth"] == p["predicted"] for p in mine)
        assert row["accuracy"] == pytest.approx(100 * hits / len(mine), abs=1e-3)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]


def test_the_report_names_encoder_data_seed_and_choices(probed, run, synthetic_shards):
    report, _ = read(probed)
    assert report["encoder"]["sha256"] == probe.weights_hash(load_encoder(str(run)).encoder)
    assert set(report["data"]) == {"train", "test"} and report["seed"] == 0
    for row in report["results"]:
        tried = row["chosen"]["tried"]
        assert [t["lr"] for t in tried] == [1e-3, 1e-4]
        assert row["chosen"]["lr"] == max(tried, key=lambda t: t["held_out_accuracy"])["lr"]
        assert 0 < row["chosen"]["n_held_out"] < row["n_train"]


def test_the_test_set_is_not_read_twice_into_one_place(probed, run, synthetic_shards):
    with pytest.raises(UserError, match="the test set was read"):
        probe.main(arguments(run, synthetic_shards, probed))


def test_random_init_is_another_encoder_and_the_same_every_time(run):
    trained, a, b = load_encoder(str(run)), load_encoder(str(run), 0), load_encoder(str(run), 0)
    assert probe.weights_hash(a.encoder) == probe.weights_hash(b.encoder)
    assert probe.weights_hash(a.encoder) != probe.weights_hash(trained.encoder)


def test_an_unreadable_test_video_is_an_error_or_counted_wrong_and_listed(run, synthetic_shards, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(synthetic_shards, shards)
    tar = sorted((shards / "test").glob("*.tar"))[0]
    line = json.loads(tar.with_suffix(".jsonl").read_text().splitlines()[0])
    with open(tar, "rb+") as f:
        f.seek(line["offset"])
        f.write(bytes(line["size"]))
    with pytest.raises(UserError, match=line["key"]):
        probe.main(arguments(run, shards, tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    probe.main(arguments(run, shards, tmp_path / "b", "probe.allow_unreadable=true", "probe.controls=[none]"))
    report, predictions = read(tmp_path / "b")
    for row in report["results"]:
        assert list(row["unreadable"]) == [line["key"]]
        told = [p for p in predictions if p["label"] == row["label"]]
        assert len(told) == row["n_test"]
        assert next(p["predicted"] for p in told if p["key"] == line["key"]) == ""
        hits = sum(p["truth"] == p["predicted"] for p in told)
        assert row["accuracy"] == pytest.approx(100 * hits / row["n_test"], abs=1e-3)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["encoder=nowhere"], "nowhere: no such encoder"),
        (["data.labels=colour"], "no label 'colour'"),
        (["data.test=nowhere"], "nowhere: no index.json"),
        (["probe.kind=linearr"], "no kind 'linearr'"),
        (["probe.memory_gb=0.0001"], "probe.memory_gb"),
        (["probe.heads=5"], "5 heads"),
        (["probe.controls=[none,Shuffled]"], "'none' or 'shuffled'"),
        (["probe.held_out=0"], "greater than 0"),
        (["data.stride=-1"], "greater than or equal to 1"),
        (["data.stride=1", "data.fps=2"], "not both"),
        (["encoder=README.md"], "README.md: not a readable safetensors file"),
        (["out=README.md/x"], "README.md is not a folder"),
    ],
)
def test_wrong_calls(wrong, words, run, synthetic_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as e:
        probe.main(arguments(run, synthetic_shards, tmp_path / "out", *wrong))
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_held_out_groups_never_straddle_and_no_class_is_lost():
    labels = torch.tensor([0] * 12 + [1] * 8 + [2] * 2)
    groups = [f"a{i // 3}" for i in range(12)] + [f"b{i // 2}" for i in range(8)] + ["c", "c"]
    for seed in range(20):
        out = hold_out(labels, groups, 0.25, seed)
        for g in set(groups):
            assert len({bool(o) for o, name in zip(out, groups, strict=True) if name == g}) == 1
        assert [int(out[labels == c].sum()) for c in range(3)] == [3, 2, 0]  # class 2 is one group: it stays


def test_a_group_that_holds_two_classes_does_not_straddle_either():
    labels, groups = torch.tensor([0, 1] * 10), [f"g{i // 4}" for i in range(20)]
    out = hold_out(labels, groups, 0.3, 0)
    assert 0 < out.sum() < 20
    for g in set(groups):
        assert len({bool(o) for o, name in zip(out, groups, strict=True) if name == g}) == 1


def test_the_choice_sees_only_train():
    """With labels that are noise on the held-out groups' side the choice is whatever scores best there, and the held
    out accuracy is a count over exactly those samples."""
    torch.manual_seed(0)
    tokens, labels = torch.randn(60, 4, 8), torch.arange(60) % 3
    tokens[:, :, 0] += 3 * labels[:, None]
    protocol = Attentive(heads=2, epochs=10, batch=16, lr=(1e-2, 1e-9))
    _, chosen = fit(protocol, Labelled(tokens, labels), [str(i) for i in range(60)], 3)
    assert chosen["lr"] == 1e-2 and chosen["n_held_out"] == 12
    scores = [t["held_out_accuracy"] for t in chosen["tried"]]
    assert all(round(s * 12 / 100) == pytest.approx(s * 12 / 100, abs=0.01) for s in scores)
    assert scores[0] > scores[1]


def test_standardised_tokens():
    torch.manual_seed(0)
    train = torch.randn(50, 3, 4) * torch.tensor([1.0, 10, 0.1, 5]) + torch.randn(3, 4)
    out = standardiser(train)(train)
    assert out.mean(0).abs().max() < 1e-5
    assert (out.square().mean((0, 1)) - 1).abs().max() < 1e-4


def test_interval_covers_and_widens_with_groups():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        right = rng.uniform(size=100) < 0.7
        low, high = interval(right, [str(k) for k in range(100)], seed=i, draws=400)
        covered += low <= 70 <= high
    assert 176 <= covered <= 200  # 95 % of 200 is 190; 4.5 deviations
    right = np.repeat(rng.uniform(size=20) < 0.5, 10)  # ten clips a group, all right or all wrong
    single = interval(right, [str(k) for k in range(200)])
    grouped = interval(right, [str(k // 10) for k in range(200)])
    assert grouped[1] - grouped[0] > 2 * (single[1] - single[0])
    assert accuracy(np.array([True, False, True])) == pytest.approx(66.6667, abs=1e-3)

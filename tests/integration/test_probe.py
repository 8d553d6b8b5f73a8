"""Frozen evaluation end to end: metrics by counting, controls, low-shot lists, processes, the cache, user
errors."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from forked_world import fork_world, set_rank
from PIL import Image
from program_ends import ctrl_c, disk_full, sigterm
from programs import run_here
from scipy.stats import spearmanr
from server import serving

from data_prep import pack
from data_prep.synthetic import SHAPES, SIDE
from vidssl import probe, train
from vidssl.commands import compare, show
from vidssl.core.errors import Interrupted, Preempted, UserError
from vidssl.core.pixels import normalise
from vidssl.data.shards import Shards
from vidssl.evaluation import extractor, probing
from vidssl.evaluation.comparison import spearman
from vidssl.evaluation.features import StoredFeatures
from vidssl.evaluation.metrics import accuracy, bootstrap_ci
from vidssl.evaluation.neighbours import Knn
from vidssl.evaluation.probe_data import encoder_view
from vidssl.evaluation.protocol import label_free_scores
from vidssl.evaluation.report import weights_hash
from vidssl.evaluation.saved_heads import load_saved_head
from vidssl.evaluation.views import EvalClips
from vidssl.model.vit import Encoder
from vidssl.pretrained.load import LoadedEncoder, load_encoder

ROOT = Path(__file__).parents[2]


def zero_first_test_sample(shards: Path) -> str:
    """Overwrites the bytes of the first test sample with zeros. Returns its key."""
    tar = sorted((shards / "test").glob("*.tar"))[0]
    line = json.loads(tar.with_suffix(".jsonl").read_text().splitlines()[0])
    with open(tar, "rb+") as f:
        f.seek(line["offset"])
        f.write(bytes(line["size"]))
    return line["key"]


@pytest.fixture(scope="module")
def odd(synthetic_corpus, tmp_path_factory) -> Path:
    """25 train and 13 test videos, one of these broken, with labels: the shapes (tags), the number of
    different ones, and the distance of the nearest one from the center in pixels."""
    root = tmp_path_factory.mktemp("odd")
    (root / "corpus").mkdir()
    rows = []
    for split, count in (("train", 25), ("test", 13)):
        for path in sorted((synthetic_corpus / "videos").glob(f"{split}_*.mp4"))[:count]:
            shutil.copy(path, root / "corpus")
            with np.load(synthetic_corpus / "truth" / f"{path.stem}.npz") as truth:
                shapes = "|".join(sorted({SHAPES[i] for i in truth["shape"]}))
                far = np.hypot(*(truth["position"][0, -1] - SIDE / 2))
                rows.append((path.name, shapes, len(set(truth["shape"])), f"{far:.2f}", split))
    with open(root / "corpus" / "labels.csv", "w", newline="") as f:
        csv.writer(f).writerows([("path", "label_shapes", "label_count", "label_distance", "split"), *rows])
    pack.main([str(root / "corpus"), str(root / "shards"), "--workers", "2"])
    (root / "broken.txt").write_text(zero_first_test_sample(root / "shards"))
    return root / "shards"


@pytest.fixture(scope="module")
def run(synthetic_shards, tmp_path_factory) -> Path:
    """An encoder after three steps."""
    out = tmp_path_factory.mktemp("encoder") / "run"
    files = [
        "configs/method/videomae_tiny.yaml",
        "configs/model/vit_micro.yaml",
        "configs/data/quickstart.yaml",
    ]
    settings = [f"data.train={synthetic_shards / 'train'}", f"run.out={out}", "run.steps=3", "model.depth=1"]
    assert run_here(train.main, *files, "configs/run/smoke.yaml", *settings) == 0
    return out


def arguments(run: Path, shards: Path, out: Path, *more: str, test: str = "test") -> list[str]:
    files = [str(ROOT / "configs/probe/attentive_tiny.yaml")]
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


def test_accuracy_equals_a_count_of_the_predictions(probed, synthetic_shards):
    report, predictions = read(probed)
    assert [(r["label"], r["control"]) for r in report["results"]] == [
        (label, control) for control in ("none", "shuffled") for label in ("appearance", "motion")
    ]
    index = json.loads((synthetic_shards / "test" / "index.json").read_text())
    for row in report["results"]:
        selected = [p for p in predictions if (p["label"], p["control"]) == (row["label"], row["control"])]
        assert len(selected) == len({p["key"] for p in selected}) == row["n_test"] == index["samples"]
        hits = sum(p["truth"] == p["predicted"] for p in selected)
        assert row["accuracy"] == pytest.approx(100 * hits / len(selected), abs=1e-3)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]


def test_report_contains_encoder_data_seed_and_selection(probed, run, synthetic_shards):
    report, _ = read(probed)
    assert report["encoder"]["sha256"] == weights_hash(load_encoder(str(run)).encoder)
    assert set(report["data"]) == {"train", "test"} and report["seed"] == 0
    for row in report["results"]:
        tried = row["chosen"]["tried"]
        assert [t["lr"] for t in tried] == [1e-3, 1e-4]
        assert row["chosen"]["lr"] == max(tried, key=lambda t: t["held_out_accuracy"])["lr"]
        assert 0 < row["chosen"]["n_held_out"] < row["n_train"]


def test_the_chosen_heads_are_kept_and_their_attention_is_drawn(
    probed, run, synthetic_corpus, synthetic_shards, tmp_path
):
    report, predictions = read(probed)
    kept = [row for row in report["results"] if "head" in row]
    assert sorted(row["label"] for row in kept) == ["appearance", "motion"]
    assert all(row["control"] == "none" for row in kept)
    saved, _ = load_saved_head(probed, "appearance")
    loaded = load_encoder(run)
    view = encoder_view(loaded, 2, 1)
    shards = Shards([str(synthetic_shards / "test")])
    samples = shards.list_samples()[:3]
    for sample, (_, clips) in zip(samples, EvalClips(shards, samples, view, 2), strict=False):
        tokens = loaded.encoder(normalise(clips)).flatten(0, 1)[None]
        outputs = saved.head((tokens - saved.mean) / saved.std).softmax(-1)[0]
        row = next(p for p in predictions if p["label"] == "appearance" and p["key"] == sample.key)
        assert np.allclose(outputs.numpy(), np.array(row["outputs"].split(), float), atol=1e-3)
    video = next((synthetic_corpus / "videos").glob("test_*.mp4"))
    show.main(["attention", str(probed), str(video), str(tmp_path / "a.webp")])
    assert Image.open(tmp_path / "a.webp").n_frames == 8
    shutil.copytree(probed, tmp_path / "copy")
    shutil.copy(probed / "heads/appearance.safetensors", tmp_path / "copy/heads/motion.safetensors")
    with pytest.raises(UserError, match=r"motion.safetensors: is not the head that probe.json names"):
        load_saved_head(tmp_path / "copy", "motion")


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        (sigterm, Preempted, "SIGTERM: kept: 3 finished rows are in"),
        (ctrl_c, Interrupted, "interrupted: kept: 3 finished rows are in"),
        (disk_full, OSError, "No space left"),
    ],
)
def test_an_early_end_keeps_rows_and_the_same_command_goes_on(
    end, error, words, probed, run, synthetic_shards, tmp_path, monkeypatch
):
    """It ends in the fourth row, of the second control; then only that control is computed again."""
    call = arguments(run, synthetic_shards, tmp_path / "out", "probe.segments=2", "probe.lr=[1e-3,1e-4]")
    calls = []
    sources = []
    original = probing.evaluate

    def extract_features(plan):
        # of one control at a time, which the memory limit counts on
        assert not any(source() for source in sources)
        features, scores = extractor.extract_features(plan)
        sources.extend(weakref.ref(part.source) for part in features.values())
        return features, scores

    def evaluate(*args):
        calls.append(None)
        if len(calls) == 4:
            end()
        return original(*args)

    monkeypatch.setattr(probing, "evaluate", evaluate)
    monkeypatch.setattr(probe, "extract_features", extract_features)
    with pytest.raises(error, match=words):
        probe.main(call)
    assert len((tmp_path / "out" / "finished.jsonl").read_text().splitlines()) == 1 + 2 + 3
    assert not (tmp_path / "out" / "probe.json").exists()
    sources.clear()
    with pytest.raises(UserError, match="of another evaluation"):
        probe.main([*call, "probe.epochs=3"])
    probe.main([*call, "probe.encode_batch=8"])
    assert len(calls) == 5
    assert not (tmp_path / "out" / "finished.jsonl").exists()
    report, predictions = read(tmp_path / "out")
    expected, expected_predictions = read(probed)
    assert predictions == expected_predictions
    assert report["results"] == expected["results"] and report["label_free"] == expected["label_free"]


def test_an_existing_report_is_not_overwritten(probed, run, synthetic_shards):
    with pytest.raises(UserError, match="a test set is evaluated once"):
        probe.main(arguments(run, synthetic_shards, probed))


def test_a_test_sample_in_train_is_an_error(run, synthetic_shards, tmp_path):
    with pytest.raises(UserError, match=r"60 sample\(s\) are in train and in test"):
        probe.main(arguments(run, synthetic_shards, tmp_path / "out", test="train"))


def test_random_init_is_repeatable(run):
    trained = load_encoder(str(run))
    a = load_encoder(str(run), 0)
    b = load_encoder(str(run), 0)
    assert weights_hash(a.encoder) == weights_hash(b.encoder)
    assert weights_hash(a.encoder) != weights_hash(trained.encoder)


def test_an_unreadable_test_video_is_an_error_or_counts_as_wrong(run, synthetic_shards, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(synthetic_shards, shards)
    key = zero_first_test_sample(shards)
    with pytest.raises(UserError, match=key):
        probe.main(arguments(run, shards, tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    probe.main(arguments(run, shards, tmp_path / "b", "probe.allow_unreadable=true", "probe.controls=[none]"))
    report, predictions = read(tmp_path / "b")
    for row in report["results"]:
        assert list(row["unreadable"]) == [key]
        lines = [p for p in predictions if p["label"] == row["label"]]
        assert len(lines) == row["n_test"]
        assert next(p["predicted"] for p in lines if p["key"] == key) == ""
        hits = sum(p["truth"] == p["predicted"] for p in lines)
        assert row["accuracy"] == pytest.approx(100 * hits / row["n_test"], abs=1e-3)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["encoder=nowhere"], "nowhere: no such"),
        (["data.labels=colour"], "no label 'colour'"),
        (["data.test=nowhere"], "nowhere: no such folder"),
        (["probe.kind=linearr"], "no kind 'linearr'"),
        (["probe.memory_gb=0.0001", "probe.recompute=never"], "probe.memory_gb"),
        (["data.numbers=[motion]"], "label 'motion' is not numeric"),
        (["data.train_fractions=2"], "less than 1"),
        (["probe.heads=5"], "probe.heads: 5 heads do not divide"),
        (["probe.head_memory_gb=1e-6"], "probe.head_memory_gb is 1e-06"),
        (["probe.controls=[none,pixels]", "probe.heads=16", "data.size=36"], "data.size: 36 is not"),
        (["data.frames=7"], "data.frames: 7 is not a multiple of the encoder's tubelet of 2; give 6 or 8"),
        (["data.train_fractions=0.01"], "data.train_fractions: 0.01 of the 60 samples of"),
        (["data.tags=[colour]"], "data.tags: 'colour' is not probed"),
        (["data.numbers=[colour]"], "data.numbers: 'colour' is not probed"),
        (["probe.controls=[none,Shuffled]"], "'none', 'shuffled'"),
        (["probe.val_fraction=0"], "greater than 0"),
        (["data.stride=-1"], "greater than or equal to 1"),
        (["data.stride=1", "data.fps=2"], "not both"),
        (["encoder=README.md"], "README.md: not a readable"),
        (["out=README.md/x"], "README.md is not a folder"),
    ],
)
def test_wrong_calls(wrong, words, run, synthetic_shards, tmp_path, monkeypatch):
    """They are found before a feature is computed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delattr(extractor, "compute_features")
    with pytest.raises(UserError) as e:
        probe.main(arguments(run, synthetic_shards, tmp_path / "out", *wrong))
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["attentive_tiny", "knn"])
def test_a_dry_run_says_what_a_probe_takes(kind, run, synthetic_shards, tmp_path, monkeypatch, capsys):
    """And decodes and writes nothing. 60 + 30 videos of 2 clips are decoded in every pass: once to find
    those that cannot be, once for the scores of train (60), and by the heads of two label sets."""
    monkeypatch.delattr(extractor, "compute_features")
    settings = ["--dry-run", "probe.recompute=always", "probe.controls=[none]", "probe.segments=2"]
    data = [f"data.{part}={synthetic_shards / part}" for part in ("train", "test")]
    if kind == "attentive_tiny":
        settings += ["probe.epochs=2", "probe.depth=2", "probe.standardise=false"]
    out = tmp_path / "out"
    probe.main([str(ROOT / f"configs/probe/{kind}.yaml"), f"encoder={run}", f"out={out}", *data, *settings])
    text = capsys.readouterr().out
    fit, held_out = 48, 12
    clips = 2 * 2 * (fit * 2 + held_out + 60 * 2 + 30) if kind == "attentive_tiny" else 2 * 90
    assert f"encoding: {clips + 2 * 60} clips of" in text
    assert f"decoding: {clips + 2 * 60 + 2 * 90} clips," in text
    assert "computed in every epoch" in text and "in all: about" in text and "TFLOP/s as measured" in text
    examples = 2 * (fit * 2 + 60 * 2) if kind == "attentive_tiny" else 0
    assert f"heads: {examples} examples in training" in text
    assert not out.exists()


def test_bootstrap_interval_covers_and_widens_with_groups():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        right = rng.uniform(size=100) < 0.7
        low, high = bootstrap_ci(right, [str(k) for k in range(100)], seed=i, resamples=400)
        covered += low <= 70 <= high
    assert 176 <= covered <= 200  # 95 % of 200 is 190; 4.5 deviations
    right = np.repeat(rng.uniform(size=20) < 0.5, 10)  # ten clips a group, all right or all wrong
    single = bootstrap_ci(right, [str(k) for k in range(200)])
    grouped = bootstrap_ci(right, [str(k // 10) for k in range(200)])
    assert grouped[1] - grouped[0] > 2 * (single[1] - single[0])
    assert accuracy(np.array([True, False, True])) == pytest.approx(66.6667, abs=1e-3)


def test_controls_low_shot_lists_and_tables(run, synthetic_shards, tmp_path):
    """Every metric equals a count of the rows of predictions.csv."""
    settings = [
        "probe.controls=[none,reversed,still,random_init,pixels]",
        "data.labels=motion",
        "data.train_fractions=0.5",
    ]
    probe.main(
        arguments(run, synthetic_shards, tmp_path / "a", *settings, "data.seeds=[0,1]", "probe.crops=2")
    )
    report, lines = read(tmp_path / "a")
    controls = ["none", "reversed", "still", "random_init", "pixels"]
    assert [(r["control"], r["list_seed"]) for r in report["results"]] == [
        (c, s) for c in controls for s in (0, 1)
    ]
    with open(tmp_path / "a" / "per_class.csv", newline="") as f:
        classes = list(csv.DictReader(f))
    with open(tmp_path / "a" / "confusion.csv", newline="") as f:
        confusion = list(csv.DictReader(f))
    names = json.loads((synthetic_shards / "test" / "index.json").read_text())["classes"]["motion"]
    for row in report["results"]:
        which = (row["control"], str(row["list_seed"]))
        selected = [t for t in lines if (t["control"], t["seed"]) == which]
        right = [t["truth"] == t["predicted"] for t in selected]
        assert row["value"] == pytest.approx(100 * sum(right) / len(selected), abs=1e-3)
        order = [np.argsort([-float(x) for x in t["outputs"].split()], kind="stable") for t in selected]
        assert [names[o[0]] for o in order] == [t["predicted"] for t in selected]
        top5 = [t["truth"] in [names[i] for i in o[:5]] for t, o in zip(selected, order, strict=True)]
        assert row["top5"] == pytest.approx(100 * np.mean(top5), abs=1e-3)
        some = [c for c in classes if (c["control"], c["seed"]) == which]
        assert row["mean_per_class"] == pytest.approx(np.mean([float(c["accuracy"]) for c in some]), abs=0.01)
        assert sum(int(c["n"]) for c in some) == len(selected) == 30
        table = [c for c in confusion if (c["control"], c["seed"]) == which]
        assert sum(int(c["n"]) for c in table if c["truth"] == c["predicted"]) == sum(right)
        text = (tmp_path / "a" / row["list"]).read_text()
        assert hashlib.sha256(text.encode()).hexdigest() == row["list_sha256"]
        assert len(text.split()) == row["n_train"] == 30
    for summary in report["low_shot"]:
        values = [r["value"] for r in report["results"] if r["control"] == summary["control"]]
        assert summary["mean"] == pytest.approx(np.mean(values), abs=1e-3) and len(summary["lists"]) == 2
    assert (
        report["versions"]["code"] and report["config_sha256"] and report["test_samples_of_train_groups"] == 0
    )
    still = [t["outputs"] for t in lines if t["control"] == "still"]
    assert still != [t["outputs"] for t in lines if t["control"] == "none"]


@pytest.mark.parametrize("kind", ["linear", "knn", "retrieval", "clip_set"])
def test_other_kinds_of_probes(kind, run, synthetic_shards, tmp_path):
    call = [
        str(ROOT / f"configs/probe/{kind}.yaml"),
        f"encoder={run}",
        f"out={tmp_path / 'a'}",
        "probe.workers=0",
    ]
    call += [f"data.train={synthetic_shards / 'train'}", f"data.test={synthetic_shards / 'test'}"]
    call += ["probe.segments=4", "probe.epochs=2"] if kind == "clip_set" else []
    probe.main([*call, "data.labels=[appearance]"])
    report, lines = read(tmp_path / "a")
    (row,) = report["results"]
    assert row["protocol"] == kind and row["n_test"] == len(lines) == 30
    assert row["accuracy"] == pytest.approx(
        100 * np.mean([t["truth"] == t["predicted"] for t in lines]), abs=1e-3
    )
    if kind == "retrieval":
        assert row["accuracy"] <= row["recall_at_5"] and 0 < row["retrieval_mAP"] < 100


def average_precision(lines: list[dict], tag: str, column: int) -> float | None:
    """By its definition, from the rows of predictions.csv; unreadable samples come last."""
    hits = [tag in t["truth"].split("|") for t in lines]
    scores = [float(t["outputs"].split()[column]) if t["outputs"] else -1.0 for t in lines]
    precisions = []
    for hit, score in zip(hits, scores, strict=True):
        if hit:  # ranked before it: higher scores, and among equal scores the misses
            before = [h for h, s in zip(hits, scores, strict=True) if s > score or (s == score and not h)]
            precisions.append((sum(before) + 1) / (len(before) + 1))
    return float(np.mean(precisions)) if precisions else None


def test_tag_and_number_metrics_equal_those_of_the_predictions(run, odd, tmp_path):
    """mAP, R2 and mean error of an odd-sized set with a broken file, from predictions.csv and labels.csv
    alone."""
    call = [
        str(ROOT / "configs/probe/linear.yaml"),
        f"encoder={run}",
        f"out={tmp_path / 'a'}",
        "probe.workers=0",
    ]
    call += [
        "data.tags=[shapes]",
        "data.numbers=[count,distance]",
        "probe.allow_unreadable=true",
        "probe.l2=[1]",
    ]
    probe.main([*call, *(f"data.{side}={odd / side}" for side in ("train", "test"))])
    report, lines = read(tmp_path / "a")
    with open(odd.parent / "corpus" / "labels.csv", newline="") as f:
        truths = {Path(row["path"]).stem: row for row in csv.DictReader(f)}
    broken = (odd.parent / "broken.txt").read_text()
    rows = {row["label"]: row for row in report["results"]}
    assert {name: row["metric"] for name, row in rows.items()} == {
        "shapes": "mAP",
        "count": "R2",
        "distance": "R2",
    }
    for label, row in rows.items():
        selected = [t for t in lines if t["label"] == label]
        assert (
            len(selected) == row["n_test"] == 13
            and row["n_train"] == 25
            and list(row["unreadable"]) == [broken]
        )
        assert [t["key"] for t in selected if t["predicted"] == "" == t["outputs"]] == [broken]
        want = {t["key"]: truths[t["key"].rsplit("-", 1)[0]][f"label_{label}"] for t in selected}
        if label == "shapes":
            assert all(t["truth"] == want[t["key"]] for t in selected)
            tags = sorted({tag for row in truths.values() for tag in row["label_shapes"].split("|")})
            found = [average_precision(selected, tag, column) for column, tag in enumerate(tags)]
            assert row["value"] == pytest.approx(100 * np.mean([f for f in found if f is not None]), abs=1e-3)
            continue
        known = np.array([float(want[t["key"]]) for t in selected])
        mean = np.mean(
            [float(row[f"label_{label}"]) for name, row in truths.items() if name.startswith("train")]
        )
        guess = np.array([float(t["predicted"] or mean) for t in selected])
        r2 = 1 - np.square(guess - known).sum() / np.square(known - known.mean()).sum()
        assert row["value"] == pytest.approx(r2, rel=1e-3, abs=1e-3)
        assert row["mae"] == pytest.approx(np.abs(guess - known).mean(), rel=1e-3)


def test_two_processes_and_the_cache_change_nothing(run, odd, tmp_path):
    """One process without a cache; two processes, each with a part of the features in memory, streamed, and
    with a cache that they write; one process that reads it. 25 train and 13 test samples, one of them broken.
    """
    settings = ["probe.controls=[none]", "probe.allow_unreadable=true", "probe.lr=[1e-3,1e-2]"]
    settings += ["data.tags=[shapes]", "data.numbers=[count,distance]"]
    cache = f"probe.cache={tmp_path / 'cache'}"

    def call(out: str, *more: str) -> list[str]:
        return arguments(run, odd, tmp_path / out, *settings, *more)

    def written() -> list[int]:
        return [p.stat().st_mtime_ns for p in sorted((tmp_path / "cache").glob("*/blocks/*"))]

    probe.main(call("one"))
    count = ["data.labels=[count]", "data.tags=[]", "data.numbers=[count]"]
    jobs = [call("memory"), call("streamed", "probe.recompute=always", *count), call("cache_writer", cache)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    world = [sys.executable, __file__, str(tmp_path / "jobs.json")]
    done = subprocess.run(world, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = written()
    probe.main(call("cache_reader", cache))
    assert times and times == written()
    report, predictions = read(tmp_path / "one")
    assert len(predictions) == 3 * 13 and len({p["key"] for p in predictions}) == 13
    for out in ("memory", "streamed", "cache_writer", "cache_reader"):
        other, other_predictions = read(tmp_path / out)
        labels = {row["label"] for row in other["results"]}
        assert len(labels) == (1 if out == "streamed" else 3)
        expected_rows = [row for row in report["results"] if row["label"] in labels]
        for row, expected in zip(other["results"], expected_rows, strict=True):
            assert row["n_test"] == 13 and row["unreadable"] == expected["unreadable"] != {}
            assert row["value"] == pytest.approx(expected["value"], abs=1e-2)
            assert row["chosen"]["lr"] == expected["chosen"]["lr"]
        assert other["label_free"]["none"] == pytest.approx(report["label_free"]["none"], rel=1e-3)
        expected_lines = [p for p in predictions if p["label"] in labels]
        assert [p["key"] for p in other_predictions] == [p["key"] for p in expected_lines]
        for p, expected in zip(other_predictions, expected_lines, strict=True):
            numbers = [[float(x) for x in line["outputs"].split()] for line in (p, expected)]
            assert numbers[0] == pytest.approx(numbers[1], rel=2e-2, abs=2e-3)


def test_an_image_is_a_still_clip_or_one_tubelet(run, tmp_path):
    """The control `still` leaves images unchanged; `single` shortens them to one tubelet."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 120)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            picture = rng.integers(low, low + 120, (40, 56, 3)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "images" / name / f"{name} {i}.png")
    shards = tmp_path / "shards"
    options = ["--frames", "images", "--test-fraction", "0.4", "--workers", "1"]
    pack.main([str(tmp_path / "images"), str(shards), *options])
    probe.main(arguments(run, shards, tmp_path / "a", "probe.controls=[none,still,single]"))
    report, lines = read(tmp_path / "a")
    none, still, single = (
        [t["outputs"] for t in lines if t["control"] == c] for c in ("none", "still", "single")
    )
    assert none == still != single and all(r["n_test"] == 8 for r in report["results"])


@pytest.mark.parametrize("tokenizer, frames", [(False, 2), (True, 1)])
def test_single_is_the_middle_frame_as_an_image(tokenizer, frames, synthetic_shards):
    options = {
        "frames": 4,
        "height": 32,
        "width": 32,
        "dim": 24,
        "depth": 1,
        "heads": 2,
        "image_tokenizer": tokenizer,
    }
    metadata = {
        "model": {**options, "tubelet": 2, "patch": 16},
        "pixels": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    loaded = LoadedEncoder(None, metadata)
    views = [encoder_view(loaded, 1, 1, stride=2, control=control) for control in ("none", "single")]
    shards = Shards([str(synthetic_shards / "test")])
    whole, single = (EvalClips(shards, shards.list_samples()[:1], view, 1)[0][1] for view in views)
    assert whole.shape == (1, 3, 4, 32, 32) and single.shape == (1, 3, frames, 32, 32)
    assert all(torch.equal(single[:, :, t], whole[:, :, 2]) for t in range(frames))
    assert Encoder(**options)(single.float()).shape == (1, 4, 24)


def test_another_clip_size_than_the_encoders(run, synthetic_shards, tmp_path):
    """Positions are interpolated for data.frames and data.size."""
    more = ["data.frames=4", "data.size=16", "probe.controls=[none]", "data.labels=motion"]
    probe.main([*arguments(run, synthetic_shards, tmp_path / "a", *more), f"probe.cache={tmp_path / 'c'}"])
    stored = [json.loads(p.read_text()) for p in (tmp_path / "c").glob("*/provenance.json")]
    assert [s["view"]["frames"] for s in stored] == [4, 4]
    assert {tuple(s["shape"][1:]) for s in stored} == {(1, 2 * 2 * 2, 128)}
    with pytest.raises(UserError, match=r"data.frames: 3 is not a multiple"):
        probe.main([*arguments(run, synthetic_shards, tmp_path / "b", *more[1:], "data.frames=3")])


def test_label_free_scores_use_the_mean_tokens():
    """Three directions of equal size in the means of the given samples; differences within a sample,
    and a common offset, do not count."""
    means = torch.zeros(40, 8)
    means[:30] = torch.eye(3).repeat(10, 1) @ torch.linalg.qr(torch.randn(8, 3))[0].T
    within = torch.randn(40, 2, 4, 8)
    tokens = means[:, None, None] + 5.0 + within - within.mean((1, 2), keepdim=True)
    tokens[30:] = 1e3 * torch.randn(10, 2, 4, 8)
    found = label_free_scores(StoredFeatures(tokens, torch.device("cpu")), list(range(30)), Knn(segments=2))
    assert found["samples"] == 30
    assert found["rankme"] == pytest.approx(2, abs=0.01)  # three points about their mean span a plane


def test_remote_shards_are_cached_in_data_cache_dir(run, synthetic_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    call = [
        str(ROOT / "configs/probe/knn.yaml"),
        f"encoder={run}",
        f"out={tmp_path / 'a'}",
        "probe.workers=0",
    ]
    call += [
        "data.labels=[appearance]",
        f"data.cache_dir={tmp_path / 'kept'}",
        f"data.test={synthetic_shards / 'test'}",
    ]
    with serving(synthetic_shards.parent) as server:
        call += [f"data.train={server.url('shards/train')}"]
        probe.main(call)
        assert read(tmp_path / "a")[0]["results"][0]["n_train"] == 60
        assert len(list((tmp_path / "kept").rglob("*.tar"))) == len(
            list((synthetic_shards / "train").glob("*.tar"))
        )
        with pytest.raises(UserError, match=r"data\.cache_gb"):
            probe.main([*call, "data.cache_gb=1e-6", f"out={tmp_path / 'b'}"])


def test_differences_are_paired_by_sample(probed, tmp_path, capsys):
    """Against a copy in which three samples of one label turn from wrong to right, lines in another order."""
    shutil.copytree(probed, tmp_path / "better")
    report, lines = read(probed)
    selected = [t for t in lines if (t["label"], t["control"]) == ("motion", "none")]
    for t in [t for t in selected if t["truth"] != t["predicted"]][:3]:
        t["predicted"] = t["truth"]
    with open(tmp_path / "better" / "predictions.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, lines[0])
        writer.writeheader()
        writer.writerows(reversed(lines))
    compare.main(
        [str(probed), str(tmp_path / "better"), f"--csv={tmp_path / 'c.csv'}", f"--plot={tmp_path / 'c.png'}"]
    )
    with open(tmp_path / "c.csv", newline="") as f:
        rows = {(r["name"], r["label"], r["control"]): r for r in csv.DictReader(f)}
    better = rows["better", "motion", "none"]
    assert float(better["difference"]) == 10  # 3 of 30
    assert 0 <= float(better["difference_low"]) < 10 < float(better["difference_high"]) <= 30
    assert float(rows["better", "appearance", "none"]["difference"]) == 0
    assert "rankme" in rows["better", "motion", "none"] and float(better["rankme"]) >= 1
    with pytest.raises(UserError, match="three probes or more with rankme"):
        compare.main([str(probed), str(tmp_path / "better"), "--rank"])
    assert "+10.00" in capsys.readouterr().out and (tmp_path / "c.png").stat().st_size > 5000
    (tmp_path / "better" / "probe.json").write_text(json.dumps({**report, "data": {"test": "other"}}))
    with pytest.raises(UserError, match="tested on different data"):
        compare.main([str(probed), str(tmp_path / "better")])


def test_spearman_p_is_exact():
    """Spearman's rho as scipy has it; p counts the orders of three points, where a formula for many would say
    0."""
    assert spearman([1, 2, 3], [10, 30, 90]) == pytest.approx((1, 1 / 3))
    x, y = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
    rho, p = spearman(x, y)
    assert rho == pytest.approx(spearmanr(x, y).statistic) and abs(p - spearmanr(x, y).pvalue) < 0.1
    assert spearman([1, 2, 3], [5, 5, 5]) == (0, 1)


def run_jobs(jobs: list[list[str]], rank: int, port: int) -> None:
    set_rank(2, rank, port)
    PartialState.destroy_process_group = lambda *_: None  # the next job goes on with it
    for argv in jobs:
        probe.main(argv)


if __name__ == "__main__":
    fork_world(2, partial(run_jobs, json.loads(Path(sys.argv[1]).read_text())))

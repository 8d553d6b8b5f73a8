"""The commands of the README, as they stand there, at the smallest scale."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_here

from vidssl.commands.quickstart import parse_quickstart, prepare_data
from vidssl.quickstart.programs import quickstart_jobs
from vidssl.quickstart.results import summary

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--cpu"]

SHORT = [
    "--set=run.steps=4",
    "--set=run.save_every=2",
    "--set=run.feature_stats_every=2",
    "--probe=probe.epochs=1",
]


def call(*words, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def quickstart(folder: Path) -> subprocess.CompletedProcess:
    """The quickstart on the built-in corpus, a few steps long, as in a folder of the user's."""
    small = ["--train", 64, "--test", 30, *SHORT]
    return call(sys.executable, "-m", "vidssl.cli", "quickstart", *small, cwd=folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    done = quickstart(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "runs/quickstart"
    assert str(out / "report.html") in done.stdout and "vidssl quickstart FOLDER" in done.stdout
    return out


def test_the_summary_has_the_promised_rows(quick):
    rows = json.loads((quick / "summary.json").read_text())
    seen = {(r["encoder"], r["label"], r["control"]) for r in rows}
    assert seen == {
        (encoder, label, control)
        for encoder in ("videomae", "vjepa", "random_init")
        for label in ("motion", "appearance")
        for control in ("none", "shuffled")
    }
    for r in rows:
        assert r["protocol"] == "linear" and r["n_test"] == 30
        assert 0 <= r["ci95"][0] <= r["accuracy"] <= r["ci95"][1] <= 100


def test_snapshots_are_probed_along_the_way(quick):
    for m, step in (("videomae", 2), ("vjepa", 1)):
        report = json.loads((quick / "probes" / f"{m}@{step}" / "probe.json").read_text())
        assert report["trained"]["step"] == step and [r["label"] for r in report["results"]] == ["motion"]


def test_the_pictures_are_there_and_not_blank(quick):
    from PIL import Image

    for name in ("masks", "curves", "accuracy"):
        with Image.open(quick / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors(256)) > 20, name
    with Image.open(quick / "masks.png") as picture:
        # Three rows for each of several clips
        assert picture.height > 1.5 * picture.width


def test_the_report_has_both_runs_and_their_probes(quick):
    page = (quick / "report.html").read_text()
    assert all(str(quick / method) in page for method in ("videomae", "vjepa"))
    assert "shuffled" in page


def test_the_time_of_every_part_is_kept(quick):
    seconds = json.loads((quick / "times.json").read_text())
    probes = {f"probe {path.name}" for path in (quick / "probes").iterdir()}
    assert set(seconds) == {"render", "pack", "videomae", "vjepa", "pictures", *probes}
    assert min(seconds.values()) > 0


def test_the_two_methods_saw_the_same_samples(quick):
    logs = [
        [json.loads(x) for x in (quick / m / "log.jsonl").read_text().splitlines()]
        for m in ("videomae", "vjepa")
    ]
    assert [len(rows) for rows in logs] == [4, 2]
    assert [r["samples_hash"] for r in logs[0][:2]] == [r["samples_hash"] for r in logs[1]]
    assert logs[0][0]["loss"] != logs[1][0]["loss"]


def test_a_second_call_reuses_what_is_there(quick):
    before = {p: p.stat().st_mtime_ns for p in quick.rglob("*.safetensors")}
    done = quickstart(quick.parents[1])
    assert done.returncode == 0, done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in quick.rglob("*.safetensors")}


def test_the_quickstart_on_a_folder_of_classes(tiny_corpus, tmp_path):
    """Its programs, in this process."""
    short = ["--set=run.steps=2", "--set=run.batch=8", "--probe=probe.epochs=1"]
    quick = parse_quickstart([str(tiny_corpus), "--out", str(tmp_path / "out"), *short])
    for job in quickstart_jobs(quick, prepare_data(quick), threads=1):
        program = importlib.import_module(job.command[3])
        assert run_here(program.main, *job.command[4:]) == 0, job.name
    rows = summary(quick)
    assert {(row["label"], row["control"]) for row in rows} == {("label", "none"), ("label", "shuffled")}


def test_the_script_installs_and_takes_a_folder_from_where_one_is(tmp_path):
    (tmp_path / "films").mkdir()
    done = call("bash", ROOT / "tools/quickstart.sh", "films", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2 and str(tmp_path / "films") in done.stderr


def test_launched_as_the_readme_says(synthetic_shards, tmp_path):
    """Training by accelerate, too; the probe in two processes that the command starts."""
    readme = (ROOT / "README.md").read_text()
    block = readme[readme.index("vidssl train configs/method/vjepa_tiny.yaml") :].split("```")[0]
    commands = re.sub(r" +#.*", "", block).replace("\\\n", " ").split("vidssl ")[1:]
    given = ("data.", "run.out=", "encoder=", "out=")
    (_, *train), (_, *probe) = ([w for w in c.split() if not w.startswith(given)] for c in commands)
    small = ["model.depth=1", "method.predictor.depth=1", "augment.size=32", "run.steps=2", "run.batch=8"]
    shards = [f"data.train={synthetic_shards / 'train'}"]
    done = call(*LAUNCH, "vidssl/train.py", *train, *shards, f"run.out={tmp_path / 'run'}", *small)
    assert done.returncode == 0, done.stderr
    where = [
        f"encoder={tmp_path / 'run'}",
        f"data.test={synthetic_shards / 'test'}",
        f"out={tmp_path / 'probe'}",
    ]
    short = ["probe.epochs=1", "probe.segments=2", "probe.workers=0", "--processes", "2"]
    done = call(sys.executable, "-m", "vidssl.cli", "probe", *probe, *shards, *where, *short)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["results"]

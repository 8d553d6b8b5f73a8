"""vidssl zoo-run on two methods: its tables and plots, cut off and continued, beside a run that fails."""

import csv
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from forked_jobs import fork, start_forked
from programs import run_here
from signal_at import watch_rows

from vidssl.commands import zoo_run
from vidssl.zoo import jobs as zoo_jobs

METHODS = [f"runs.{name}=[configs/method/{name}.yaml]" for name in ("videomae_tiny", "vjepa_tiny")]
SHARED = ["configs/model/vit_micro.yaml", "configs/data/quickstart.yaml", "configs/run/smoke.yaml"]
SHARED += ["model.depth=1", "run.steps=6", "optim.warmup=0", "augment.size=16", "run.feature_stats_every=6"]
PROBE = ["configs/probe/knn.yaml", "probe.segments=1", "'probe.k=[1,5]'", "probe.workers=0"]


def arguments(shards: Path, out: Path, *more: str) -> list[str]:
    data = [f"data.{split}={shards / split}" for split in ("train", "test")]
    shared = ",".join([*SHARED, data[0]])
    probe = ",".join([*PROBE, *data])
    return [*METHODS, f"shared=[{shared}]", f"probes.knn=[{probe}]", "snapshots=2", f"out={out}", *more]


@pytest.fixture(autouse=True)
def forked_programs(monkeypatch):
    monkeypatch.setattr(zoo_jobs, "start", start_forked)
    monkeypatch.setattr(zoo_jobs, "POLL_S", 0.02)


@pytest.fixture(scope="module")
def whole(synthetic_shards, tmp_path_factory) -> Path:
    """A zoo without interruption."""
    out = tmp_path_factory.mktemp("zoo") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo_jobs, "start", start_forked)
        assert run_here(zoo_run.main, *arguments(synthetic_shards, out)) == 0
    return out


def read(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_every_snapshot_and_the_baselines_have_a_row_for_each_label(whole):
    rows = read(whole)
    found = {(r["run"], int(r["step"]), r["label"], r["control"]) for r in rows}
    labels = ("appearance", "motion")
    snapshots = [(name, step) for name in ("videomae_tiny", "vjepa_tiny") for step in (3, 6)]
    expected = {(*snapshot, label, "none") for snapshot in snapshots for label in labels}
    expected |= {("untrained", 0, label, control) for label in labels for control in ("none", "pixels")}
    assert found == expected and len(rows) == len(expected)
    for row in rows:
        assert int(row["clips"]) == 8 * int(row["step"])
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])
        assert row["control"] == "pixels" or float(row["rankme"]) > 1


def test_flops_are_those_that_the_runs_counted(whole):
    flops = {(r["run"], r["step"]): float(r["flops"]) for r in read(whole)}
    for name in ("videomae_tiny", "vjepa_tiny"):
        assert flops[name, "6"] == 2 * flops[name, "3"] > 0
    # it computes its target with a second encoder
    assert flops["vjepa_tiny", "6"] > flops["videomae_tiny", "6"]


def test_the_table_has_pairs_and_the_plots_are_not_blank(whole):
    from PIL import Image

    text = (whole / "table.md").read_text()
    assert text.count("| pair |") == 2 and text.count("| untrained |") == 2 and "Not done" not in text
    for name in ("accuracy", "rankme"):
        with Image.open(whole / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors(256)) > 20, name


def test_a_dry_run_prints_equal_flops_and_writes_nothing(synthetic_shards, tmp_path, capsys):
    given = arguments(synthetic_shards, tmp_path / "zoo", "equal=flops", "budget=1e12", "--dry-run")
    assert run_here(zoo_run.main, *given) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = {cells[0]: cells for cells in map(str.split, lines[1:3])}
    steps = {name: int(cells[2].replace(",", "")) for name, cells in plan.items()}
    assert steps["videomae_tiny"] > 1.2 * steps["vjepa_tiny"]
    assert [float(cells[6]) for cells in plan.values()] == pytest.approx([1e12, 1e12], rel=0.01)
    assert "each of 4 snapshots" in lines[3] and not (tmp_path / "zoo").exists()


def test_results_of_other_arguments_are_not_taken_for_these(whole, synthetic_shards, capfd):
    before = (whole / "results.csv").read_bytes()
    given = arguments(synthetic_shards, whole)
    for other, words in (
        (
            ["probes.knn=[" + given[3].removeprefix("probes.knn=[").replace("1,5", "1,7")],
            "probe.k is [1, 5] there",
        ),
        (
            ["runs.vjepa_tiny=[configs/method/vjepa_tiny.yaml,optim.lr=0.1]"],
            "optim.lr is 0.003 there, 0.1 here",
        ),
    ):
        assert run_here(zoo_run.main, *given, *other) == 2
        assert words in capfd.readouterr().err
    assert (whole / "results.csv").read_bytes() == before


def signalling_start(job, at_once, of: str, number: signal.Signals):
    """Starts a program; the training run of that name signals the runner when it has logged two steps."""
    runner = os.getpid()
    rows = iter(range(9))

    def logged() -> None:
        if next(rows) == 1:
            os.kill(runner, number)

    def prepare(job) -> None:
        if job.name == of:
            watch_rows(logged)

    return start_forked(job, at_once, prepare)


def cut_off(given: list[str], tmp_path: Path, of: str, number: signal.Signals, monkeypatch) -> int:
    """Exit status of a runner that gets the signal from one of its training runs."""

    def work() -> None:
        monkeypatch.setattr(zoo_jobs, "start", partial(signalling_start, of=of, number=number))
        sys.exit(run_here(zoo_run.main, *given))

    return fork(work, tmp_path / "output.txt").wait()


def test_cut_off_twice_beside_a_run_that_fails(whole, synthetic_shards, tmp_path, monkeypatch, capsys):
    """SIGTERM in the first run, a kill of the runner alone in the second; the third call ends the work. In so
    much time the runs are whole, and the results are those of a zoo without a limit."""
    broken = "runs.broken=[configs/method/vjepa_tiny.yaml,optim.lr=1e18,run.max_consecutive_skips=0]"
    given = arguments(synthetic_shards, tmp_path / "zoo", broken, "minutes=100", "at_once=2")
    assert cut_off(given, tmp_path, "videomae_tiny seed 0", signal.SIGTERM, monkeypatch) == 143
    assert not (tmp_path / "zoo/results.csv").exists()
    killed = cut_off(given, tmp_path, "vjepa_tiny seed 0", signal.SIGKILL, monkeypatch)
    assert killed == -signal.SIGKILL
    assert json.loads((tmp_path / "zoo/plan.json").read_text())["factor"] == 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "zoo").rglob("probe.json")}
    assert list(before) == [tmp_path / "zoo/probes/knn/untrained/probe.json"]
    assert run_here(zoo_run.main, *given) == 1
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "zoo").rglob("probe.json")}.items()
    assert (tmp_path / "zoo/results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    text = (tmp_path / "zoo/table.md").read_text()
    assert "- broken seed 0: failed: step " in text
    assert "probe knn of broken" not in text

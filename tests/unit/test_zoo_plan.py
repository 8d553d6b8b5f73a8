"""The plan of a zoo is arithmetic: equal clips or FLOPs, all runs shortened alike to a limit of time."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from vidssl.commands import zoo_run
from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.zoo.config import ZooConfig
from vidssl.zoo.measure import TRIAL, TRIAL_STEPS, full_plan, known_facts, with_flops
from vidssl.zoo.plan import PlannedRun, RunFacts, TimedJob, equal_steps, longest_factor, makespan, planned_run
from vidssl.zoo.programs import run_jobs_of, timed_jobs

ROOT = Path(__file__).parents[2]
SIZES = ("dim", "depth", "heads", "patch", "tubelet")
FACTS = {"a": RunFacts(100, 8, 10, flops=5.0), "b": RunFacts(70, 16, 0, flops=20.0)}


@pytest.mark.parametrize(
    "equal, budget, steps",
    [
        ("clips", None, {"a": 100, "b": 50}),
        ("clips", 1600, {"a": 200, "b": 100}),
        ("flops", None, {"a": 100, "b": 25}),
        ("flops", 1000, {"a": 200, "b": 50}),
    ],
)
def test_steps_follow_from_the_budget_or_the_first_run(equal, budget, steps):
    assert equal_steps(FACTS, equal, budget) == steps


def test_a_run_is_a_multiple_of_its_snapshots_and_keeps_its_share_of_warm_up():
    run = planned_run(FACTS["a"], steps=100, factor=0.5, snapshots=3)
    assert (run.steps, run.save_every, run.warmup) == (48, 16, 5)
    assert run.snapshot_steps == [16, 32, 48]
    assert run.arguments()[:2] == ["run.steps=48", "run.save_every=16"]
    # as configured where nothing changes, and never without a step
    assert planned_run(FACTS["a"], 100, 1.0, 1).warmup == 10
    assert planned_run(FACTS["a"], 100, 0.0, 4).steps == 4


@pytest.mark.parametrize(
    "steps, save_every, validate_every, snapshots",
    [(400, 100, 100, 3), (400, 100, 200, 3), (400, 100, 400, 1), (401, 7, 70, 4), (400, 100, None, 3)],
)
def test_a_planned_run_that_validates_is_one_that_train_takes(
    steps, save_every, validate_every, snapshots, monkeypatch
):
    """Of both runs, one of them shortened to half of its steps, and its few steps of trial."""
    monkeypatch.chdir(ROOT)
    every = "null" if validate_every is None else validate_every
    lengths = f"run.steps={steps},run.save_every={save_every},run.validate_every={every},data.val=tests"
    runs = ["runs.b=[configs/method/videomae_tiny.yaml,run.batch=16]"]
    runs.append("runs.a=[configs/method/vjepa_tiny.yaml,run.batch=8]")
    base = f"configs/model/vit_micro.yaml,configs/data/quickstart.yaml,configs/run/smoke.yaml,{lengths}"
    zoo = load_config([*runs, f"shared=[{base}]", f"snapshots={snapshots}", "out=x"], ZooConfig)
    facts = known_facts(zoo)
    for factor in (1.0, 0.61):
        for name, run in full_plan(zoo, facts, factor).items():
            cfg = zoo.train_config(name, *run.arguments())
            assert cfg.validate_every in run.snapshot_steps
    for name in facts:
        assert zoo.train_config(name, *TRIAL).validate_every == TRIAL_STEPS


def test_no_program_starts_if_a_planned_one_would_be_refused(monkeypatch, tmp_path):
    """Here as if planned runs did not validate at their snapshots."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vidssl.commands.zoo_run.run_jobs", lambda *_: pytest.fail("started"))
    monkeypatch.setattr("vidssl.zoo.measure.run_jobs", lambda *_: pytest.fail("started"))
    arguments = PlannedRun.arguments
    monkeypatch.setattr(PlannedRun, "arguments", lambda run: [*arguments(run), "run.validate_every=7"])
    given = ["runs.a=[configs/method/vjepa_tiny.yaml]", f"out={tmp_path / 'zoo'}", "probes={}"]
    files = ",".join(f"configs/{name}.yaml" for name in ("model/vit_micro", "data/quickstart", "run/smoke"))
    given.append(f"shared=[{files},data.train=tests,data.val=tests]")
    for more in ([], ["minutes=5"], ["--dry-run"]):
        with pytest.raises(UserError, match=r"^runs\.a: run\.validate_every 7 is not a multiple"):
            zoo_run.main([*given, *more])


def test_the_makespan_is_that_of_the_order_of_the_jobs():
    jobs = [TimedJob("a", 4), TimedJob("probe a", 2, "a"), TimedJob("b", 3), TimedJob("probe b", 1, "b")]
    assert makespan(jobs, 1) == 10
    # b: 0 to 3, its probe: 3 to 4, a: 0 to 4, its probe: 4 to 6
    assert makespan(jobs, 2) == 6
    assert makespan(jobs, 9) == 6
    assert makespan([], 1) == 0


def shortened(limit_s: float, at_once: int, **facts: RunFacts) -> dict[str, int]:
    """Steps of each run within the limit, each followed by a probe of 10 s."""

    def jobs_of(factor: float) -> list[TimedJob]:
        jobs = []
        for name, known in facts.items():
            run = planned_run(known, known.steps, factor, 1)
            jobs += [TimedJob(name, run.seconds), TimedJob(f"probe {name}", 10, name)]
        return jobs

    factor = longest_factor(limit_s, jobs_of, at_once)
    return {name: planned_run(known, known.steps, factor, 1).steps for name, known in facts.items()}


def test_runs_are_shortened_alike_to_the_limit():
    slow = RunFacts(1000, 8, 0, step_s=0.4, start_s=5)
    quick = RunFacts(1000, 8, 0, step_s=0.1, start_s=5)
    # 400 + 100 s of steps, 2 x 15 s beside them
    assert shortened(1000, 1, slow=slow, quick=quick) == {"slow": 1000, "quick": 1000}
    half = shortened(280, 1, slow=slow, quick=quick)
    assert half["slow"] == half["quick"] and 499 <= half["slow"] <= 501
    # the slow one and its probe decide
    both = shortened(215, 2, slow=slow, quick=quick)
    assert both["slow"] == both["quick"] and 499 <= both["slow"] <= 501


def test_a_limit_below_the_time_of_starts_and_probes_is_refused():
    with pytest.raises(UserError, match=r"minutes: .* takes 0\.3 minutes, 0\.2 are left"):
        shortened(10, 1, a=RunFacts(1000, 8, 0, step_s=0.1, start_s=5))


def test_the_timed_jobs_are_those_that_run(tmp_path):
    zoo = ZooConfig(
        runs={"a": [], "b": []},
        out=str(tmp_path),
        probes={"knn": [], "linear": []},
        seeds=(0, 1),
        snapshots=2,
    )
    runs = {name: planned_run(known, 10, 1.0, 2) for name, known in FACTS.items()}
    jobs = run_jobs_of(zoo, runs)
    timed = list(timed_jobs(zoo, runs, {"knn": 1.0, "linear": 2.0}))
    assert [(job.name, job.needs) for job in jobs] == [(job.name, job.needs) for job in timed]
    assert len(jobs) == 2 * 2 * (1 + 2 * 2) and len({job.folder for job in jobs}) == len(jobs)
    assert jobs[0].command[-1] == "run.seed=0" and jobs[0].result.name == "step-00000010.safetensors"


FILES = sorted((ROOT / "configs/zoo").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_shipped_zoos_are_whole_configurations(file, monkeypatch):
    """Every run has equal clips, a model of the same size and counted FLOPs; every probe is one."""
    monkeypatch.chdir(ROOT)
    zoo = load_config([str(file)], ZooConfig)
    configs = {name: zoo.train_config(name) for name in zoo.runs}
    first = next(iter(configs.values()))
    for cfg in configs.values():
        assert cfg.run == replace(first.run, out=cfg.run.out) and cfg.data == first.data
        assert [cfg.model.arguments[key] for key in SIZES] == [first.model.arguments[key] for key in SIZES]
    assert all(zoo.probe_config(probe).data.test for probe in zoo.probes)
    shallow = replace(zoo, shared=(*zoo.shared, "model.depth=1", "method.predictor.depth=1", "run.batch=64"))
    counted = with_flops(shallow, known_facts(shallow))
    assert all(known.flops > 1e6 for known in counted.values())


def test_an_ablation_is_a_zoo(monkeypatch):
    monkeypatch.chdir(ROOT)
    zoo = load_config(["configs/ablation/targets.yaml", "out=x"], ZooConfig)
    assert list(zoo.runs)[:2] == ["features", "pixels"]


@pytest.mark.parametrize(
    "given, words",
    [
        (
            ["runs.a=[configs/method/vjep.yaml]"],
            "runs.a: configs/method/vjep.yaml: no such file; did you mean ",
        ),
        (["runs.a=[configs/method/vjepa_tiny.yaml,optim.lrr=1]"], "runs.a: 'optim.lrr=1': unknown key"),
        (["probes.p=[configs/probe/knn.yaml,data.tran=x]"], "probes.p: 'data.tran=x': unknown key"),
        (["runs.a/b=[x]"], "'runs.a/b=[x]' is neither"),
        (["runs.untrained=[configs/method/vjepa_tiny.yaml]"], "runs.untrained: becomes a folder"),
        (["equal=time"], "'equal=time'"),
        (["seed=[1]"], "did you mean seeds?"),
    ],
)
def test_a_mistake_names_its_run(given, words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    base = ["configs/zoo/quickstart.yaml", f"out={tmp_path}"]
    with pytest.raises(UserError, match=re.escape(words)):
        load_config([*base, *given], ZooConfig).check_before_work()

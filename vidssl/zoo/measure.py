"""Measures the steps of each run and a probe of each kind, and keeps the plan that follows from them."""

import json
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidssl.config import to_tree
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, read_json_object, read_json_rows
from vidssl.zoo.config import ZooConfig
from vidssl.zoo.jobs import Outcome, run_jobs
from vidssl.zoo.plan import PlannedRun, RunFacts, equal_steps, longest_factor, planned_run
from vidssl.zoo.programs import timed_jobs, train_job, untrained_jobs

TRIAL_STEPS = 8
TRIAL = [
    *(f"run.{key}={TRIAL_STEPS}" for key in ("steps", "save_every", "validate_every")),
    "run.log_every=1",
]
WARM_STEPS = 2  # whose times are not counted
KEPT_FREE = 0.1  # of the time, for what is not measured
TABLES_S = 5.0  # seconds for tables and plots
FREE_TO_CHANGE = ("out", "at_once")


def known_facts(zoo: ZooConfig) -> dict[str, RunFacts]:
    """Of each run, by its configuration alone."""
    configs = {name: zoo.train_config(name) for name in zoo.runs}
    return {
        name: RunFacts(c.run.steps, c.run.batch, c.optim.warmup, validate_every=c.run.validate_every)
        for name, c in configs.items()
    }


def with_flops(zoo: ZooConfig, facts: Mapping[str, RunFacts]) -> dict[str, RunFacts]:
    """The facts with counted FLOPs of a step."""
    from vidssl.zoo.flops import step_flops  # imported late: it imports torch

    counted = {}
    for name, known in facts.items():
        try:
            counted[name] = known._replace(flops=step_flops(zoo.train_config(name)))
        except UserError as e:
            raise UserError(f"runs.{name}: {e}") from None
    return counted


def full_plan(zoo: ZooConfig, facts: Mapping[str, RunFacts], factor: float = 1.0) -> dict[str, PlannedRun]:
    """All runs, `factor` times as long as they are with equal clips or FLOPs."""
    steps = equal_steps(facts, zoo.equal, zoo.budget)
    return {name: planned_run(facts[name], steps[name], factor, zoo.snapshots) for name in facts}


def check_plan(zoo: ZooConfig, runs: Mapping[str, PlannedRun]) -> None:
    """Raises UserError if a run would refuse the length that is planned for it."""
    for name, run in runs.items():
        zoo.train_config(name, *run.arguments())


def read_plan(zoo: ZooConfig) -> dict[str, PlannedRun] | None:
    """The plan of an earlier call with a limit of time; None if there is none. Raises UserError if it was
    made for other settings."""
    path = zoo.folder / "plan.json"
    if not path.exists():
        return None
    stored = read_json_object(path, "remove it: the runs are measured and planned again")
    settings = settings_of(zoo)
    if differing := [key for key, value in settings.items() if stored.get("settings", {}).get(key) != value]:
        raise UserError(
            f"{path}: was measured and planned for another value of {differing[0]}; choose another out"
        )
    return {name: PlannedRun(**run) for name, run in stored["runs"].items()}


def settings_of(zoo: ZooConfig) -> dict[str, Any]:
    return {key: value for key, value in to_tree(zoo).items() if key not in FREE_TO_CHANGE}


def measured_plan(zoo: ZooConfig, facts: Mapping[str, RunFacts], began_s: float) -> dict[str, PlannedRun]:
    """The longest runs that end in time, all shortened alike. Measures a few steps of each run and a probe of
    an untrained encoder, as many at once as later. began_s: of time.monotonic(), when the time began."""
    assert zoo.minutes is not None
    for name in facts:
        zoo.train_config(name, *TRIAL)
    if zoo.equal == "clips":
        check_plan(zoo, full_plan(zoo, facts))
    print(f"measuring {TRIAL_STEPS} steps of each run", flush=True)
    for folder in (zoo.folder / "trial", *map(zoo.untrained_folder, zoo.probes)):
        shutil.rmtree(folder, ignore_errors=True)
    measured, encoder = measure_steps(zoo, facts)
    probe_s = dict.fromkeys(zoo.probes, 0.0)
    if encoder is not None:
        jobs = untrained_jobs(zoo, encoder)
        outcomes = run_jobs(jobs, zoo.at_once)
        probe_s = {probe: outcomes[job.name].seconds for probe, job in zip(zoo.probes, jobs, strict=True)}
    left_s = (1 - KEPT_FREE) * 60 * zoo.minutes - (time.monotonic() - began_s) - TABLES_S

    def jobs_of(factor: float):
        return list(timed_jobs(zoo, full_plan(zoo, measured, factor), probe_s))

    factor = longest_factor(left_s, jobs_of, zoo.at_once)
    runs = full_plan(zoo, measured, factor)
    print(f"in {zoo.minutes:g} minutes each run can have {100 * factor:.3g} % of its steps", flush=True)
    stored = {name: run._asdict() for name, run in runs.items()}
    text = json.dumps(
        {"settings": settings_of(zoo), "factor": factor, "probe_s": probe_s, "runs": stored}, indent=1
    )
    atomic_write_text(zoo.folder / "plan.json", text)
    return runs


def measure_steps(zoo: ZooConfig, facts: Mapping[str, RunFacts]) -> tuple[dict[str, RunFacts], Path | None]:
    """The facts with measured times and FLOPs, and an encoder that the first run has left. A run that fails
    has no times: it fails again."""
    folders = {name: zoo.folder / "trial" / name for name in facts}
    jobs = [
        train_job(zoo, name, f"trial {name}", folder, folder / "encoder.safetensors", *TRIAL)
        for name, folder in folders.items()
    ]
    outcomes = run_jobs(jobs, zoo.at_once)
    measured = {
        name: with_times(known, folders[name] / "log.jsonl", outcomes[f"trial {name}"])
        for name, known in facts.items()
    }
    encoders = (folder for folder in folders.values() if (folder / "encoder.safetensors").exists())
    return measured, next(encoders, None)


def with_times(facts: RunFacts, log: Path, outcome: Outcome) -> RunFacts:
    if outcome.status != "done":
        return facts
    rows = read_json_rows(log)
    step_s = statistics.median(facts.batch / row["clips_per_s"] for row in rows[WARM_STEPS:])
    flops = facts.flops or statistics.mean(row["flops"] for row in rows)
    start_s = max(0.0, outcome.seconds - len(rows) * step_s)
    return facts._replace(step_s=step_s, start_s=start_s, flops=flops)

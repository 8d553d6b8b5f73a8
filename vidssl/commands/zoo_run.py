r"""Trains a list of methods on the same data and for equal clips or FLOPs, and probes their snapshots.

    vidssl zoo-run FILES.yaml ... key=value ...        (configs/zoo, configs/ablation)

runs: {NAME: [arguments of train.py]}, shared: arguments of all runs, probes: {NAME: [arguments of probe.py]}.
Every snapshot is probed frozen on every label set, and so are an untrained encoder and mean colours of
patches. The same command goes on where it was cut off, by SIGTERM (exit status 143), Ctrl-C (130) or a kill.
A run that fails is reported, and the others go on (exit status 1 at the end). With minutes=N a few steps of
each run and a probe are measured first, and all runs are shortened alike so that everything ends in time;
what has not ended then is stopped, and the tables are written.

Writes OUT/results.csv, table.md, accuracy.png and rankme.png, from the files that the programs wrote into
OUT/runs and OUT/probes; their output is in OUT/logs. --dry-run only prints the plan, with counted FLOPs.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from vidssl.config import load_config
from vidssl.config.command_line import answer, without_dry_run
from vidssl.core.errors import run_cli
from vidssl.core.io import claim_folder
from vidssl.core.launch import check_one_process
from vidssl.zoo.config import ZooConfig
from vidssl.zoo.jobs import Outcome, run_jobs
from vidssl.zoo.measure import check_plan, full_plan, known_facts, measured_plan, read_plan, with_flops
from vidssl.zoo.plan import PlannedRun, plan_lines
from vidssl.zoo.plots import draw_accuracy, draw_rankme
from vidssl.zoo.programs import check_finished, run_jobs_of, untrained_jobs
from vidssl.zoo.results import read_results, write_results, write_table


def main(argv: list[str]) -> None:
    if answer(argv, ZooConfig, __doc__, ("zoo", "ablation"), shares_work=False):
        return
    check_one_process(argv)
    began_s = time.monotonic()
    argv, dry_run = without_dry_run(argv)
    zoo = load_config(argv, ZooConfig)
    zoo.check_before_work()
    if dry_run:
        runs = read_plan(zoo) or full_plan(zoo, with_flops(zoo, known_facts(zoo)))
        check_plan(zoo, runs)
        print_plan(zoo, runs)
        if zoo.minutes is not None and not (zoo.folder / "plan.json").exists():
            print(
                f"in {zoo.minutes:g} minutes: steps are measured at the start, and all runs shortened alike"
            )
        return
    with claim_folder(zoo.folder, "zoo_run"):
        outcomes = run_zoo(zoo, began_s)
    if any(outcome.status != "done" for outcome in outcomes.values()):
        sys.exit(1)


def print_plan(zoo: ZooConfig, runs: Mapping[str, PlannedRun]) -> None:
    print("\n".join(plan_lines(runs, len(zoo.seeds), list(zoo.probes))), flush=True)


def run_zoo(zoo: ZooConfig, began_s: float) -> dict[str, Outcome]:
    """Plans, trains, probes, and writes the results. Returns what came of each program."""
    runs = plan_zoo(zoo, began_s)
    check_plan(zoo, runs)
    print_plan(zoo, runs)
    jobs = run_jobs_of(zoo, runs)
    check_finished(jobs)
    deadline_s = None if zoo.minutes is None else began_s + 60 * zoo.minutes
    outcomes = run_jobs(jobs, zoo.at_once, deadline_s)
    encoder = any_encoder(zoo)
    if encoder is not None:
        baselines = untrained_jobs(zoo, encoder)
        check_finished(baselines)
        outcomes |= run_jobs(baselines, zoo.at_once, deadline_s)
    write_outputs(zoo, runs, outcomes, began_s)
    return outcomes


def plan_zoo(zoo: ZooConfig, began_s: float) -> dict[str, PlannedRun]:
    facts = known_facts(zoo)
    if zoo.minutes is not None:
        if planned := read_plan(zoo):
            return planned
        return measured_plan(zoo, facts, began_s)
    return full_plan(zoo, with_flops(zoo, facts) if zoo.equal == "flops" else facts)


def any_encoder(zoo: ZooConfig) -> Path | None:
    """The folder of the first run that has an encoder, whose shape the untrained one gets."""
    folders = (zoo.run_folder(name, seed) for name in zoo.runs for seed in zoo.seeds)
    return next((folder for folder in folders if (folder / "encoder.safetensors").exists()), None)


def write_outputs(
    zoo: ZooConfig, runs: Mapping[str, PlannedRun], outcomes: Mapping[str, Outcome], began_s: float
) -> None:
    """Writes the tables and plots, and says what failed."""
    rows = read_results(zoo, runs)
    write_results(zoo.folder / "results.csv", rows)
    text = write_table(zoo.folder / "table.md", zoo, rows, outcomes)
    if rows:
        draw_accuracy(zoo.folder / "accuracy.png", rows)
        draw_rankme(zoo.folder / "rankme.png", rows)
    print(f"\n{text}")
    minutes = (time.monotonic() - began_s) / 60
    print(f"wrote {zoo.folder}/results.csv, table.md, accuracy.png, rankme.png in {minutes:.1f} minutes")


if __name__ == "__main__":
    run_cli(main)

"""The programs of a zoo: its training runs, the probes of their snapshots, and of an untrained encoder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidssl.config import from_tree, load_config, to_tree
from vidssl.core.errors import UserError
from vidssl.core.io import native_description, read_json_object
from vidssl.data.shards import Shards
from vidssl.evaluation.comparison import NO_CONDITIONS
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.training.schema import TrainConfig, resume_mutable
from vidssl.zoo.config import UNTRAINED, ZooConfig
from vidssl.zoo.jobs import PYTHON, Job
from vidssl.zoo.plan import PlannedRun, TimedJob

# What a comparison leaves to the rows, but decides which rows there are.
DECIDE_ROWS = {f"data.{key}" for key in ("train", "test", "labels", "train_fractions", "seeds")} | {
    "probe.controls"
}
MUTABLE = {"encoder", "out"} | (NO_CONDITIONS - DECIDE_ROWS)  # keys of a probe


def train_job(zoo: ZooConfig, name: str, title: str, out: Path, result: Path | None, *more: str) -> Job:
    command = [*PYTHON, "vidssl.train", *zoo.train_arguments(name, out, *more)]
    return Job(title, command, out, zoo.folder / "logs" / f"{title.replace(' ', '-')}.txt", result)


def probe_job(
    zoo: ZooConfig, probe: str, of: str, encoder: Path, out: Path, needs: str | None, *more: str
) -> Job:
    """of: the encoder's name."""
    title = f"probe {probe} of {of}"
    command = [*PYTHON, "vidssl.probe", *zoo.probe_arguments(probe, encoder, out, *more)]
    log = zoo.folder / "logs" / f"{title.replace(' ', '-')}.txt"
    return Job(title, command, out, log, out / "probe.json", needs)


def run_title(name: str, seed: int) -> str:
    return f"{name} seed {seed}"


def run_jobs_of(zoo: ZooConfig, runs: Mapping[str, PlannedRun]) -> list[Job]:
    """Each run with each seed, followed by the probes of its snapshots. All runs with one seed come before
    the next seed, so that what a cut-off zoo has can be compared."""
    jobs = []
    for seed in zoo.seeds:
        for name, run in runs.items():
            out = zoo.run_folder(name, seed)
            title = run_title(name, seed)
            snapshots = {
                step: out / "snapshots" / f"step-{step:08d}.safetensors" for step in run.snapshot_steps
            }
            last = snapshots[run.steps]
            jobs.append(train_job(zoo, name, title, out, last, *run.arguments(), f"run.seed={seed}"))
            for step, snapshot in snapshots.items():
                for probe in zoo.probes:
                    folder = zoo.probe_folder(probe, name, seed, step)
                    jobs.append(probe_job(zoo, probe, f"{title} step {step}", snapshot, folder, title))
    return jobs


def untrained_jobs(zoo: ZooConfig, encoder: Path) -> list[Job]:
    """A probe of each kind on an untrained encoder of this shape, and on mean colours of patches."""
    jobs = []
    for probe in zoo.probes:
        controls = zoo.probe_config(probe).probe.arguments["controls"]
        # its encoder is untrained without any control
        controls = [*(c for c in controls if c not in ("random_init", "pixels")), "pixels"]
        more = ["random_init=true", f"probe.controls=[{','.join(controls)}]"]
        jobs.append(probe_job(zoo, probe, UNTRAINED, encoder, zoo.untrained_folder(probe), None, *more))
    return jobs


def timed_jobs(
    zoo: ZooConfig, runs: Mapping[str, PlannedRun], probe_s: Mapping[str, float]
) -> Iterator[TimedJob]:
    """What `run_jobs_of` gives, with planned durations. probe_s: seconds of a probe of each name."""
    for seed in zoo.seeds:
        for name, run in runs.items():
            title = run_title(name, seed)
            yield TimedJob(title, run.seconds)
            for step in run.snapshot_steps:
                for probe in zoo.probes:
                    yield TimedJob(f"probe {probe} of {title} step {step}", probe_s[probe], title)


def check_finished(jobs: Sequence[Job]) -> None:
    """Raises UserError if a result is there already that was made with other arguments or on other data: it
    would be taken for one of this call."""
    for job in jobs:
        if job.result is None or not job.result.exists():
            continue
        arguments = job.command[len(PYTHON) + 1 :]
        cfg: Any
        stored: Any
        if job.result.name == "probe.json":
            report = read_json_object(job.result, f"remove {job.folder}")
            cfg = load_config(arguments, ProbeConfig)
            stored = from_tree(report["config"], ProbeConfig, str(job.result))
            mutable = MUTABLE
            hashes = report.get("data", {})
        else:
            cfg = load_config(arguments, TrainConfig)
            stored = load_config([str(job.folder / "config.yaml")], TrainConfig)
            mutable = set(resume_mutable(cfg)) - {"run.steps"}
            hashes = {"train": native_description(job.result).get("data")}
        there = flat(to_tree(stored))
        here = flat(to_tree(cfg))
        differing = [key for key in here if not is_mutable(key, mutable) and there.get(key) != here[key]]
        if differing:
            key = differing[0]
            raise UserError(
                f"{job.folder}: {key} is {there.get(key)} there, {here[key]} here; choose another out, or "
                "remove that folder"
            )
        check_same_data(job.folder, cfg, hashes)


def check_same_data(folder: Path, cfg: ProbeConfig | TrainConfig, hashes: Mapping[str, str | None]) -> None:
    """Raises UserError if the data of a finished program are not those that it was run on. hashes: of train
    and test then; data that cannot be opened any more are not compared."""
    for part, before in hashes.items():
        try:
            now = data_hash_of(cfg, part)
        except UserError:
            continue
        if before is not None and before != now:
            raise UserError(
                f"{folder}: data.{part} has changed since it was made (its hash differs); choose another "
                "out, or remove that folder"
            )


def data_hash_of(cfg: ProbeConfig | TrainConfig, part: str) -> str:
    """The hash of train or test, as the program writes it."""
    if isinstance(cfg, TrainConfig):
        from vidssl.data.loader import open_shards  # imported late: it imports torch

        return open_shards(cfg.data)[1]
    folders = cfg.data.train if part == "train" else cfg.data.test
    return Shards(folders, cfg.data.cache_dir, cfg.data.cache_gb).hash


def is_mutable(key: str, mutable: set[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in mutable)


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The leaves of a tree by dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return leaves

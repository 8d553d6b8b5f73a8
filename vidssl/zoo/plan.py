"""How long each run of a zoo is: equal clips or FLOPs, and a limit of time. Arithmetic alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vidssl.core.errors import UserError
from vidssl.zoo.config import Equal

BISECTIONS = 30


class RunFacts(NamedTuple):
    """What is known of a run before it starts."""

    steps: int  # as configured
    batch: int  # clips a step
    warmup: int  # steps, as configured
    flops: float | None = None  # of a step; None: not counted
    step_s: float = 0.0  # seconds of a step, measured
    start_s: float = 0.0  # seconds beside the steps, measured
    validate_every: int | None = None  # steps, as configured; None: save_every


class PlannedRun(NamedTuple):
    """The length of a run."""

    steps: int
    save_every: int
    batch: int
    warmup: int
    flops: float | None  # of a step
    seconds: float  # 0: not measured
    validate_every: int | None = None  # steps, a multiple of save_every; None: save_every

    @property
    def snapshot_steps(self) -> list[int]:
        return list(range(self.save_every, self.steps + 1, self.save_every))

    def arguments(self) -> list[str]:
        """Of train.py."""
        length = [
            f"run.steps={self.steps}",
            f"run.save_every={self.save_every}",
            f"optim.warmup={self.warmup}",
        ]
        if self.validate_every is not None:
            length.append(f"run.validate_every={self.validate_every}")
        return [*length, "run.snapshots=true"]


class TimedJob(NamedTuple):
    """A program by name, its duration in seconds, and the program that must end before it (None: none)."""

    name: str
    seconds: float
    needs: str | None = None


def equal_steps(runs: Mapping[str, RunFacts], equal: Equal, budget: float | None) -> dict[str, float]:
    """Steps with which every run sees the same number of clips, or computes the same FLOPs: `budget`, or as
    many as the first run is configured for."""
    costs = {name: facts.batch if equal == "clips" else flops_of(facts) for name, facts in runs.items()}
    first = next(iter(runs))
    total = budget if budget is not None else runs[first].steps * costs[first]
    return {name: total / cost for name, cost in costs.items()}


def flops_of(facts: RunFacts) -> float:
    """FLOPs of a step, which must be known."""
    assert facts.flops is not None
    return facts.flops


def planned_run(facts: RunFacts, steps: float, factor: float, snapshots: int) -> PlannedRun:
    """A run of factor x steps, rounded to a multiple of the snapshots; its warm-up keeps its share, and it
    validates at those of its snapshots that are nearest to what is configured."""
    every = max(1, round(factor * steps) // snapshots)
    length = every * snapshots
    warmup = facts.warmup if length == facts.steps else round(facts.warmup * length / facts.steps)
    seconds = facts.start_s + length * facts.step_s if facts.step_s else 0.0
    validate_every = facts.validate_every
    if validate_every is not None:
        validate_every = every * min(snapshots, max(1, round(validate_every / every)))
    return PlannedRun(length, every, facts.batch, warmup, facts.flops, seconds, validate_every)


def makespan(jobs: Sequence[TimedJob], at_once: int) -> float:
    """Seconds until all have ended if the first that may start does so whenever fewer than `at_once` run."""
    waiting = list(jobs)
    ends: dict[str, float] = {}  # of those that run
    now = 0.0
    done: set[str] = set()
    while waiting or ends:
        ready = [job for job in waiting if job.needs is None or job.needs in done]
        if ready and len(ends) < at_once:
            waiting.remove(ready[0])
            ends[ready[0].name] = now + ready[0].seconds
            continue
        name = min(ends, key=ends.__getitem__)
        now = ends.pop(name)
        done.add(name)
    return now


def longest_factor(limit_s: float, jobs_of: Callable[[float], Sequence[TimedJob]], at_once: int) -> float:
    """The largest part of the runs' steps, at most 1, with which all jobs end within `limit_s` seconds.
    jobs_of: the jobs of such a part. Raises UserError if none is small enough."""

    def fits(factor: float) -> bool:
        return makespan(jobs_of(factor), at_once) <= limit_s

    if fits(1.0):
        return 1.0
    if not fits(0.0):
        least = makespan(jobs_of(0.0), at_once)
        raise UserError(
            f"minutes: starting the programs and probing alone takes {least / 60:.1f} minutes, "
            f"{max(0, limit_s) / 60:.1f} are left; give more, or fewer runs, seeds, snapshots or probes"
        )
    low = 0.0
    high = 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plan_lines(runs: Mapping[str, PlannedRun], seeds: int, probes: Sequence[str]) -> list[str]:
    """The plan as a table."""
    width = max(len("run"), *(len(name) for name in runs))
    head = f"{'run':{width}s} {'seeds':>5s} {'steps':>8s} {'batch':>6s} {'clips':>10s}"
    lines = [f"{head} {'FLOPs/step':>11s} {'FLOPs':>9s} {'minutes':>8s}"]
    for name, run in runs.items():
        each = f"{run.flops:.3g}" if run.flops is not None else "-"
        all_steps = f"{run.flops * run.steps:.3g}" if run.flops is not None else "-"
        minutes = f"{run.seconds / 60:.1f}" if run.seconds else "-"
        size = f"{run.steps:8,d} {run.batch:6,d} {run.steps * run.batch:10,d}"
        lines.append(f"{name:{width}s} {seeds:5d} {size} {each:>11s} {all_steps:>9s} {minutes:>8s}")
    snapshots = sum(len(run.snapshot_steps) for run in runs.values()) * seeds
    if probes:
        lines.append(
            f"probes: {', '.join(probes)}, each of {snapshots} snapshots and of an untrained encoder"
        )
    return lines

"""Runs programs, several at a time. A failure ends only what needs it, an end from outside ends all."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from vidssl.core.cpus import available_cpus
from vidssl.core.io import LOCK_FILE, make_folder
from vidssl.core.launch import end_with_parent

PYTHON = [sys.executable, "-u", "-m"]  # and a module
POLL_S = 0.2  # seconds between two looks at the programs that run
SAVE_S = 120.0  # seconds in which a program may save its state after SIGTERM
Status = Literal["done", "failed", "skipped", "not started", "stopped"]  # skipped: what it needs has failed


class Job(NamedTuple):
    """A program, and where it writes."""

    name: str
    command: list[str]
    folder: Path  # that it claims
    log: Path
    result: Path | None  # a file that exists once it is done; None: it goes on by itself, or ends at once
    needs: str | None = None  # the job that must be done before it


class Outcome(NamedTuple):
    """What came of a job."""

    status: Status
    seconds: float  # 0: it was done before
    text: str = ""


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    deadline_s: float | None = None,
    look: Callable[[Sequence[str]], None] | None = None,
) -> dict[str, Outcome]:
    """Runs the jobs that are not done, the first that may start whenever fewer than `at_once` run. Prints a
    line for each that ends.

    What needs a failed job is not started. deadline_s: of time.monotonic(), after which no job starts, and
    those that run are ended as if from outside. look: called with the names of those that run, again and
    again.
    """
    outcomes = {job.name: Outcome("done", 0.0) for job in jobs if job.result and job.result.exists()}
    waiting = [job for job in jobs if job.name not in outcomes]
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    total = len(waiting)
    try:
        while waiting or running:
            if deadline_s is not None and time.monotonic() > deadline_s:
                outcomes |= {job.name: Outcome("not started", 0.0, "the time is over") for job in waiting}
                outcomes |= {name: Outcome("stopped", 0.0, "the time is over") for name in running}
                break
            _drop_unneeded(waiting, outcomes)
            while len(running) < at_once and (job := _next_job(waiting, outcomes)):
                waiting.remove(job)
                running[job.name] = (job, start(job, at_once), time.monotonic())
            for name, (job, process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    outcomes[name] = _outcome(job, process.returncode, time.monotonic() - began)
                    number = total - len(waiting) - len(running)
                    say(_line(number, total, name, outcomes[name]))
            if look:
                look(list(running))
            time.sleep(POLL_S)
    finally:
        end([process for _, process, _ in running.values()])
    return outcomes


def say(line: str) -> None:
    """Prints a line, above the bars if there are any."""
    tqdm.write(line)
    sys.stdout.flush()


def _drop_unneeded(waiting: list[Job], outcomes: dict[str, Outcome]) -> None:
    """Takes away the jobs whose need has failed."""
    for job in list(waiting):
        need = outcomes.get(job.needs or "")
        if need and need.status != "done":
            waiting.remove(job)
            outcomes[job.name] = Outcome("skipped", 0.0, f"{job.needs}: {need.status}")


def _next_job(waiting: Sequence[Job], outcomes: Mapping[str, Outcome]) -> Job | None:
    """The first job that may start."""
    ready = (job for job in waiting if job.needs is None or job.needs in outcomes)
    return next((job for job in ready if not is_held(job.folder)), None)


def error_of(log: Path) -> str:
    """Returns the error line of a job's output, or its last line, and the path of the output."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    line = next((s for s in reversed(lines) if s.startswith("error: ")), lines[-1])
    return f"{line.removeprefix('error: ')} (full output: {log})"


def _outcome(job: Job, status: int, seconds: float) -> Outcome:
    if status == 0 and (job.result is None or job.result.exists()):
        return Outcome("done", seconds)
    ended = f"{signal.Signals(-status).name}: " if status < 0 else ""
    return Outcome("failed", seconds, ended + error_of(job.log))


def _line(number: int, total: int, name: str, outcome: Outcome) -> str:
    text = f": {outcome.text}" if outcome.text else ""
    return f"[{number}/{total}] {outcome.status:6s} {name} ({outcome.seconds:.0f} s){text}"


def start(job: Job, at_once: int) -> subprocess.Popen:
    """Starts a job in a process group of its own, with its share of the cores. It ends with this process."""
    make_folder(job.log.parent)
    threads = max(1, available_cpus() // at_once)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(job.log, "w") as log:
        return subprocess.Popen(
            job.command,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Asks all process groups to save and end, and waits for them; after SAVE_S seconds they are killed."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(SAVE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_held(folder: Path) -> bool:
    """Whether another process writes into the folder: one that outlived a runner which was killed, say."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    finally:
        os.close(descriptor)
    return False

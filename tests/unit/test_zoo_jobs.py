"""The runner of a zoo's programs: what fails ends only what needs it, and the time is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vidssl.core.io import LOCK_FILE
from vidssl.zoo import jobs as zoo_jobs
from vidssl.zoo.jobs import Job, Outcome, error_of, run_jobs

FOREVER = "while :; do sleep 0.1; done"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(zoo_jobs, "POLL_S", 0.01)


def shell(folder: Path, name: str, script: str, needs: str | None = None, result: str | None = None) -> Job:
    path = folder / result if result else None
    return Job(name, ["sh", "-c", script], folder / name, folder / f"{name}.txt", path, needs)


def test_a_failure_ends_only_what_needs_it(tmp_path, capsys):
    jobs = [
        shell(tmp_path, "bad", "echo 'error: no such thing'; exit 2"),
        shell(tmp_path, "after bad", "true", needs="bad"),
        shell(tmp_path, "good", f"touch {tmp_path}/r", result="r"),
        shell(tmp_path, "after good", f"test -e {tmp_path}/r", needs="good"),
        shell(tmp_path, "killed", "kill -9 $$"),
        shell(tmp_path, "empty", "true", result="nothing"),
    ]
    outcomes = run_jobs(jobs, 2)
    statuses = {name: outcome.status for name, outcome in outcomes.items()}
    assert statuses == {
        **dict.fromkeys(("bad", "killed", "empty"), "failed"),
        **dict.fromkeys(("good", "after good"), "done"),
        "after bad": "skipped",
    }
    assert outcomes["bad"].text == f"no such thing (full output: {tmp_path}/bad.txt)"
    assert outcomes["killed"].text.startswith("SIGKILL: ")
    assert "failed bad" in capsys.readouterr().out
    # what has a result does not run again
    assert run_jobs(jobs[2:3], 1) == {"good": Outcome("done", 0.0)}


def test_at_the_deadline_programs_are_asked_to_end_and_no_more_start(tmp_path):
    saves = f"trap 'touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/begun; {FOREVER}"
    jobs = [shell(tmp_path, "long", saves), shell(tmp_path, "next", "true")]

    class Clock:
        """Passes the deadline once the program has begun."""

        sleep = time.sleep

        def monotonic(self) -> float:
            return float((tmp_path / "begun").exists())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo_jobs, "time", Clock())
        outcomes = run_jobs(jobs, 1, deadline_s=0.5)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "long": "stopped",
        "next": "not started",
    }
    assert (tmp_path / "saved").exists()


def test_a_program_waits_for_one_that_writes_into_its_folder(tmp_path):
    lock = tmp_path / "held" / LOCK_FILE
    lock.parent.mkdir()
    hold = f"import fcntl; f = open({str(lock)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    hold += "; print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert zoo_jobs.is_held(lock.parent)
    order = tmp_path / "order"
    # the other one lets the holder end
    ends = f"echo other >> {order}; kill {holder.pid}"
    outcomes = run_jobs([shell(tmp_path, "held", f"echo held >> {order}"), shell(tmp_path, "other", ends)], 2)
    assert holder.wait() == -signal.SIGTERM
    assert all(outcome.status == "done" for outcome in outcomes.values())
    assert order.read_text() == "other\nheld\n" and not zoo_jobs.is_held(tmp_path / "nothing")


def test_programs_end_with_a_runner_that_is_killed(tmp_path):
    """Linux asks them to; they save as they do for a scheduler."""
    if sys.platform != "linux":
        pytest.skip("other systems do not tell a process that its parent has ended")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    saves = f"trap 'echo saved > {fifo}; exit 75' TERM; echo begun > {fifo}; {FOREVER}"
    job = shell(tmp_path, "long", saves)
    if not (runner := os.fork()):
        run_jobs([job], 1)
        os._exit(0)
    assert fifo.read_text() == "begun\n"
    os.kill(runner, signal.SIGKILL)
    os.waitpid(runner, 0)
    assert fifo.read_text() == "saved\n"


def test_the_output_of_a_failed_program_need_not_be_utf_8(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"error: caf\xe9.mp4: gone\n")
    assert "mp4: gone" in error_of(log)

"""Signals that end a program: one line, no process and no half-written file stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from program_ends import sigterm
from stuck_jobs import write_and_sleep

from vidssl.core.errors import Preempted, UserError, run_cli
from vidssl.data.isolation import SandboxPool
from vidssl.training.preemption import exit_on_sigterm

ROOT = Path(__file__).parents[2]
WAIT_S = 120


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def group_members(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


@pytest.mark.parametrize(
    "number, status, line", [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")]
)
@pytest.mark.parametrize("program", ["pack", "synthetic"])
def test_a_signal_to_all_processes_of_a_program(program, number, status, line, tmp_path, tiny_corpus):
    """pack: its decoding processes have just been started. synthetic: a worker has written some."""
    out = tmp_path / "out"
    event, arguments = {
        "pack": (".tar.tmp", [str(tiny_corpus), str(out), "--workers", "2"]),
        "synthetic": ("train_00003.npz", [str(out), "--train", "400", "--test", "0"]),
    }[program]
    call = [sys.executable, "tests/signal_at.py", number, event, "1", f"data_prep.{program}", *arguments]
    run = subprocess.Popen(call, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _, err = run.communicate(timeout=600)
    assert (run.returncode, err.strip()) == (status, line)
    assert [path for path in out.rglob("*") if path.name == ".lock" or path.suffix == ".tmp"] == []
    _, alive = psutil.wait_procs(group_members(run.pid), timeout=WAIT_S)
    assert not alive


STUCK = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from stuck_jobs import write_and_sleep
from vidssl.data.isolation import SandboxPool
if __name__ == "__main__":
    SandboxPool(write_and_sleep, 1000).run({path!r})
"""


def test_a_stuck_child_ends_with_a_parent_that_is_killed(tmp_path):
    path = tmp_path / "running"
    script = tmp_path / "parent.py"
    script.write_text(STUCK.format(root=str(ROOT), path=str(path)))
    parent = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    wait_for(path)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert children and not [c for c in alive if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]


def test_threads_that_wait_for_children_end_when_their_pool_is_closed(tmp_path):
    """An end of a program does not wait for the deadline of a stuck file, and starts no further child."""
    pool = SandboxPool(write_and_sleep, 1000)
    results = []
    thread = threading.Thread(target=lambda: results.append(pool.run(str(tmp_path / "running"))))
    thread.start()
    wait_for(tmp_path / "running")
    pool.close()
    thread.join(WAIT_S)
    assert [result.reason for result in results] == ["crash"]
    with pytest.raises(UserError, match="ended"):
        pool.run(str(tmp_path / "other"))


def test_an_interrupted_map_ends_its_children(tmp_path):
    pool = SandboxPool(write_and_sleep, 1000)
    jobs = [(str(tmp_path / str(number)),) for number in range(3)]

    def interrupt() -> None:
        wait_for(tmp_path / "0")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(pool.map(jobs, 1))
    assert not (tmp_path / "1").exists()


def library_call() -> None:
    """As torch's load_state_dict, which makes errors of a weight to one of its own."""
    try:
        sigterm()
    except Exception as e:
        raise RuntimeError("swallowed") from e


@pytest.fixture
def handler_restored():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_library_cannot_swallow_sigterm(handler_restored, monkeypatch, capsys):
    with pytest.raises(Preempted, match="saved"), exit_on_sigterm():
        library_call()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        run_cli(lambda _: library_call())
    assert (end.value.code, capsys.readouterr().err) == (143, "terminated\n")


def test_sigterm_that_is_repeated_does_not_end_the_cleaning_up(handler_restored, monkeypatch):
    cleaned = []

    def main(_: list[str]) -> None:
        try:
            sigterm()
        finally:
            sigterm()
            cleaned.append(True)

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit):
        run_cli(main)
    assert cleaned


@pytest.mark.parametrize("context", ["run_cli", "exit_on_sigterm"])
def test_a_fork_ends_by_sigterm_as_if_there_were_no_handler(context, handler_restored, monkeypatch):
    statuses = []

    def main(_: list[str]) -> None:
        child = os.fork()
        if child == 0:
            try:
                sigterm()
            finally:
                os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    monkeypatch.setattr(sys, "argv", ["program"])
    if context == "run_cli":
        run_cli(main)
    else:
        with exit_on_sigterm():
            main([])
    assert statuses == [-signal.SIGTERM]

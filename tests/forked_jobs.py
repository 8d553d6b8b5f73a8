"""Programs that vidssl zoo-run and adapt start, forked from this process: none imports torch again."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from data_prep import pack
from vidssl import probe, train
from vidssl.core.errors import run_cli
from vidssl.core.launch import end_with_parent
from vidssl.zoo.jobs import Job

MAINS = {"vidssl.train": train.main, "vidssl.probe": probe.main, "data_prep.pack": pack.main}


class ForkedProcess:
    """What a runner needs of subprocess.Popen."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 0) -> int | None:
        return self.poll(options=0)


def fork(work: Callable[[], object], output: Path) -> ForkedProcess:
    """Calls work() in a forked process, a group of its own, as a fresh program with this output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        return ForkedProcess(pid)
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(output, "w", buffering=1) as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            sys.stdout = sys.stderr = file
            torch.set_num_threads(1)  # the threads of this process are not those of its parent
            work()
            status = 0
    except SystemExit as e:
        status = int(e.code or 0)
    finally:  # it must not go on as its parent
        os._exit(status)


def start_forked(
    job: Job, at_once: int, prepare: Callable[[Job], object] = lambda job: None
) -> ForkedProcess:
    """Stands for vidssl.zoo.jobs.start. prepare: called first in the new process."""
    python, _, as_module, program, *arguments = job.command
    assert (python, as_module) == (sys.executable, "-m")

    def work() -> None:
        end_with_parent()
        prepare(job)
        sys.argv = [program, *arguments]
        run_cli(MAINS[program])

    return fork(work, job.log)

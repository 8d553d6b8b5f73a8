"""Starts a program several times on this machine, as the processes of one training or evaluation.

In the place of torchrun, which imports torch, turns every exit status into 1 and adds a traceback to an
error. The processes find each other by the same environment variables.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from vidssl.core.cpus import available_cpus
from vidssl.core.errors import ERROR_FILE, EXIT_REQUEUE, UserError

PROCESSES = "--processes"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that are passed on
NCCL_ABORT = 128 + signal.SIGABRT  # its watchdog ends a process that has waited too long for another one
# Once a process has failed, the others get so many seconds to end by themselves, and so many after SIGTERM.
GRACE_S = (60.0, 600.0)
PR_SET_PDEATHSIG = 1  # of prctl(2)
# Of NVIDIA's driver, of AMD's, and of WSL: without them no GPU is looked for, since torch takes seconds
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))


def take_processes(words: list[str]) -> int:
    """Removes --processes N from a command line and returns N; 1 without it."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == PROCESSES:
            end = i + 1 if equals else i + 2
            value = value if equals else " ".join(words[i + 1 : end])
            del words[i:end]
            return parse_processes(value)
    return 1


def parse_processes(value: str) -> int:
    """The number of processes that the option asks for."""
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{PROCESSES} {value}: give a number of processes, from 1 on")
    if "RANK" in os.environ:
        raise UserError(f"{PROCESSES} {value}: a launcher has started this process already (RANK is set)")
    return int(value)


def check_one_process(argv: Sequence[str]) -> None:
    """Raises UserError if several processes are asked for, or a launcher has started several: for programs
    that do not share their work, of which each process would do all of it."""
    alone = "this program runs in one process and shares no work"
    if any(word.partition("=")[0] == PROCESSES for word in argv):
        raise UserError(f"{PROCESSES}: {alone}; leave the option out")
    count = os.environ.get("WORLD_SIZE", "1")
    # Every launcher gives its processes LOCAL_RANK; WORLD_SIZE alone may be known to the script of a job
    if "LOCAL_RANK" in os.environ and count != "1":
        raise UserError(
            f"WORLD_SIZE is {count}: {alone}; start it once, without torchrun or accelerate launch"
        )


def check_gpus(count: int) -> None:
    """Raises UserError if there are GPUs, but not one for each of `count` processes."""
    gpus = visible_gpus()
    if 0 < gpus < count:
        raise UserError(
            f"{PROCESSES} {count}: each process takes a GPU, and {gpus} can be seen here; give {PROCESSES} "
            f"{gpus}, or CUDA_VISIBLE_DEVICES= for CPUs alone"
        )


def visible_gpus() -> int:
    """GPUs that torch would use; 0, without importing it, where there is no driver."""
    if not any(driver.exists() for driver in GPU_DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count()


def relaunch(count: int) -> None:
    """Runs this process's own command in `count` processes, and ends with their exit status."""
    call = list(sys.orig_argv)
    take_processes(call)
    sys.exit(run_processes([sys.executable, *call[1:]], count))


def run_processes(call: Sequence[str], count: int) -> int:
    """Runs `call` in `count` processes of this machine and returns their common exit status.

    Signals are passed on. A process that has failed ends the others, which get time to save. The line that
    says why they end is printed once, whether it is that of one process or of all.
    """
    port = os.environ.get("MASTER_PORT") or free_port()
    with tempfile.TemporaryDirectory() as folder, passed_on() as (children, told):
        for rank in range(count):
            env = os.environ | process_variables(rank, count, port) | {ERROR_FILE: f"{folder}/{rank:06d}"}
            # a group of its own: Ctrl-C of a terminal comes from here alone
            children.append(subprocess.Popen(call, env=env, process_group=0, preexec_fn=end_with_parent))
        for number in list(told):
            send_signal(children, number)
        status = joint_status(wait_for_all(children))
        lines = [path.read_text() for path in sorted(Path(folder).iterdir())]
    for line in dict.fromkeys(lines):
        print(line, file=sys.stderr)
    return status


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def process_variables(rank: int, count: int, port: str) -> dict[str, str]:
    """The environment variables of a process."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cpus() // count))
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads,
    }


def end_with_parent() -> None:
    """Lets the system send SIGTERM, at which a program saves its state, to this process when the one that
    started it has been killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


@contextlib.contextmanager
def passed_on() -> Iterator[tuple[list[subprocess.Popen], list[int]]]:
    """Context in which signals are passed on to the processes that are in the first list; the second one
    gets their numbers."""
    children: list[subprocess.Popen] = []
    told: list[int] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        send_signal(children, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield children, told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def send_signal(children: Sequence[subprocess.Popen], number: int) -> None:
    """To those that are there still."""
    for child in children:
        child.send_signal(number)


def wait_for_all(children: Sequence[subprocess.Popen]) -> list[int]:
    """Returns what the processes ended with, in the order in which they ended; without those that had to be
    killed here."""
    ended: list[int] = []
    with ThreadPoolExecutor(len(children)) as pool:
        running = {pool.submit(child.wait) for child in children}
        while running and not any(ended):
            done, running = wait(running, return_when=FIRST_COMPLETED)
            ended += [future.result() for future in done]
        for seconds, number in zip(GRACE_S, (signal.SIGTERM, signal.SIGKILL), strict=True):
            done, running = wait(running, seconds, return_when=ALL_COMPLETED)
            ended += [future.result() for future in done]
            if running:
                send_signal(children, number)
    return ended


def joint_status(ended: Sequence[int]) -> int:
    """The exit status for all: that of the first failure, which hides one that asks for the same command
    again. ended: as Popen has them, negative for a signal."""
    statuses = [128 - code if code < 0 else code for code in ended]
    statuses = [EXIT_REQUEUE if status == NCCL_ABORT else status for status in statuses]
    failures = [status for status in statuses if status not in (0, EXIT_REQUEUE)]
    return failures[0] if failures else max(statuses, default=0)

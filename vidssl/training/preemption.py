"""Ending a run early: SIGTERM from a scheduler, Ctrl-C, processes of the run that are lost, and the limit of
restarts without progress. docs/training.md has the whole table."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from vidssl.core.errors import EXIT_INTERRUPTED, Preempted, UserError, raise_at_sigterm
from vidssl.core.io import atomic_write_text
from vidssl.training.checkpoint import list_checkpoints, step_of

# folders of gloo's source, whose names occur in its untyped errors (RuntimeError) of a lost connection or a
# timeout
GLOO_SOURCES = ("gloo/transport/", "gloo/rendezvous/")
# NCCL's codes of wrong use, which fails again after a restart
NCCL_USAGE_ERRORS = ("ncclInvalidUsage", "ncclInvalidArgument")
PORT_IN_USE = "EADDRINUSE"  # in the error of the process that opens the port
MAX_STARTS_WITHOUT_PROGRESS = 3  # after which a run is not queued again
T = TypeVar("T")


class StopWaiting(BaseException):
    """Raised by a signal handler in a process that waits for data."""


class PreemptionHandler:
    """Context in which SIGTERM and Ctrl-C only set `requested`, so that the process can end after its step.

    A second Ctrl-C ends the process at once; what is on the disk stays whole. Schedulers send SIGTERM, and
    terminals SIGINT, to all processes: those forked here block both, since one that ended would lose its
    clips. multiprocessing ends its processes by SIGTERM, too, and waits for them: one that is still there at
    the end, stuck in a read, is killed.
    """

    is_open = False
    has_fork_hook = False

    def __init__(self) -> None:
        self.signal: int | None = None  # the first that came
        self._is_waiting = False
        self._previous: dict[int, Any] = {}
        self._children_before: set[BaseProcess] = set()

    @property
    def requested(self) -> bool:
        """Whether the process has been told to end."""
        return self.signal is not None

    def __enter__(self) -> "PreemptionHandler":
        if not PreemptionHandler.has_fork_hook:  # a hook cannot be removed
            os.register_at_fork(after_in_child=_block_signals_in_child)
            PreemptionHandler.has_fork_hook = True
        PreemptionHandler.is_open = True
        self._children_before = set(multiprocessing.active_children())
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os.write(sys.stderr.fileno(), b"interrupted again: stopped at once; checkpoints are whole\n")
            os._exit(EXIT_INTERRUPTED)
        self.signal = self.signal or number
        if self._is_waiting:
            self._is_waiting = False
            raise StopWaiting

    def until_requested(self, loader: Iterator[T], alone: bool) -> Iterator[T]:
        """Yields from the loader. A process that is `alone` ends its wait for data when a signal comes; one
        of several goes on, since the others wait for its part of the step."""
        with contextlib.suppress(StopWaiting):
            while True:
                self._is_waiting = alone
                try:
                    if alone and self.requested:
                        return
                    batches = next(loader)
                except StopIteration:
                    return
                finally:
                    self._is_waiting = False
                yield batches

    def __exit__(self, *_: object) -> None:
        PreemptionHandler.is_open = False
        for child in set(multiprocessing.active_children()) - self._children_before:
            child.kill()
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        # a launcher sends SIGTERM again when it ends the other processes: ignored from now on
        if not self.requested:
            signal.signal(signal.SIGTERM, self._previous[signal.SIGTERM])


def _block_signals_in_child() -> None:
    if PreemptionHandler.is_open:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})


@contextlib.contextmanager
def exit_on_lost_peer() -> Iterator[None]:
    """Raises Preempted when another process of the run has died, does not answer or has not come, so that the
    job is requeued; UserError when the port at which the processes meet is taken."""
    try:
        yield
    except RuntimeError as e:
        is_alone = torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1
        if is_alone or not is_lost_peer(e):
            raise
        reason = str(e).strip().splitlines()[0][:200]
        if PORT_IN_USE in str(e):
            raise UserError(
                f"the port at which the processes meet is in use, perhaps by another run ({reason}); set "
                "MASTER_PORT (accelerate launch: --main_process_port) to a free one"
            ) from e
        raise Preempted(f"error: another process of this run is gone or does not answer ({reason})") from e


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process died or does not answer.

    torch.distributed raises a DistError for lost connections, its store, and NCCL.
    """
    message = str(error)
    if isinstance(error, torch.distributed.DistError):
        return not any(code in message for code in NCCL_USAGE_ERRORS)
    return any(source in message for source in GLOO_SOURCES)


@contextlib.contextmanager
def exit_on_sigterm(message: str = "SIGTERM: saved steps stay; the same command goes on") -> Iterator[None]:
    """Raises Preempted on a SIGTERM outside of the training loop (see PreemptionHandler)."""
    with raise_at_sigterm(Preempted(message)):
        yield


@contextlib.contextmanager
def limited_requeues(out: Path) -> Iterator[None]:
    """Raises UserError in the place of Preempted when a run has ended MAX_STARTS_WITHOUT_PROGRESS times in a
    row with the same newest checkpoint: another start would end the same way. out: the run's folder, where
    the first process keeps the count."""
    try:
        yield
    except Preempted as e:
        if int(os.environ.get("RANK", "0")) or not out.is_dir():
            raise
        steps = [step_of(checkpoint) for checkpoint in list_checkpoints(out / "checkpoints")]
        newest = max(steps, default=0)
        count = _count_end(out / "requeues.json", newest)
        if count >= MAX_STARTS_WITHOUT_PROGRESS:
            raise UserError(
                f"{e}; no progress: the run has ended {count} times in a row with step {newest} as the last "
                f"that is saved; mend the cause, or delete {out / 'requeues.json'} to try again"
            ) from e
        raise


def _count_end(path: Path, step: int) -> int:
    """Counts an end of the run in the file. Returns how many in a row had `step` as the last saved."""
    count = 1
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads(path.read_text())
        if before["step"] == step:
            count += before["ends"]
    content = json.dumps({"step": step, "ends": count})
    with contextlib.suppress(OSError):  # a full disk does not hide why the run ends
        atomic_write_text(path, content)
    return count

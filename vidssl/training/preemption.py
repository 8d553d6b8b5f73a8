"""Ending a run early: SIGTERM from a scheduler, and processes of the run that are lost."""

import contextlib
import os
import signal
from collections.abc import Iterator

import torch

from vidssl.core.errors import EXIT_REQUEUE, Preempted

__all__ = ["EXIT_REQUEUE", "PreemptionHandler", "exit_on_lost_peer"]
BACKENDS = (
    "gloo",
    "nccl",
    "c10d",
)  # named in the messages of lost connections that have no type of their own


class PreemptionHandler:
    """Context in which SIGTERM only sets `requested`, so that the process can end after its step.

    Schedulers send SIGTERM to the processes of the loader, too. Processes that are forked in the context block it: one
    that died would lose its clips.
    """

    is_open = False
    has_fork_hook = False

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "PreemptionHandler":
        if not PreemptionHandler.has_fork_hook:  # a hook cannot be removed
            os.register_at_fork(after_in_child=_block_sigterm_in_child)
            PreemptionHandler.has_fork_hook = True
        PreemptionHandler.is_open = True
        self.previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_: object) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        PreemptionHandler.is_open = False
        if (
            not self.requested
        ):  # a launcher sends SIGTERM again when it ends the other processes: ignored from now on
            signal.signal(signal.SIGTERM, self.previous)


def _block_sigterm_in_child() -> None:
    if PreemptionHandler.is_open:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def exit_on_lost_peer() -> Iterator[None]:
    """Raises Preempted when another process of the run has died or does not answer, so that the job is requeued."""
    try:
        yield
    except RuntimeError as e:
        message = str(e)
        lost = isinstance(e, torch.distributed.DistError) or any(b in message.lower() for b in BACKENDS)
        if not lost or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            raise
        reason = message.strip().splitlines()[0][:200]
        raise Preempted(f"error: another process of this run is gone or does not answer ({reason})") from e

"""Ending a run early: SIGTERM from a scheduler, and processes of the run that are lost."""

import contextlib
import os
import signal
from collections.abc import Iterator

import torch

from vidssl.core.errors import Preempted

# folders of gloo's source, whose names occur in its untyped errors (RuntimeError) of a lost connection or a
# timeout
GLOO_SOURCES = ("gloo/transport/", "gloo/rendezvous/")
# NCCL's codes of wrong use, which fails again after a restart
NCCL_USAGE_ERRORS = ("ncclInvalidUsage", "ncclInvalidArgument")


class PreemptionHandler:
    """Context in which SIGTERM only sets `requested`, so that the process can end after its step.

    Schedulers send SIGTERM to the processes of the loader, too. Loader processes forked here block SIGTERM,
    since a killed one would lose its clips.
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
        # a launcher sends SIGTERM again when it ends the other processes: ignored from now on
        if not self.requested:
            signal.signal(signal.SIGTERM, self.previous)


class TerminationHandler(PreemptionHandler):
    """Context in which SIGTERM raises Preempted: for programs without steps, which keep what is finished."""

    def _request(self, *_: object) -> None:
        if not self.requested:
            self.requested = True
            raise Preempted("SIGTERM")


def _block_sigterm_in_child() -> None:
    if PreemptionHandler.is_open:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def exit_on_lost_peer() -> Iterator[None]:
    """Raises Preempted when another process of the run has died or does not answer, so that the job is
    requeued."""
    try:
        yield
    except RuntimeError as e:
        has_peers = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        if not has_peers or not is_lost_peer(e):
            raise
        reason = str(e).strip().splitlines()[0][:200]
        raise Preempted(f"error: another process of this run is gone or does not answer ({reason})") from e


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process died or does not answer.

    torch.distributed raises a DistError for lost connections, its store, and NCCL.
    """
    message = str(error)
    if isinstance(error, torch.distributed.DistError):
        return not any(code in message for code in NCCL_USAGE_ERRORS)
    return any(source in message for source in GLOO_SOURCES)

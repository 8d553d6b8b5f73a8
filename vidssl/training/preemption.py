"""What a run does when something goes wrong: told to end, a step that must not be taken, a process that is gone."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import torch

from vidssl.core.io import print_stderr

EXIT_REQUEUE = (
    75  # exit status, EX_TEMPFAIL of sysexits.h: the same command again goes on where this one ended
)


class PreemptionHandler:
    """While it is open, SIGTERM only sets `asked`; then this process ends after its step.

    Schedulers send it to the loader's processes, too. Those that are forked meanwhile do not get it: one that died
    would take its clips with it.
    """

    open = False

    def __enter__(self) -> "PreemptionHandler":
        self.requested, PreemptionHandler.open = False, True
        self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        PreemptionHandler.open = False
        if (
            not self.requested
        ):  # else a second one, from a launcher that ends the others, must not break what is written
            signal.signal(signal.SIGTERM, self.before)


def _keep_from_child() -> None:
    if PreemptionHandler.open:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


os.register_at_fork(after_in_child=_keep_from_child)


@contextlib.contextmanager
def exit_on_lost_peer() -> Iterator[None]:
    """Another process that is gone or does not answer ends this one in a line, with the status that asks for more."""
    try:
        yield
    except RuntimeError as e:
        said = str(e)
        lost = isinstance(e, torch.distributed.DistError) or any(
            w in said.lower() for w in ("gloo", "nccl", "c10d")
        )
        if not lost or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            raise
        why = said.strip().splitlines()[0][:200]
        print_stderr(f"error: another process of this run is gone or does not answer ({why})")
        sys.exit(EXIT_REQUEUE)

"""Waiting for the other processes of an evaluation as long as they work, and not for those that are lost.

Processes of a probe work for very different times: their videos differ, and heads in closed form are
fitted by the first one alone. A thread of each takes part in a small all-reduce twice a second. `wait`
returns when all have arrived; a process that has died breaks the all-reduce of the others, which then end
within TIMEOUT_S.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vidssl.core.errors import Preempted
from vidssl.core.io import claim_folder
from vidssl.evaluation.processes import Processes

INTERVAL_S = 0.5  # seconds between two all-reduces
TIMEOUT_S = 60  # seconds without an answer after which a process counts as lost


class Peers:
    """Context in which `wait` can be called. With one process there is nobody to wait for."""

    def __init__(self, accelerator: Accelerator):
        self.world = accelerator.num_processes
        self.rank = accelerator.process_index
        self.error: str | None = None
        self._arrivals = 0  # calls of `wait` of this process
        self._closing = False
        self._seen = torch.zeros(self.world, 2)  # arrivals and closing of each process
        self._changed = threading.Condition()

    def __enter__(self) -> "Peers":
        if self.world > 1:
            timeout = timedelta(seconds=TIMEOUT_S)
            self._group: Any = torch.distributed.new_group(backend="gloo", timeout=timeout)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.world > 1 and kind is None:
            self._closing = True
            self._thread.join()
        if kind is Preempted and self.error is not None:  # not by a scheduler
            raise Preempted(self.error)

    def wait(self) -> None:
        """Waits for all other processes, as long as they live. Raises Preempted if one is lost."""
        if self.world == 1:
            return
        with self._changed:
            self._arrivals += 1
            self._changed.wait_for(
                lambda: self.error is not None or int(self._seen[:, 0].min()) >= self._arrivals
            )
        if self.error is not None:
            raise Preempted(self.error)

    def _watch(self) -> None:
        pause = threading.Event()
        try:
            while not self._seen[:, 1].all():
                state = torch.zeros(self.world, 2)
                state[self.rank] = torch.tensor([self._arrivals, self._closing])
                torch.distributed.all_reduce(state, group=self._group)
                with self._changed:
                    self._seen = state
                    self._changed.notify_all()
                pause.wait(INTERVAL_S)
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[0][:200]
            with self._changed:
                self.error = f"another process of this run is gone or does not answer ({reason})"
                self._changed.notify_all()
            # The main thread may be at work; its handler of SIGTERM ends it.
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def claim_for_all(out: Path, program: str, processes: Processes) -> Iterator[None]:
    """Context in which no other program may claim the folder. Collective: if one has, or the folder cannot be
    written to, all processes raise UserError."""
    with contextlib.ExitStack() as claims:

        def claim() -> None:
            claims.enter_context(claim_folder(out, program))

        processes.run_on_main(claim)
        yield

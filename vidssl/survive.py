"""What a run does when something goes wrong: told to end, a step that must not be taken, a process that is gone."""

import contextlib
import math
import os
import signal
import statistics
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vidssl.errors import UserError
from vidssl.files import say
from vidssl.fsdp import whole, zero_of

REQUEUE = 75  # exit status, EX_TEMPFAIL of sysexits.h: the same command again goes on where this one ended
WINDOW, FEWEST = 128, 32  # accepted steps that say what is usual; and how many it takes to say so


class Stop:
    """While it is open, SIGTERM only sets `asked`; then this process ends after its step.

    Schedulers send it to the loader's processes, too. Those that are forked meanwhile do not get it: one that died
    would take its clips with it.
    """

    open = False

    def __enter__(self) -> "Stop":
        self.asked, Stop.open = False, True
        self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        Stop.open = False
        if not self.asked:  # else a second one, from a launcher that ends the others, must not break what is written
            signal.signal(signal.SIGTERM, self.before)


def _keep_from_child() -> None:
    if Stop.open:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


os.register_at_fork(after_in_child=_keep_from_child)


class Guard:
    """Which steps are not taken: those whose loss or gradients are not finite or, if asked, far above the usual.

    A step that is not taken leaves the weights as they are. After more than `skip` in a row the weights and the
    optimiser go back to the last checkpoint while the data go on, so that the batches since then are left out (as in
    PaLM, arXiv 2204.02311, section 5.1); after `rollbacks` of these the run stops. All of it is a function of the
    losses and norms, which are the same in every process, and its state is part of the checkpoints.
    """

    def __init__(self, skip: int, rollbacks: int, spike: float | None, scaled: bool = False):
        """scaled: the gradients are fp16, whose scaler itself leaves out a step of gradients that are not finite."""
        self.skip, self.rollbacks, self.spike, self.scaled = skip, rollbacks, spike, scaled
        self.row = self.skipped = self.rolled_back = 0  # not taken in a row, in all; times gone back
        self.usual: dict[str, deque[float]] = {"loss": deque(maxlen=WINDOW), "grad_norm": deque(maxlen=WINDOW)}

    def objection(self, now: dict[str, float]) -> str | None:
        """Why the step is not to be taken; None: it is. now: its loss and grad_norm."""
        why = next((why for name in self.usual if (why := self._wrong(name, now[name]))), None)
        if why is None:
            self.row = 0
            for name, window in self.usual.items():
                if math.isfinite(now[name]):
                    window.append(now[name])
        else:
            self.row += 1
            self.skipped += 1
        return why

    def _wrong(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return None if self.scaled and name == "grad_norm" else f"{name} {value}"
        window = self.usual[name]
        if self.spike is not None and len(window) >= FEWEST:
            limit = statistics.fmean(window) + self.spike * statistics.pstdev(window)
            if value > limit:
                return f"{name} {value:.4g}, over {limit:.4g}"
        return None

    @property
    def enough(self) -> bool:
        """Too many in a row to go on from these weights."""
        return self.row > self.skip

    def state(self) -> dict[str, Any]:
        """Plain data, for the checkpoint."""
        counts = {"row": self.row, "skipped": self.skipped, "rolled_back": self.rolled_back}
        return {**counts, "usual": {name: list(window) for name, window in self.usual.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.row, self.skipped, self.rolled_back = state["row"], state["skipped"], state["rolled_back"]
        for name, window in self.usual.items():
            window.extend(state["usual"][name])


def meet(accelerator: Accelerator, means: dict[str, Tensor], sums: dict[str, float]) -> dict[str, float]:
    """Averages and sums over all processes, the same in each, in one exchange."""
    own = [whole(v.detach()).double().to(accelerator.device) for v in means.values()]
    each = torch.stack([*own, *torch.tensor([*sums.values()], dtype=torch.float64, device=accelerator.device)])
    total = accelerator.reduce(each, "sum").tolist()
    world = accelerator.num_processes
    return {k: v / world if k in means else v for k, v in zip([*means, *sums], total, strict=True)}


def let_go(accelerator: Accelerator) -> None:
    """A step that is not taken; the scale of fp16 gradients moves on all the same."""
    if (sharded := zero_of(accelerator)) is not None:
        sharded.leave_out()
    if accelerator.scaler is not None:
        accelerator.scaler.update()


def same_everywhere(accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """An error if the processes have read different checkpoints, or some of them none. All processes must ask."""
    mine = torch.tensor([state["step"] if state else 0], device=accelerator.device)
    steps = sorted(set(accelerator.gather(mine).tolist()))
    if len(steps) > 1:
        raise UserError(
            f"the processes have read checkpoints of different steps {steps} (0: none): the folder is not shared"
        )


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Another process that is gone or does not answer ends this one in a line, with the status that asks for more."""
    try:
        yield
    except RuntimeError as e:
        said = str(e)
        lost = isinstance(e, torch.distributed.DistError) or any(w in said.lower() for w in ("gloo", "nccl", "c10d"))
        if not lost or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            raise
        why = said.strip().splitlines()[0][:200]
        say(f"error: another process of this run is gone or does not answer ({why})")
        sys.exit(REQUEUE)

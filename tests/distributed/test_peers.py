"""A process of an evaluation waits for the others as long as they live."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing

from vidssl.core.errors import Preempted
from vidssl.training import peers
from vidssl.training.preemption import exit_on_sigterm

WORLD = 2
LOST, INTERRUPTED, FINISHED = 75, 76, 0


def run_process(rank: int, file: str, what: str, statuses) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    peers.INTERVAL_S = 0.05
    accelerator = SimpleNamespace(num_processes=WORLD, process_index=rank)
    status = FINISHED
    try:
        with exit_on_sigterm("SIGTERM"), peers.Peers(accelerator) as found:
            found.wait()
            if rank == 1 and what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0 and what == "dies at work":
                signal.pause()
            if rank == 1 and what == "dies at work":
                os._exit(1)
            for _ in range(3):
                found.wait()
    except Preempted as e:
        status = LOST if "another process" in str(e) else INTERRUPTED
    statuses[rank] = status
    os._exit(0)


@pytest.mark.parametrize(
    ("what", "expected"),
    [("finishes", [FINISHED, FINISHED]), ("dies", [LOST, -1]), ("dies at work", [LOST, -1])],
)
def test_a_lost_process_ends_the_others(what, expected, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    statuses = context.Array("i", [-1] * WORLD)
    arguments = [(rank, str(tmp_path / "store"), what, statuses) for rank in range(WORLD)]
    processes = [context.Process(target=run_process, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert list(statuses) == expected

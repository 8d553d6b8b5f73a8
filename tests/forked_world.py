"""Processes of one training world on this machine, forked so that they need not import torch again."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable


def fork_world(world: int, work: Callable[[int, int], object]) -> None:
    """Calls work(rank, port) in `world` forked processes, with a free port for their rendezvous.

    Exits if one of them fails, after its traceback; the others are killed, since they would wait for it.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            status = 1
            try:
                work(rank, port)
                status = 0
            finally:  # it must not go on as its parent
                if status:
                    traceback.print_exc()
                os._exit(status)
        children.append(child)
    while children:
        child, status = os.wait()
        # Compilers of torch have processes of their own
        if child not in children:
            continue
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"a process of {world} failed")


def set_rank(world: int, rank: int, port: int) -> None:
    """Sets the variables by which a process knows its world."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {k: str(v) for k, v in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

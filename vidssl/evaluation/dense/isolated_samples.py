"""Sequences of a dense evaluation read and decoded in a child process (`vidssl.data.isolation`)."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from vidssl.core.errors import UserError
from vidssl.data.isolation import Failure, Reporter, Sandbox
from vidssl.evaluation.dense.datasets import DenseSample

Splits = dict[str, list[DenseSample]]


@contextlib.contextmanager
def isolated(splits: Splits, timeout_s: float, memory_mb: int) -> Iterator[Splits]:
    """Context with samples that a child process reads. A file that hangs or crashes its decoder is an error
    with its name.

    The child is started at once: what forks should not have threads yet. timeout_s: seconds to read a
    sequence; memory_mb: 2**20 bytes by which that may grow the child.
    """
    work = partial(load_in_child, splits)
    sandbox = Sandbox(work, timeout_s, start_method="fork", memory_bytes=memory_mb << 20)

    def read(split: str, number: int) -> tuple[np.ndarray, Any]:
        found = sandbox.run(split, number)
        if isinstance(found, Failure):
            raise UserError(
                f"{splits[split][number].files[0]}: it or its labels cannot be read: {found.detail} "
                f"(data.decode_timeout_s {timeout_s:g}, data.decode_memory_mb {memory_mb})"
            )
        return found

    def isolate(split: str) -> list[DenseSample]:
        return [s._replace(read=partial(read, split, n)) for n, s in enumerate(splits[split])]

    with contextlib.closing(sandbox):
        sandbox.start()
        yield {split: isolate(split) for split in splits}


def load_in_child(splits: Splits, report: Reporter, split: str, number: int) -> tuple[np.ndarray, Any]:
    return splits[split][number].load()

"""A data set whose samples are decoded in a child process (`vidssl.data.isolation`)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from vidssl.data.dataset import DecodeFailure, Example, first_decodable
from vidssl.data.isolation import Failure, Reporter, Sandbox


class AttemptDataset(Protocol):
    """A data set of positions with replacements. It calls `on_decode` when it has read a sample's bytes."""

    on_decode: Callable[[], None]

    def try_position(self, position: Any, attempt: int) -> Example | DecodeFailure: ...

    def key(self, position: Any, attempt: int) -> str: ...


class IsolatedDataset(Dataset[Example]):
    """`dataset`, with every attempt made in a forked child process.

    An attempt that hangs, crashes or grows too much counts as a sample that could not be decoded, so the
    position's rule of replacement applies as for a damaged file. Each loader worker (without workers: the
    training process) has one child.

    timeout_s: seconds that an attempt may decode; reading has timeouts of its own.
    memory_bytes: see Sandbox.
    """

    def __init__(self, dataset: AttemptDataset, timeout_s: float, memory_bytes: int):
        self.dataset = dataset
        self.sandbox = Sandbox(
            partial(attempt_in_child, dataset),
            timeout_s,
            start_method="fork",
            timed_from="progress",
            memory_bytes=memory_bytes,
        )

    def __getitem__(self, position: int) -> Example:
        return first_decodable(position, self.try_position)

    def try_position(self, position: Any, attempt: int, extra_bytes: int = 0) -> Example | DecodeFailure:
        """extra_bytes: by which this attempt may grow the child beyond memory_bytes."""
        result = self.sandbox.run(position, attempt, extra_bytes=extra_bytes)
        if isinstance(result, Failure):
            return DecodeFailure(self.dataset.key(position, attempt), result.reason)
        return result

    def close(self) -> None:
        """Kills the child."""
        self.sandbox.close()


def attempt_in_child(
    dataset: AttemptDataset, report: Reporter, position: int, attempt: int
) -> Example | DecodeFailure:
    torch.set_num_threads(1)
    dataset.on_decode = report.progress
    return dataset.try_position(position, attempt)

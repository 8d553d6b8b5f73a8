"""What stands at a position of the training stream: a clip, after as many attempts as that takes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ATTEMPTS = 20  # samples tried at one position before the run gives up


class Bad(NamedTuple):
    """A sample that could not be decoded, and why."""

    key: str
    reason: str


class Item(NamedTuple):
    position: int
    key: str
    label: int
    video: Tensor  # u8 [3, T, H, W]
    bad: list[Bad]  # what could not be decoded and was replaced


def first_good(position: int, attempt: Callable[[int, int], Item | Bad]) -> Item:
    """attempt: (position, number) -> clip or why not; without a key: all of them failed."""
    bad: list[Bad] = []
    for number in range(ATTEMPTS):
        got = attempt(position, number)
        if isinstance(got, Item):
            return got._replace(bad=bad)
        bad.append(got)
    return Item(position, "", -1, torch.empty(0), bad)

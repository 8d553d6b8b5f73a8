"""Exponential moving averages (EMA) of modules."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def average_of(module: Module) -> Module:
    """An average that starts from the module and gets no gradients."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_averages(averages: Sequence[nn.Module], modules: Sequence[nn.Module], momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * module, for each pair."""
    own: list[Tensor] = [p for average in averages for p in average.parameters()]
    online: list[Tensor] = [p for module in modules for p in module.parameters()]
    torch._foreach_lerp_(own, online, 1 - momentum)

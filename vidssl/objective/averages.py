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
def update_averages(
    averages: Sequence[nn.Module], modules: Sequence[nn.Module], momentum: float | Tensor
) -> None:
    """average = momentum * average + (1 - momentum) * module, for each pair. momentum: perhaps f64 [] on the
    device."""
    own: list[Tensor] = [p for average in averages for p in average.parameters()]
    online: list[Tensor] = [p for module in modules for p in module.parameters()]
    weight = 1 - momentum
    if isinstance(weight, Tensor):
        torch._foreach_lerp_(own, online, [weight.to(own[0].dtype)] * len(own))
    else:
        torch._foreach_lerp_(own, online, weight)

"""Options of the blocks of a model: recomputed activations, kernels of attention, torch.compile."""

from collections.abc import Iterator

import torch
from torch import nn

from vidssl.model.cross_predictor import CrossStack, MemoryAttention
from vidssl.model.vit import Attention, TransformerStack
from vidssl.objective.objective import Objective
from vidssl.objective.targets import Target

# Graphs of one function that torch.compile keeps. All blocks share them: with and without gradients, of each
# width, of each size of a micro-batch.
MAX_GRAPHS = 64
Stack = TransformerStack | CrossStack


def configure_blocks(model: nn.Module, activation_checkpointing: bool, compile: bool = False) -> None:
    """Sets the options of every transformer stack in `model`.

    A stack of an objective whose masks keep the same numbers of tokens in each step is compiled for these
    numbers, as is that of a target, which sees whole clips; one whose numbers vary is compiled once for all
    of them. Elsewhere torch finds out what varies. The names of the weights do not change.
    """
    if compile:
        torch._dynamo.config.cache_size_limit = max(MAX_GRAPHS, torch._dynamo.config.cache_size_limit)
        # a block is smaller than a bucket of DDP, at whose borders its graph would be cut
        torch._dynamo.config.optimize_ddp = False
    varying = set(varying_stacks(model))
    for stack in all_stacks(model):
        stack.activation_checkpointing = activation_checkpointing
        for block in stack:
            for attention in block.modules():
                if isinstance(attention, Attention | MemoryAttention):
                    attention.counts_vary = stack in varying
            if compile:
                block.compile(dynamic=stack in varying if isinstance(model, Objective) else None)


def all_stacks(model: nn.Module) -> Iterator[Stack]:
    """The stacks of a model, those of a distillation teacher included."""
    for module in model.modules():
        if isinstance(module, Stack):
            yield module
        elif isinstance(module, Target) and module.teacher is not None:
            yield from all_stacks(module.teacher)


def varying_stacks(model: nn.Module) -> Iterator[Stack]:
    """The stacks of an objective whose numbers of tokens vary with the masks."""
    if isinstance(model, Objective):
        for part in model.varying_parts:
            yield from all_stacks(part)

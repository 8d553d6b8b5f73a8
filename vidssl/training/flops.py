"""Model FLOPs of a step, and the published peak rates of accelerators."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidssl.model.cross_predictor import CrossBlock, CrossStack, MemoryAttention
from vidssl.model.heads import CrossAttention
from vidssl.model.queries import PositionMean
from vidssl.model.vit import Block, PatchEmbed, TransformerStack
from vidssl.objective.targets import Target

# Dense peaks in TFLOP/s by the vendors' data sheets (sparse figures halved), by words of the device's name:
# bf16 and fp16 with fp32 accumulation, tf32, and fp32 without tensor cores. The first match counts.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75}),
    ("H200 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H200", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    ("GH200", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    ("H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60}),
    ("H100 PCIe", {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51.2}),
    ("H100", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    ("H800 PCIe", {"bf16": 756.5, "fp16": 756.5, "tf32": 378, "fp32": 51.2}),
    ("H800", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    ("H20", {"bf16": 148, "fp16": 148, "tf32": 74, "fp32": 44}),
    ("A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("A800", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("A30", {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3}),
    ("A40", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    ("A10", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    ("RTX A6000", {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7}),
    ("L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    ("L40", {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5}),
    ("L4", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    ("T4", {"fp16": 65, "fp32": 8.1}),
    ("V100-SXM2", {"fp16": 125, "fp32": 15.7}),
    ("V100-PCIE", {"fp16": 112, "fp32": 14}),
    ("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("RTX 3090", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
    ("MI300X", {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
)


def published_peak(name: str, precision: str) -> float | None:
    """FLOP per second of a device by its name and the precision of matrix products (fp32, tf32, bf16, fp16);
    None if it is not known, as of a slice of a GPU (MIG)."""
    if re.search(r"\bMIG\b", name):
        return None
    for words, peaks in PEAKS:
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(words)}(?![A-Za-z0-9]| D\b| Ti\b| Laptop)", name):
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


class ModelFlops:
    """Adds up the FLOPs of matrix products of a model: 2 for each multiplication with a weight or of queries,
    keys and values, three times that where there are gradients.

    It counts what the model is called with, so the masks of each step count with the tokens that they keep.
    What activation checkpointing or an attention kernel computes again is not counted, nor is a network that
    the user gives as a file. Hooks of whole stacks
    count, outside of what is compiled.
    """

    def __init__(self, model: nn.Module):
        self.total = 0
        self.is_counting = False
        self._hook(model)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the calls in this context, from zero."""
        self.total = 0
        self.is_counting = True
        try:
            yield
        finally:
            self.is_counting = False

    def _hook(self, module: nn.Module) -> None:
        """Hooks the parts whose products are known as a whole, and every other linear layer."""
        counter_of = next((make for kind, make in COUNTED.items() if isinstance(module, kind)), None)
        if counter_of is None:
            teacher = module.teacher if isinstance(module, Target) else None
            for child in (*module.children(), *([] if teacher is None else [teacher])):
                self._hook(child)
            return
        count = counter_of(module)

        def add(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.is_counting:
                self.total += count(*args, **kwargs) * passes(module, args[0])

        module.register_forward_pre_hook(add, with_kwargs=True)


def passes(module: nn.Module, x: Tensor) -> int:
    """1 for the forward pass, and 1 more for each of the gradients of weights and of the input x."""
    if not torch.is_grad_enabled():
        return 1
    has_weight_gradients = any(p.requires_grad for p in module.parameters())
    # its inner inputs have gradients, whatever x has
    is_deep = isinstance(module, TransformerStack | CrossStack)
    return 1 + has_weight_gradients + (x.requires_grad or (is_deep and has_weight_gradients))


# Each of the following returns the counter of a module: a function of the arguments of its forward pass.


def stack_flops(stack: nn.Module) -> Callable[..., int]:
    assert isinstance(stack, TransformerStack)
    of_condition = 0
    weights = []  # (of queries, keys and values; of the projection; of the MLP) in each block
    for block in stack:
        assert isinstance(block, Block)
        of_condition += 0 if block.modulation is None else weights_of(block.modulation)
        weights.append((weights_of(block.attn.qkv), weights_of(block.attn.proj), weights_of(block.mlp)))

    def count(
        x: Tensor, rope: object, layers: object, num_outputs: int | None = None, **options: object
    ) -> int:
        """Of x [B, n, D]; the last block has num_outputs queries. Patterns of attention save nothing."""
        b, n, dim = x.shape
        total = 2 * b * of_condition
        for i, (qkv, proj, mlp) in enumerate(weights):
            queries = num_outputs if num_outputs is not None and i == len(weights) - 1 else n
            total += 2 * b * (n * qkv + queries * proj + 2 * queries * n * dim + queries * mlp)
        return total

    return count


def weights_of(module: nn.Module) -> int:
    """Number of weights of all linear layers in a module."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in layers)


def linear_flops(layer: nn.Module) -> Callable[[Tensor], int]:
    assert isinstance(layer, nn.Linear)
    outputs = layer.out_features
    return lambda x: 2 * x.numel() * outputs


def patch_flops(embed: nn.Module) -> Callable[[Tensor], int]:
    assert isinstance(embed, PatchEmbed)
    outputs = embed.proj.out_channels
    return lambda patches: 2 * patches.numel() * outputs


def cross_attention_flops(attention: nn.Module) -> Callable[[Tensor, Tensor], int]:
    assert isinstance(attention, CrossAttention)
    heads = attention.heads

    def count(query: Tensor, tokens: Tensor) -> int:
        """Of one query per sample and tokens [B, N, D]: products with the query's, key's and value's weights,
        and twice with the tokens."""
        b, n, dim = tokens.shape
        return 2 * b * (3 * dim * dim + 2 * heads * n * dim)

    return count


def cross_stack_flops(stack: nn.Module) -> Callable[..., int]:
    def count(x: Tensor, memories: Sequence[Tensor], ropes: object = None) -> int:
        """Of queries [B, n, D] and memories [B, m, ...]."""
        b, n, dim = x.shape
        total = 0
        for block, memory in zip(stack.children(), memories, strict=True):
            assert isinstance(block, CrossBlock)
            total += 2 * b * n * weights_of(block.mlp)
            for attention, m in ((block.cross, memory.shape[1]), (block.own, n)):
                if isinstance(attention, MemoryAttention):
                    of_query = weights_of(attention.q) + weights_of(attention.proj)
                    total += 2 * b * (n * of_query + m * weights_of(attention.kv) + 2 * n * m * dim)
        return total

    return count


def position_mean_flops(mean: nn.Module) -> Callable[[Tensor, Tensor, Tensor], int]:
    """Two products of hidden and visible tokens."""
    return lambda z, hidden, visible: 4 * hidden.numel() * visible.shape[2]


def conv_flops(layer: nn.Module) -> Callable[[Tensor], int]:
    assert isinstance(layer, nn.Conv3d)
    # a sharded weight (FSDP2) has its whole shape; a part of it would be asked of the other processes
    inputs = math.prod(layer.weight.shape[1:])
    # padding keeps the number of places
    return lambda x: 2 * x[:, 0].numel() * inputs * layer.out_channels


COUNTED: dict[type[nn.Module], Callable[[nn.Module], Callable[..., int]]] = {
    TransformerStack: stack_flops,
    PatchEmbed: patch_flops,
    CrossAttention: cross_attention_flops,
    CrossStack: cross_stack_flops,
    PositionMean: position_mean_flops,
    nn.Conv3d: conv_flops,
    nn.Linear: linear_flops,
}

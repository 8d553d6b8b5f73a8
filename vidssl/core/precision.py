"""The precision of matrix products: bf16 and TF32 where the device computes them in hardware."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

ResolvedPrecision = Literal["fp32", "bf16", "fp16"]
Precision = Literal[ResolvedPrecision, "auto"]

BF16_CAPABILITY = (8, 0)  # the first CUDA compute capability with bf16 in hardware: A100


def resolve_precision(precision: Precision) -> ResolvedPrecision:
    """`auto` is bf16 if every GPU of this machine computes it in hardware, else fp32."""
    if precision != "auto":
        return precision
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return "bf16" if capabilities and min(capabilities) >= BF16_CAPABILITY else "fp32"


def use_tf32() -> None:
    """On a GPU, f32 matrix products of this process round their inputs to TF32 (10 bits of mantissa)."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which matrix products are made in the type of their factors."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()

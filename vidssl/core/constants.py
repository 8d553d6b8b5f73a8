"""Small constant tensors, uploaded to a device once."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """`values` as a 1-D tensor on the device: the same one in each call, not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a small tensor from the host without waiting for the device; one of the device stays."""
    if tensor.device.type != "cpu":
        # there already, perhaps as cuda:0 of cuda
        return tensor.to(device)
    return (pin(tensor) if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pin(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, from which a device reads while the host goes on."""
    # an expanded tensor, whose elements share memory, cannot be pinned as it is
    return tensor.contiguous().pin_memory()

"""glibc's allocator on CPUs."""

import ctypes
import sys

import torch


def tune_malloc() -> bool:
    """Where tensors are on the CPU, freed memory stays with this process and those it forks -> is it so now?

    glibc gives large blocks back to the system as soon as they are free, and gets each page anew, zeroed, when the next
    tensor is written: up to a third of a step. Other C libraries are left as they are. Source: mallopt(3).
    """
    here = sys.platform == "linux" and not torch.cuda.is_available()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if here else None
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    if mallopt is None or not (mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)):
        return False  # older glibc takes 32 MB at most
    return bool(mallopt(trim_threshold, (1 << 31) - 1) and mallopt(top_pad, 1 << 26))

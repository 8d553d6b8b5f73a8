"""Tunes glibc's allocator for training on CPUs."""

import ctypes
import sys

import torch

from vidssl.core.io import raise_open_file_limit


def tune_malloc() -> bool:
    """On a CPU, stops glibc from returning freed memory to the system. Returns whether it took effect.

    By default glibc returns large blocks as soon as they are freed, and gets each page back, zeroed, when the
    next tensor is written: up to a third of the time of a step. Forked processes inherit the setting. Does
    nothing where tensors are on a GPU, or with another C library. Source: mallopt(3).
    """
    on_cpu = sys.platform == "linux" and not torch.cuda.is_available()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if on_cpu else None
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # numbers of the options in malloc.h
    if mallopt is None or not (mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)):
        return False  # older glibc accepts 32 MB at most
    return bool(mallopt(trim_threshold, (1 << 31) - 1) and mallopt(top_pad, 1 << 26))


def configure_process(threads: int | None, keeps_freed_memory: bool) -> None:
    """Sets limits of this process. threads: of torch on the CPU; None: torch's own choice.
    keeps_freed_memory: see tune_malloc."""
    raise_open_file_limit()
    if threads:
        torch.set_num_threads(threads)
    if keeps_freed_memory:
        tune_malloc()

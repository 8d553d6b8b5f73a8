"""How much of the machine a run uses: arithmetic done against what a matrix product reaches, and memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Hashable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode


class Meter:
    """Counts the arithmetic of a step once for each shape of a batch, and holds it against this device's own rate.

    FLOPs are those of matrix products, convolutions and attention, forward and backward, as torch counts them; what
    `efficiency.recompute` does twice counts twice. The rate is that of the fastest of a few square products in the
    precision of the run, measured when the meter is made.
    """

    def __init__(self, device: torch.device, precision: str):
        self.device = device
        self.counted: dict[Hashable, int] = {}  # FLOPs of this process's part of a step
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.rate = product_rate(device, dtype)  # FLOP a second

    @contextlib.contextmanager
    def counting(self, shape: Hashable) -> Iterator[bool]:
        """The first time that a shape comes, what is computed in here is counted -> whether it was known before."""
        if shape in self.counted:
            yield True
            return
        with FlopCounterMode(display=False) as counter:
            yield False
        self.counted[shape] = counter.get_total_flops()

    def used(self, shape: Hashable, seconds: float) -> float:
        """Share of the rate that a step of this shape reached in so many seconds (MFU)."""
        return self.counted[shape] / seconds / self.rate

    def memory(self) -> float:
        """Most bytes this process has held: of the accelerator, or resident where there is none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 4) -> float:
    """FLOP a second of a square matrix product, 1024 a side on a CPU, 8192 elsewhere; the best of some."""
    side = 1024 if device.type == "cpu" else 8192
    a, best = torch.ones(side, side, device=device, dtype=dtype), float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best

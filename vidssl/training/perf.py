"""How much of the machine a run uses: FLOPs relative to the rate of a matrix product, time and memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

TensorShape = tuple[int, ...]
T = TypeVar("T")


def attention_flops(
    query: TensorShape, key: TensorShape, value: TensorShape, *_: object, **__: object
) -> int:
    """FLOPs of q [B, H, N, d] k^T and of its product with v."""
    b, h, n, d = query
    return 2 * b * h * n * key[2] * (d + value[3])


def attention_backward_flops(
    grad: TensorShape, query: TensorShape, key: TensorShape, value: TensorShape, *_: object, **__: object
) -> int:
    """Five products: the scores once more, and the gradients of v, of the scores, of q and of k."""
    b, h, n, d = query
    return 2 * b * h * n * key[2] * (3 * d + 2 * value[3])


@contextlib.contextmanager
def count_flops() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the FLOPs of matrix products, convolutions and attention computed in
    this context, forward and backward.

    torch counts them, except (as of 2.14) attention on CPUs, which is added here.
    """
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with FlopCounterMode(
        display=False, custom_mapping={cpu: attention_flops, back: attention_backward_flops}
    ) as counter:
        yield counter.get_total_flops


class StepMeter:
    """Counts the arithmetic of a step once for each shape of a batch, and holds it against this device's own
    rate.

    What `efficiency.activation_checkpointing` does twice counts twice. The rate is that of the fastest of a
    few square products in the precision of the run, measured when the meter is made.
    """

    def __init__(self, device: torch.device, precision: str):
        self.device = device
        self.counted: dict[Hashable, int] = {}  # FLOPs of this process's part of a step
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.rate = matmul_rate(device, dtype)  # FLOP a second

    @contextlib.contextmanager
    def counting(self, shape: Hashable) -> Iterator[bool]:
        """Counts the FLOPs computed in this context the first time that `shape` is seen; yields whether it
        was known."""
        if shape in self.counted:
            yield True
            return
        with count_flops() as total:
            yield False
        self.counted[shape] = total()

    def used(self, shape: Hashable, seconds: float) -> float:
        """Share of the rate that a step of this shape reached in so many seconds."""
        return self.counted[shape] / seconds / self.rate


class Throughput:
    """Measures the training steps: clips per second, time spent waiting for data, memory and arithmetic."""

    def __init__(self, device: torch.device, precision: str, clips: int, counts_flops: bool):
        """clips: of a step, over all processes; counts_flops: also report the arithmetic of this process."""
        self.device = device
        self.clips = clips
        self.meter = StepMeter(device, precision) if counts_flops else None
        self.shape: Hashable = None
        self.is_counted = False
        self.start_s = 0.0
        self.wait_s = 0.0

    def timed(self, loader: Iterable[T]) -> Iterator[T]:
        """Yields what the loader yields. A step starts when the next batches are requested."""
        self.start_s = time.perf_counter()
        for batches in loader:
            self.wait_s = time.perf_counter() - self.start_s
            yield batches
            self.start_s = time.perf_counter()

    @contextlib.contextmanager
    def counting(self, shape: Hashable) -> Iterator[None]:
        """Context of the forward and backward passes of a step. shape: of its batches."""
        self.shape = shape
        with self.meter.counting(shape) if self.meter else contextlib.nullcontext(False) as self.is_counted:
            yield

    def row(self) -> dict[str, float]:
        """Call after the optimizer step, before measurements and checkpoints, which are not part of the step.

        clips_per_s; wait: fraction of the step spent waiting for the loader; memory: peak, bytes;
        matmul_utilization: arithmetic per second over the rate of a large matrix product (StepMeter), except
        in the first step of a shape, in which the arithmetic is counted.
        """
        seconds = time.perf_counter() - self.start_s
        row = {"clips_per_s": self.clips / seconds, "wait": self.wait_s / seconds}
        row["memory"] = peak_memory(self.device)
        if self.meter and self.is_counted:
            row["matmul_utilization"] = self.meter.used(self.shape, seconds)
        return row


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process, bytes: allocated on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 4) -> float:
    """FLOP per second of a square matrix product, 1024 a side on a CPU, 8192 elsewhere; the best of
    `repeats`."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best

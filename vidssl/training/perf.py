"""How much of the machine a run uses: arithmetic, time and memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vidssl.core.log import logger
from vidssl.training.distributed import Strategy
from vidssl.training.flops import ModelFlops, published_peak

ADVISED_STEPS = 100  # after which a run that waits for data says so
LONG_WAIT = 0.05  # fraction of a step
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


class Utilization:
    """Holds the model FLOPs of a step (flops.py) against what the device can compute.

    Where its published dense peak is known, the share of it is `mfu`, the model FLOPs utilization (Chowdhery
    et al. 2022, arXiv 2204.02311). Elsewhere it is `matmul_utilization`: the share of the fastest of a few
    square products of random numbers in the precision of the run, measured here.
    """

    def __init__(self, device: torch.device, precision: str, model: nn.Module):
        self.flops = ModelFlops(model)
        peak = None
        if device.type == "cuda":
            uses_tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
            peak = published_peak(torch.cuda.get_device_name(device), "tf32" if uses_tf32 else precision)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.name = "mfu" if peak else "matmul_utilization"
        self.rate = peak or matmul_rate(device, dtype)  # FLOP a second

    def row(self, flops: float, seconds: float) -> dict[str, float]:
        return {self.name: flops / seconds / self.rate}


class Throughput:
    """Measures the training steps: clips per second, time spent waiting for data, memory and arithmetic; and
    what is done beside the steps."""

    def __init__(
        self, strategy: Strategy, precision: str, clips: int, model: nn.Module, wait_advice: str = ""
    ):
        """clips: of a step, over all processes; model: whose arithmetic the first process reports of its own
        part; wait_advice: what helps a run that waits for data."""
        self.device = strategy.device
        self.clips = clips
        self.utilization = Utilization(self.device, precision, model) if strategy.is_main else None
        self.world = strategy.world if strategy.is_main else 1
        self.start_s = 0.0
        self.is_counted = True  # the present step, in the next row
        self._start_row()
        self.beside_s: dict[str, float] = {}
        self.is_main = strategy.is_main
        self.wait_advice = wait_advice
        self.has_started = False
        self.has_advised = False
        self.steps = 0  # whose time is in the sums, the first row left out: workers start in it
        self.sum_s = 0.0
        self.sum_wait_s = 0.0

    def _start_row(self) -> None:
        """Of the steps since the last row: their number, seconds, seconds of waiting, FLOPs of this process,
        and events on the GPU before and after each prefetch."""
        self.row_steps = 0
        self.row_s = 0.0
        self.wait_s = 0.0
        self.row_flops = 0
        self.prefetches: list[list[torch.cuda.Event]] = []

    def timed(self, loader: Iterable[T]) -> Iterator[T]:
        """Yields what the loader yields. A step starts when the next batches are requested."""
        self.start_s = time.perf_counter()
        for batches in loader:
            self.wait_s += time.perf_counter() - self.start_s
            self.is_counted = False
            yield batches
            if not self.is_counted:
                self._count_step()
            self.start_s = time.perf_counter()
            if self.steps >= ADVISED_STEPS and not self.has_advised:
                self.has_advised = True
                if self.wait_share > LONG_WAIT:
                    self._log_wait()
        if self.steps > ADVISED_STEPS:
            self._log_wait()

    def _count_step(self) -> None:
        """Called when a step ends."""
        self.is_counted = True
        self.row_steps += 1
        self.row_s += time.perf_counter() - self.start_s
        if self.utilization:
            self.row_flops += self.utilization.flops.total

    @property
    def wait_share(self) -> float:
        """Fraction of the steps so far that was spent waiting for data."""
        return self.sum_wait_s / self.sum_s if self.sum_s else 0.0

    def _log_wait(self) -> None:
        if self.is_main:
            advice = f": {self.wait_advice}" if self.wait_share > LONG_WAIT and self.wait_advice else ""
            logger.info(f"{self.wait_share:.0%} of {self.steps} steps went to waiting for data{advice}")

    def overlap(self, prefetch: Callable[[], None]) -> None:
        """Makes the next step's input while a GPU computes. The time for which the GPU has nothing to compute
        meanwhile counts as waiting."""
        before = self._mark()
        prefetch()
        self.prefetches.append([*before, *self._mark()])

    def _mark(self) -> list[torch.cuda.Event]:
        """An event on the GPU that tells when its work up to here was done; none without a GPU."""
        if self.device.type != "cuda":
            return []
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return [event]

    def counting(self) -> contextlib.AbstractContextManager[None]:
        """Context of the forward and backward passes of a step."""
        return self.utilization.flops.counting() if self.utilization else contextlib.nullcontext()

    def beside(self, name: str, action: Callable[..., None], *args: Any) -> None:
        """Calls action(*args) after a step's row is written; its seconds are NAME_s in the next row."""
        start_s = time.perf_counter()
        action(*args)
        self.beside_s[f"{name}_s"] = time.perf_counter() - start_s

    def row(self) -> dict[str, float]:
        """Of the steps since the last call, means over them. Call after the optimizer step, before
        measurements and checkpoints, which are not part of a step, and after the metrics were read.

        clips_per_s; wait: fraction of a step spent waiting for the loader; memory: peak, bytes; flops:
        model FLOPs of a step, over all processes; mfu or matmul_utilization: see Utilization; save_s:
        seconds that a checkpoint took after the previous row.
        """
        if not self.is_counted:
            self._count_step()
        seconds = self.row_s
        for events in filter(None, self.prefetches):
            before, after = events
            self.wait_s += before.elapsed_time(after) / 1000
        if self.has_started:
            self.steps += self.row_steps
            self.sum_s += seconds
            self.sum_wait_s += self.wait_s
        self.has_started = True
        row = {"clips_per_s": self.row_steps * self.clips / seconds, "wait": self.wait_s / seconds}
        row["memory"] = peak_memory(self.device)
        if self.utilization:
            row["flops"] = self.row_flops // self.row_steps * self.world
            row |= self.utilization.row(self.row_flops, seconds)
        row |= self.beside_s
        self.beside_s = {}
        self._start_row()
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
    # The power that a product of constants draws, and so the clock, is not that of a real one.
    a = torch.randn(side, side, device=device).to(dtype)
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

"""Copies between host and device that the host does not wait for. On a CPU nothing is copied or pinned."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from vidssl.core.constants import upload

T = TypeVar("T")


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yields each item after the next one has been requested, so that its copy is under way meanwhile."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def in_order(tensors: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Copies tensors to the device in the order of its work, so that their memory does not add up there. At
    most two are pinned."""
    events: deque[torch.cuda.Event] = deque()
    for tensor in tensors:
        if device.type != "cuda":
            yield tensor.to(device)
            continue
        if len(events) == 2:
            events.popleft().synchronize()
        copy = upload(tensor, device)
        events.append(torch.cuda.current_stream(device).record_event())
        yield copy


class Copy(Generic[T]):
    """A tensor that is being copied from one device to another, and what it belongs to."""

    def __init__(self, label: T, tensor: Tensor, event: torch.cuda.Event | None):
        self.label = label
        self.tensor = tensor
        self.event = event

    def on_device(self) -> Tensor:
        """The tensor, for kernels of the current stream: the device waits, the host does not."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.event)
            self.tensor.record_stream(stream)
        return self.tensor

    def on_host(self) -> Tensor:
        """The tensor, once it has arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


def uploads(items: Iterable[tuple[T, Tensor]], device: torch.device) -> Iterator[Copy[T]]:
    """Copies tensors to the device, one ahead and beside what it computes. Pinned ones are not waited for."""
    if device.type != "cuda":
        yield from (Copy(label, tensor.to(device), None) for label, tensor in items)
        return
    stream = torch.cuda.Stream(device)

    def start(label: T, tensor: Tensor) -> Copy[T]:
        with torch.cuda.stream(stream):
            return Copy(label, tensor.to(device, non_blocking=True), stream.record_event())

    yield from one_ahead(start(label, tensor) for label, tensor in items)


def downloads(items: Iterable[tuple[T, Tensor]], device: torch.device) -> Iterator[Copy[T]]:
    """Copies tensors from the device to the host; the device goes on with the next one meanwhile."""
    if device.type != "cuda":
        yield from (Copy(label, tensor.cpu(), None) for label, tensor in items)
        return

    def start(label: T, tensor: Tensor) -> Copy[T]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return Copy(label, host, torch.cuda.current_stream(device).record_event())

    yield from one_ahead(start(label, tensor) for label, tensor in items)

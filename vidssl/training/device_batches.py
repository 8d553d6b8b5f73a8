"""The input of a step, put on the device while it computes the step before.

On a GPU the clips of the next step are copied on a side stream and its masks are drawn on the host after the
backward pass of this step was launched, before the host waits for its loss. On a CPU nothing is ahead.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vidssl.core.errors import Preempted
from vidssl.core.rng import KeyedRNG
from vidssl.data.loader import Batch
from vidssl.training.micro_batches import MicroBatch

# Maps what the loader yields for a stream to a Batch whose video is on the device. It runs on the side stream
# and must not wait for the device; sources other than finished clips are a function of this kind.
ToDevice = Callable[[Any], Batch]


def copy_video(device: torch.device) -> ToDevice:
    """Copies the video of a Batch; from pinned memory without waiting."""
    return lambda batch: batch._replace(video=batch.video.to(device, non_blocking=True))


class StepInput(NamedTuple):
    """What a step computes."""

    batches: list[Batch]  # one of each stream, the videos on the device, positions on the host
    parts: list[MicroBatch]


class DeviceBatches:
    """Iterates over the inputs of the steps start, start + 1, ..."""

    def __init__(
        self,
        loader: Iterable[list[Any]],
        start: int,
        device: torch.device,
        make_parts: Callable[[int, list[Batch]], list[MicroBatch]],
        to_device: ToDevice | None = None,
    ):
        """loader: yields what `to_device` takes (default: copy_video), one of each stream a step; make_parts:
        maps a step and its batches to micro-batches (PartMaker)."""
        self.loader = iter(loader)
        self.step = start
        self.device = device
        self.make_parts = make_parts
        self.to_device = to_device or copy_video(device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: StepInput | BaseException | None = None  # of the next step; an error is raised there
        if self.side is not None:
            # what `to_device` reads may have been made on the current stream
            self.side.wait_stream(torch.cuda.current_stream(device))

    def __iter__(self) -> Iterator[StepInput]:
        return self

    def prefetch(self) -> None:
        """Starts the copies of the next step and draws its masks. Call it once this step's work is launched;
        does nothing on a CPU."""
        if self.side is None or self.ahead is not None:
            return
        try:
            with torch.cuda.stream(self.side):
                self.ahead = self._load()
        except StopIteration:
            pass  # __next__ finds the same
        except (Exception, Preempted) as e:  # noqa: BLE001 -- __next__ raises it, when this step has ended
            self.ahead = e

    def __next__(self) -> StepInput:
        self.prefetch()
        ready, self.ahead = self.ahead, None
        if isinstance(ready, BaseException):
            raise ready
        if self.side is None:
            return self._load()
        if ready is None:
            raise StopIteration
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.side)
        for tensor in tensors_of(ready):
            # the memory belongs to the side stream, which must not reuse it before this stream has read it
            tensor.record_stream(current)
        return ready

    def _load(self) -> StepInput:
        batches = [self.to_device(batch) for batch in next(self.loader)]
        parts = self.make_parts(self.step, batches)
        self.step += 1
        return StepInput(batches, parts)


def tensors_of(ready: StepInput) -> list[Tensor]:
    """All tensors on a GPU in the input of a step."""
    found = []
    for leaf in tree_leaves(ready):
        values = vars(leaf).values() if isinstance(leaf, KeyedRNG) else [leaf]
        found += [value for value in values if isinstance(value, Tensor) and value.is_cuda]
    return found

"""The processes of an evaluation. Each computes the features of a part of the samples and trains heads on its
part of every batch; gradients, predictions and statistics are summed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vidssl.core.errors import UserError, disk_error_line
from vidssl.data.dataset import do_nothing

T = TypeVar("T")


class Processes(NamedTuple):
    """The processes as one of them sees them."""

    rank: int = 0
    number: int = 1  # of processes
    device: torch.device = torch.device("cpu")  # of collectives
    # called by every process before it meets the others in a collective, after work of any length
    wait: Callable[[], None] = do_nothing

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of range(count)."""
        return range(self.rank, count, self.number)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on the tensor's device. Call it after work of any length."""
        if self.number == 1:
            return tensor
        self.wait()
        total = tensor.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(tensor.device)

    def sum_gradients(self, models: Iterable[nn.Module]) -> None:
        """Adds up the gradients of all processes in place; one that is missing is zero."""
        if self.number == 1:
            return
        parameters = [parameter for model in models for parameter in model.parameters()]
        pending = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pending.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
        for work in pending:
            assert work is not None
            work.wait()

    def assemble(self, part: Tensor, positions: Sequence[int], count: int) -> Tensor:
        """Puts together the parts [a, n, C] of all processes as [a, count, C]; `positions` are those of this
        process's n rows."""
        if self.number == 1:
            return part
        whole = part.new_zeros(part.shape[0], count, part.shape[2])
        whole[:, list(positions)] = part
        return self.sum(whole)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order. Call it after work of any length."""
        if self.number == 1:
            return [value]
        self.wait()
        values: list[Any] = [None] * self.number
        torch.distributed.all_gather_object(values, value)
        return values

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` in the first process. Returns its (picklable) result, or raises its UserError,
        also for an error of the disk, in all. Call it after work of any length."""
        if self.number == 1:
            return function()
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = function()
            except UserError as e:
                result[1] = str(e)
            except OSError as e:
                result[1] = disk_error_line(e) or str(e)
        self.wait()
        torch.distributed.broadcast_object_list(result, device=self.device)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]


ONE_PROCESS = Processes()


def processes_of(accelerator: Accelerator, wait: Callable[[], None] = do_nothing) -> Processes:
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device, wait)

"""Clips that the processes of a run share among them, and sums over the clips of all."""

from collections.abc import Callable

import torch
from torch import Tensor

from vidssl.core.spectrum import MAX_TOKENS, gram_roots, singular_values


class ClipShare:
    """The place of a process: its clip k is clip k * world + rank of all."""

    def __init__(self, rank: int = 0, world: int = 1, reduce: Callable[[Tensor], Tensor] = lambda t: t):
        """world: number of processes; reduce: sums a tensor over them, collectively."""
        self.rank = rank
        self.world = world
        self.reduce = reduce

    def of(self, clips: int) -> int:
        """The clips of each process, of so many; at least one, and the same number in all."""
        return -(-clips // self.world)

    def mean(self, values: Tensor) -> Tensor:
        """The mean [...] over the clips of all processes, of values [b, ...] of the own ones."""
        total = torch.cat([values.sum(0).flatten(), values.new_tensor([len(values)])])
        total = self.reduce(total)
        return (total[:-1] / total[-1]).view(values.shape[1:])

    def count(self, clips: int) -> int:
        """The number of clips of all processes. clips: of this one."""
        return int(self.reduce(torch.tensor(clips)))

    def singular_values(self, x: Tensor) -> Tensor:
        """`singular_values` of the rows x [b, ..., D] of all clips."""
        if self.world == 1:
            return singular_values(x)
        rows = x.flatten(1, -2)
        tokens = rows.shape[1]
        total = self.count(len(x)) * tokens
        every = -(-total // MAX_TOKENS)
        clip = torch.arange(len(x), device=x.device) * self.world + self.rank
        place = clip[:, None] * tokens + torch.arange(tokens, device=x.device)
        chosen = rows[place % every == 0].double()
        return gram_roots(self.reduce(chosen.T @ chosen))[: -(-total // every)]

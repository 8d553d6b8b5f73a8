"""Sums, gathers and statistics over the clips of all processes, with gradients.

A loss that compares clips is computed by every process from what these functions return, so all processes
have the loss of the global batch. The backward pass of a sum adds the gradients of all processes, which is
their number times the gradient of that one loss; the mean that DDP and FSDP take over processes divides by
it. Without a process group all of them are the identity, or local.
"""

from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import Function


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sum(Function):
    """All-reduce whose gradient is all-reduced, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Sum.apply(gradient)


def sum_over_processes(x: Tensor) -> Tensor:
    return x if process_count() == 1 else _Sum.apply(x)


def mean_over_processes(x: Tensor) -> Tensor:
    return sum_over_processes(x) / process_count()


@torch.no_grad()
def max_over_processes(x: Tensor) -> Tensor:
    """Returns the largest of each element of x, without gradients."""
    x = x.clone(memory_format=torch.contiguous_format)
    if process_count() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather_clips(x: Tensor, dim: int = 0) -> Tensor:
    """Joins x [..., B, ...] of all W processes along `dim`, [..., B * W, ...], in the order of the clips'
    positions: process r holds the clips r, r + W, r + 2 W, ... of the global batch."""
    world = process_count()
    if world == 1:
        return x
    x = x.movedim(dim, 0)
    spread = torch.stack([x if rank == dist.get_rank() else torch.zeros_like(x) for rank in range(world)], 1)
    return rearrange(sum_over_processes(spread), "b w ... -> (b w) ...").movedim(0, dim)


def own_clips(n: int, device: torch.device) -> Tensor:
    """i64 [n]: where in `gather_clips` the n clips of this process are."""
    rank = dist.get_rank() if process_count() > 1 else 0
    return torch.arange(n, device=device) * process_count() + rank


@torch.no_grad()
def sinkhorn(logits: Tensor, iterations: int = 3, eps: float = 1e-8) -> Tensor:
    """Assigns the clips (or tokens) of all processes evenly to clusters: [..., B, K] to probabilities of the
    same shape that sum to 1 over K, and over all B * W rows to nearly B * W / K.

    logits: scores divided by the temperature (SwAV, arXiv 2006.09882, section 3.1; CAPI), or logarithms of
    probabilities (MSN, src/losses.py). eps: added to every sum, as in CAPI; MSN, SwAV and iBOT add nothing,
    which differs where a cluster or row has no weight at all.
    """
    # A factor on a cluster's column cancels in the first division.
    q = (logits.float() - max_over_processes(logits.float().amax(-2, keepdim=True))).exp()
    for _ in range(iterations):
        q = q / (sum_over_processes(q.sum(-2, keepdim=True)) + eps)
        q = q / (q.sum(-1, keepdim=True) + eps)
    return q


class GlobalBatchNorm(nn.Module):
    """Batch normalisation of x [n, K] by the statistics of all processes, in f32.

    Always of the batch at hand: the heads that use it are not evaluated, so no running statistics are kept.
    """

    couples_clips = True

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x - mean_over_processes(x.mean(0))
        x = x * (mean_over_processes(x.square().mean(0)) + self.eps).rsqrt()
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias

"""What compares the clips of a batch has the value and the gradients of the global batch on any number of
processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked_world import fork_world, set_rank
from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.objective.embedding_losses import (
    covariance,
    entropy_gap,
    koleo,
    random_directions,
    sigreg,
    variance_hinge,
)
from vidssl.objective.global_batch import GlobalBatchNorm, gather_clips, own_clips, sinkhorn
from vidssl.objective.pair_losses import NCE, ClusterCrossEntropy

VIEWS, CLIPS, WIDTH = 2, 8, 6
PAIRS = [(0, 1), (1, 0)]
CLUSTERS = nn.Parameter(torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)))


def norm_then_square(x: Tensor) -> Tensor:
    return GlobalBatchNorm(WIDTH)(x.flatten(0, 1)).unflatten(0, x.shape[:2]).pow(3).mean()


def clusters(assign: str, x: Tensor) -> Tensor:
    cosines = F.normalize(x, dim=-1) @ CLUSTERS.T
    return ClusterCrossEntropy(5, assign=assign)(cosines, cosines, PAIRS)  # type: ignore[arg-type]


LOSSES = {
    "sigreg": lambda x: sigreg(x, random_directions(KeyedRNG(0, 3, torch.arange(x.shape[1])), WIDTH, 16)),
    "variance": variance_hinge,
    "covariance": covariance,
    "koleo": koleo,
    "me_max": lambda x: entropy_gap(x.softmax(-1)),
    "nce": lambda x: NCE(0.2)(x, x, PAIRS),
    "nt_xent": lambda x: NCE(0.2, own_view=True)(x, x, PAIRS),
    "centred": lambda x: clusters("centred", x),
    "sinkhorn": lambda x: clusters("sinkhorn", x),
    "batch norm": norm_then_square,
}


def value_and_gradient(name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a loss of x @ weight, as the mean over processes, which DDP takes."""
    weight = weight.clone().requires_grad_()
    loss = LOSSES[name](0.3 * x @ weight)
    found = [loss.detach(), torch.autograd.grad(loss, weight)[0]]
    if dist.is_initialized():
        for value in found:
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return found[0], found[1]


def test_losses_and_gradients_are_those_of_the_global_batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(VIEWS, CLIPS, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    want = {name: value_and_gradient(name, x, weight) for name in LOSSES}
    logits = 5 * torch.randn(CLIPS, 4, generator=generator)
    assigned = sinkhorn(logits)

    def one_process(rank: int, port: int) -> None:
        torch.set_num_threads(1)
        set_rank(4, rank, port)
        dist.init_process_group("gloo")
        own = slice(rank, None, 4)
        assert torch.equal(gather_clips(x[:, own], dim=1), x)
        assert torch.equal(x[0, own_clips(2, x.device)], x[0, own])
        torch.testing.assert_close(sinkhorn(logits[own]), assigned[own])
        for name, expected in want.items():
            found = value_and_gradient(name, x[:, own], weight)
            for got, one in zip(found, expected, strict=True):
                assert torch.allclose(got, one, rtol=1e-4, atol=1e-5), name

    fork_world(4, one_process)


def test_sinkhorn_spreads_clips_evenly():
    torch.manual_seed(0)
    assigned = sinkhorn(3 * torch.randn(3, 12, 4), 30)
    torch.testing.assert_close(assigned.sum(-1), torch.ones(3, 12))
    torch.testing.assert_close(assigned.sum(-2), torch.full((3, 4), 3.0), rtol=1e-3, atol=0)


def test_global_batch_norm_is_torch_s_batch_norm():
    x = torch.randn(10, WIDTH)
    torch.testing.assert_close(GlobalBatchNorm(WIDTH)(x), nn.BatchNorm1d(WIDTH)(x))

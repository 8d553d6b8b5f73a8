"""Losses of a set of embeddings [V, B, K]: V views of B clips, of which the global batch has B * W on W
processes. They keep embeddings apart, so that agreement alone cannot make them all equal.

All compute in f32 and have the value of the global batch on every process.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vidssl.core.precision import without_autocast
from vidssl.core.rng import KeyedRNG, box_muller
from vidssl.objective.global_batch import (
    gather_clips,
    mean_over_processes,
    process_count,
    sum_over_processes,
)

MAX_ANGLES = (
    2**24
)  # of projections of many tokens, at once; more are made in parts, and again for the gradients


def random_directions(rng: KeyedRNG, width: int, count: int) -> Tensor:
    """f32 [width, count]: directions, uniform on the sphere, of this step; the same on every process."""
    return F.normalize(box_muller(rng.shared(2, width, count)), dim=0)


def sigreg(embeddings: Tensor, directions: Tensor, points: int = 17, largest: float = 3.0) -> Tensor:
    """SIGReg: how far the embeddings of each view [V, B, K] are from N(0, I), the mean over views.

    directions: [K, S], of length 1. The Epps-Pulley statistic of every projection: the squared difference of
    empirical and normal characteristic function at `points` points 0..`largest`, integrated over
    -largest..largest with the normal density as weight, times the number of clips of the global batch. For
    samples of N(0, I) it is near 1.05, for a constant 0 it is 0.402 times the clips. Source: LeJEPA
    (arXiv 2511.08544; lejepa, univariate/epps_pulley.py) and LeVJEPA (arXiv 2608.27395).
    """
    t = torch.linspace(0, largest, points, device=embeddings.device)
    normal = (-t.square() / 2).exp()
    weights = 2 * largest / (points - 1) * normal
    weights[0] /= 2
    weights[-1] /= 2
    per_view = []
    with without_autocast(embeddings.device):
        for x in embeddings.float():
            both = mean_over_processes(characteristic_function(x @ directions, t))
            error = (both[0] - normal).square() + both[1].square()
            per_view.append((error @ weights).mean())
    return torch.stack(per_view).mean() * (embeddings.shape[1] * process_count())


def characteristic_function(x: Tensor, t: Tensor) -> Tensor:
    """Real and imaginary part f32 [2, S, points] of the mean of exp(i x t) over the rows of x [B, S]."""

    def of(part: Tensor) -> Tensor:
        angles = part[..., None] * t  # [B, S, points]
        return torch.stack([angles.cos().mean(0), angles.sin().mean(0)])

    at_once = max(1, MAX_ANGLES // (len(x) * len(t)))
    if at_once >= x.shape[1]:
        return of(x)
    return torch.cat(
        [checkpoint(of, part, use_reentrant=False, preserve_rng_state=False) for part in x.split(at_once, 1)],
        1,
    )


def centred_over_clips(embeddings: Tensor) -> tuple[Tensor, int]:
    """f32 [V, B, K] less the mean over the clips of all processes, and their number."""
    x = embeddings.float()
    return x - mean_over_processes(x.mean(1, keepdim=True)), x.shape[1] * process_count()


def variance_hinge(embeddings: Tensor, eps: float = 1e-4) -> Tensor:
    """Mean of relu(1 - standard deviation) over the dimensions and views of [V, B, K].

    Source: VICReg (arXiv 2105.04906, eq. 1; main_vicreg.py), whose std_loss of two views this is.
    """
    x, clips = centred_over_clips(embeddings)
    variance = sum_over_processes(x.square().sum(1)) / (clips - 1)
    return F.relu(1 - (variance + eps).sqrt()).mean()


def covariance(embeddings: Tensor) -> Tensor:
    """Sum of squared covariances of different dimensions, divided by their number K, summed over the views of
    [V, B, K]. Source: VICReg (arXiv 2105.04906, eq. 3; main_vicreg.py, cov_loss)."""
    x, clips = centred_over_clips(embeddings)
    with without_autocast(x.device):
        squares = (sum_over_processes(x.mT @ x) / (clips - 1)).square()
    return (squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)).sum() / x.shape[2]


def koleo(embeddings: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean of -log(distance to the nearest other clip) of L2-normalised embeddings, each view [V, B, K] by
    itself: spreads them over the sphere.

    Source: Sablayrolles et al. (arXiv 1806.03198) as in DINOv2 (dinov2/loss/koleo_loss.py), which looks for
    neighbours on one GPU; here in the global batch.
    """
    x = F.normalize(gather_clips(embeddings.float(), dim=1), dim=-1, eps=eps)
    with torch.no_grad(), without_autocast(x.device):
        dots = x @ x.mT
        dots.diagonal(dim1=1, dim2=2).fill_(-1)
        nearest = dots.argmax(-1)
    neighbours = x.gather(1, nearest[..., None].expand_as(x))
    return -(F.pairwise_distance(x, neighbours, eps=eps) + eps).log().mean()


def entropy_gap(probabilities: Tensor) -> Tensor:
    """log K minus the entropy of the mean of probabilities [..., K] over all clips, views and processes: 0
    where clusters are used evenly. Source: MSN (arXiv 2204.07141, section 3, "mean entropy maximization";
    src/losses.py)."""
    mean = mean_over_processes(probabilities.float().flatten(0, -2).mean(0))
    return math.log(len(mean)) + torch.xlogy(mean, mean).sum()

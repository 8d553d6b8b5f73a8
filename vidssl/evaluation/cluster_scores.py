"""Scores of features without labels, from their clusters and neighbours: cluster learnability and TwoNN.

The two halves of CLID (Lu et al. 2022, arXiv 2206.01251): how well a neighbour classifier predicts k-means
clusters of the features themselves, and their intrinsic dimension. Here k is the root of the number of
samples, and the dimension is that of TwoNN (Facco et al. 2017).
"""

import math

import torch
from torch import Tensor

ITERATIONS = 50  # of Lloyd's algorithm, at most
MAX_ROWS = 2048  # of which distances are computed, evenly spaced


def cluster_scores(x: Tensor) -> dict[str, float]:
    """`learnability` and `dimension` of features x [n, D], of at most MAX_ROWS evenly spaced rows."""
    rows = x[:: -(-len(x) // MAX_ROWS)].double()
    return {"learnability": cluster_learnability(rows), "dimension": intrinsic_dimension(rows)}


def kmeans(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Clusters i64 [n] of x [n, D]: Lloyd's algorithm from k-means++ seeds."""
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centres) < clusters:
        distance = torch.cdist(x, centres).amin(1).square()
        if not distance.any():  # fewer different rows than clusters
            break
        centres = torch.cat([centres, x[torch.multinomial(distance, 1, generator=generator)]])
    labels = torch.cdist(x, centres).argmin(1)
    for _ in range(ITERATIONS):
        members = torch.nn.functional.one_hot(labels, len(centres)).to(x.dtype)
        count = members.sum(0).unsqueeze(1)
        # a cluster without members keeps its centre
        centres = torch.where(count > 0, members.T @ x / count.clamp_min(1), centres)
        previous, labels = labels, torch.cdist(x, centres).argmin(1)
        if torch.equal(previous, labels):
            break
    return labels


def cluster_learnability(x: Tensor, seed: int = 0) -> float:
    """Share of the rows of x [n, D] whose k-means cluster is that of the nearest row before it, in random
    order."""
    generator = torch.Generator().manual_seed(seed)
    x = x[torch.randperm(len(x), generator=generator)]
    labels = kmeans(x, max(2, round(math.sqrt(len(x)))), generator)
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu()
    nearest = torch.cdist(x, x).masked_fill(later, torch.inf)[1:].argmin(1)
    return float((labels[1:] == labels[nearest]).double().mean())


def intrinsic_dimension(x: Tensor) -> float:
    """TwoNN estimate of x [n, D]: n over the sum of log(r2 / r1), the distances to the two nearest other
    rows; nan if fewer than three rows differ. Rows that occur twice are left out."""
    # matrix products would leave a small distance between equal rows
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.fill_diagonal_(torch.inf).topk(2, largest=False).values
    ratios = (nearest[:, 1] / nearest[:, 0])[nearest[:, 0] > 0]
    total = float(ratios.log().sum())
    return len(ratios) / total if total > 0 else math.nan

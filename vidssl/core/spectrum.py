"""Scores of a feature matrix's spectrum: RankMe and alpha-ReQ."""

import torch
from torch import Tensor

MAX_TOKENS = 4096  # at most, of which the singular values are


def singular_values(x: Tensor) -> Tensor:
    """[..., D] -> f32 [min(n, D)], of at most TOKENS rows, evenly taken; nan where they cannot be found."""
    rows = x.flatten(0, -2)
    rows = rows[:: -(-len(rows) // MAX_TOKENS)]
    if not rows.isfinite().all():
        return rows.new_full((min(rows.shape),), torch.nan)
    return torch.linalg.svdvals(rows)


def rankme(values: Tensor) -> float:
    """RankMe of singular values."""
    p = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def alpha_req(values: Tensor) -> float:
    """alpha-ReQ of singular values: minus the slope of log eigenvalue over log index."""
    first, last = min(10, len(values) // 4), max(len(values) // 2, 3)
    index = torch.arange(first + 1, last + 1, device=values.device).float().log()
    height = 2 * values[first:last].clamp_min(1e-12).log()
    index, height = index - index.mean(), height - height.mean()
    return float(-(index * height).sum() / index.square().sum().clamp_min(1e-12))

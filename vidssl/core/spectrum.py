"""Scores of the spectrum of a feature matrix: RankMe and alpha-ReQ."""

import torch
from torch import Tensor

MAX_TOKENS = 4096  # rows of which the singular values are computed, at most


def singular_values(x: Tensor) -> Tensor:
    """f32 [min(n, D)], descending, of at most MAX_TOKENS evenly spaced rows of x [..., D]; nan if x is not
    finite or its eigenvalues are not found.

    They are the roots of the eigenvalues of the smaller Gram matrix, in f64: exact to about 1e-8 of the
    largest, and several times faster than a singular value decomposition.
    """
    rows = x.flatten(0, -2)
    rows = rows[:: -(-len(rows) // MAX_TOKENS)].double()
    tall = len(rows) >= rows.shape[1]
    return gram_roots(rows.T @ rows if tall else rows @ rows.T)


def gram_roots(gram: Tensor) -> Tensor:
    """The singular values f32 [n], descending, of a matrix by its Gram matrix f64 [n, n]; nan if that is not
    finite or its eigenvalues are not found."""
    missing = gram.new_full((len(gram),), torch.nan, dtype=torch.float32)
    if not gram.isfinite().all():
        return missing
    try:
        eigenvalues = torch.linalg.eigvalsh(gram)
    except torch.linalg.LinAlgError:
        return missing
    return eigenvalues.clamp_min(0).sqrt().flip(0).float()


def rankme(values: Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885) of singular values: exp of the entropy of their
    shares."""
    p = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def alpha_req(values: Tensor) -> float:
    """alpha-ReQ (Agrawal et al. 2022) of singular values: minus the slope of log eigenvalue over log
    index."""
    first = min(10, len(values) // 4)
    last = min(len(values), max(len(values) // 2, 3))
    log_index = torch.arange(first + 1, last + 1, device=values.device).float().log()
    log_eigenvalue = 2 * values[first:last].clamp_min(1e-12).log()
    log_index = log_index - log_index.mean()
    log_eigenvalue = log_eigenvalue - log_eigenvalue.mean()
    return float(-(log_index * log_eigenvalue).sum() / log_index.square().sum().clamp_min(1e-12))

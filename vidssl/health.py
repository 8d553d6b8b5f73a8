"""How the representation is doing: its spread over clips and over time, and its effective rank."""

import torch
from torch import Tensor


@torch.no_grad()
def spread(features: Tensor, slices: int) -> dict[str, float]:
    """features [B, N, D] (N = slices * places, time first) -> figures that go to 0 (rank: to 1) in a collapse.

    std_clips: deviation over clips at a token, std_time: deviation over time within a clip after the mean over clips
    (the positions' share) is taken off; both relative to the features' root mean square, averaged over channels.
    rank: RankMe (Garrido et al. 2023, arXiv 2210.02885), exp of the entropy of the singular values, of the tokens.
    """
    x = features.float().unflatten(1, (slices, -1))
    rms = x.square().mean().sqrt()
    free = x - x.mean(0)
    values = torch.linalg.svdvals(free.flatten(0, 2)[:: max(1, free[..., 0].numel() // 4096)])
    p = values / values.sum() + 1e-7
    return {
        "std_clips": float(free.square().mean().sqrt() / rms),
        "std_time": float(free.std(1).square().mean().sqrt() / rms) if slices > 1 else 0.0,
        "rank": float(torch.exp(-(p * p.log()).sum())),
    }

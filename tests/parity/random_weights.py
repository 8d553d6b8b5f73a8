"""Random weights for models under comparison."""

import torch
from torch import nn


def randomise(model: nn.Module, seed: int) -> None:
    """Draws every parameter, so that no zero hides a term; outputs stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            draw = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * draw)
            else:
                p.copy_(draw * (p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.2))

"""Errors: how a prediction is compared with its target."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ErrorFunction = Callable[[Tensor, Tensor], Tensor]  # prediction and target [B, M, Nt, K] to [B, M, Nt]

ERRORS: dict[str, Callable[..., ErrorFunction]] = {
    "l1": lambda: lambda pred, target: (pred - target).abs().mean(-1),
    "l2": lambda: lambda pred, target: F.mse_loss(pred, target, reduction="none").mean(-1),
    "smooth_l1": lambda: lambda pred, target: F.smooth_l1_loss(pred, target, reduction="none").mean(-1),
}

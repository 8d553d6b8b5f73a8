"""The formula: method = mask x target x query x predictor x error.

loss = mean over masks m of  weighted_mean error( predictor(encoder(video, m.context), m, query),
                                                  take(target(video), m.target) )
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vidssl.draws import Draws
from vidssl.model.grid import Grid, Mask, take
from vidssl.model.vit import Encoder

ERRORS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {  # [B, M, Nt, K] x 2 -> [B, M, Nt]
    "l1": lambda: lambda got, want: (got - want).abs().mean(-1),
    "l2": lambda: lambda got, want: (got - want).square().mean(-1),
}


class Objective(nn.Module):
    """(video f32 [B, 3, T, H, W], draws) -> {"loss": scalar, and parts for the log}. The module Accelerate prepares."""

    def __init__(
        self,
        encoder: Encoder,
        mask: Callable[[Tensor, Grid, Draws], list[Mask]],
        target: nn.Module,
        query: nn.Module,
        predictor: nn.Module,
        error: Callable[[Tensor, Tensor], Tensor],
    ):
        super().__init__()
        self.encoder, self.mask, self.target = encoder, mask, target
        self.query, self.predictor, self.error = query, predictor, error

    def forward(self, video: Tensor, draws: Draws) -> dict[str, Tensor]:
        want_all = self.target(video)  # [B, N, K]
        masks = self.mask(video, self.encoder.grid, draws)
        parts: dict[str, Tensor] = {}
        for i, m in enumerate(masks):
            z = self.encoder(video, m.context)  # [B, Nc, D]
            got = self.predictor(z, m, self.query(i))  # [B, M, Nt, K]
            parts[f"loss_{i}"] = self.reduce(self.error(got.float(), take(want_all, m.target).float()), m)
            for name, ids in (("context", m.context), ("target", m.target[:, 0])):
                parts[f"{name}_ratio_{i}"] = video.new_tensor(ids.shape[1] / self.encoder.grid.n)
        return {"loss": torch.stack([parts[f"loss_{i}"] for i in range(len(masks))]).mean(), **parts}

    @staticmethod
    def reduce(error: Tensor, mask: Mask) -> Tensor:
        """[B, M, Nt] -> scalar; the one place where errors are averaged."""
        return error.mean() if mask.weight is None else (error * mask.weight).sum() / mask.weight.sum()

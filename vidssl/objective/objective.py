"""The formula: method = mask x target x query x predictor x error.

loss = mean over masks m of  weighted_mean error( predictor(encoder(video, m.context), m, query),
                                                  take(target(video), m.target) )
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidssl.config import Amount, Size
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.predictor import Prediction
from vidssl.model.vit import Encoder
from vidssl.objective.targets import Ema

ERRORS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {  # [B, M, Nt, K] x 2 -> [B, M, Nt]
    "l1": lambda: lambda got, want: (got - want).abs().mean(-1),
    "l2": lambda: lambda got, want: nn.functional.mse_loss(got, want, reduction="none").mean(-1),
    "smooth_l1": lambda: lambda got, want: nn.functional.smooth_l1_loss(got, want, reduction="none").mean(-1),
}


@dataclass(frozen=True)
class ContextLoss:
    """The error at the tokens that the encoder was given, added to the loss. Source: V-JEPA 2.1 (app/vjepa_2_1)."""

    weight: Amount = 0.0  # 0: none; V-JEPA 2.1: 0.5
    by_distance: bool = (
        True  # each token's error times 1 / sqrt(its distance in tokens to the nearest target)
    )
    warmup: tuple[Size, Size] = (0, 0)  # the weight rises from 0 between these steps

    def at(self, step: int) -> float:
        """The weight at a step."""
        first, last = self.warmup
        return (
            self.weight * min(1.0, max(0.0, (step - first) / (last - first))) if last > first else self.weight
        )


def inverse_sqrt_distance(mask: Mask, grid: Grid) -> Tensor:
    """f32 [B, 1, Nc]: 1 / sqrt(distance of each context token to the nearest target), in tokens."""

    def places(ids: Tensor) -> Tensor:
        row = grid.h * grid.w
        return torch.stack([ids // row, ids % row // grid.w, ids % grid.w], -1).float()

    distance = torch.cdist(places(mask.context), places(mask.target.flatten(1)))
    if mask.weight is not None:
        distance = distance.masked_fill(mask.weight.flatten(1)[:, None] == 0, torch.inf)
    return distance.amin(-1).rsqrt()[:, None]


class Objective(nn.Module):
    """(video f32 [B, 3, T, H, W], rng) -> {"loss": scalar, and parts for the log}. The module Accelerate prepares."""

    def __init__(
        self,
        encoder: Encoder,
        mask: Callable[[Tensor, Grid, KeyedRNG], list[Mask]],
        target: nn.Module,
        query: nn.Module,
        predictor: nn.Module,
        error: Callable[[Tensor, Tensor], Tensor],
        context: ContextLoss | None = None,
    ):
        super().__init__()
        self.encoder, self.mask, self.target = encoder, mask, target
        self.query, self.predictor, self.error, self.context = (
            query,
            predictor,
            error,
            context or ContextLoss(),
        )
        if bool(self.context.weight) != (getattr(predictor, "proj_context", None) is not None):
            raise UserError(
                "method.context.weight and method.predictor.context_head go together: give both or neither"
            )

    @property
    def eval_encoder(self) -> Encoder:
        """What evaluation uses: the momentum encoder where there is one (as V-JEPA does), else the trained one."""
        return self.target.encoder if isinstance(self.target, Ema) else self.encoder

    def forward(self, video: Tensor, rng: KeyedRNG) -> dict[str, Tensor]:
        grid = self.encoder.grid_of(video)
        want_all = self.target(video)  # [B, N, K]
        masks = self.mask(video, grid, rng)
        parts: dict[str, Tensor] = {}
        weight = self.context.at(rng.step)
        losses = []
        for i, m in enumerate(masks):
            z = self.encoder(video, m.context, full=True)  # [B, (1 +) Nc, levels * D]
            got: Prediction = self.predictor(z, m, self.query(i), grid)
            parts[f"loss_{i}"] = self.reduce(
                self.error(got.target.float(), gather_tokens(want_all, m.target).float()), m
            )
            losses.append(parts[f"loss_{i}"])
            if got.context is not None:
                error = self.error(got.context.float(), gather_tokens(want_all, m.context)[:, None].float())
                parts[f"context_{i}"] = (
                    error * inverse_sqrt_distance(m, grid) if self.context.by_distance else error
                ).mean()
                losses[-1] = losses[-1] + weight * parts[f"context_{i}"]
            counted = (
                m.target[0].numel() if m.weight is None else (m.weight > 0).float().sum() / len(m.weight)
            )
            for name, count in (("context", m.context.shape[1]), ("target", counted)):
                parts[f"{name}_ratio_{i}"] = torch.as_tensor(count / grid.n, device=video.device)
        return {"loss": torch.stack(losses).mean(), **parts}

    @staticmethod
    def reduce(error: Tensor, mask: Mask) -> Tensor:
        """[B, M, Nt] -> scalar; the one place where errors are averaged."""
        return error.mean() if mask.weight is None else (error * mask.weight).sum() / mask.weight.sum()

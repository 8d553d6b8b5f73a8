"""The formula: method = mask x target x query x predictor x error.

loss = mean over masks m of  weighted_mean error( predictor(encoder(video, m.context), m, query),
                                                  gather_tokens(target(video), m.target) )
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.predictor import Prediction
from vidssl.model.vit import Encoder
from vidssl.objective.masks import Masker, needs_video
from vidssl.objective.schema import ContextLoss
from vidssl.objective.targets import Target

ErrorFunction = Callable[[Tensor, Tensor], Tensor]  # prediction and target [B, M, Nt, K] to [B, M, Nt]

ERRORS: dict[str, Callable[[], ErrorFunction]] = {
    "l1": lambda: lambda pred, target: (pred - target).abs().mean(-1),
    "l2": lambda: lambda pred, target: F.mse_loss(pred, target, reduction="none").mean(-1),
    "smooth_l1": lambda: lambda pred, target: F.smooth_l1_loss(pred, target, reduction="none").mean(-1),
}


def inverse_sqrt_distance(mask: Mask, grid: Grid) -> Tensor:
    """f32 [B, 1, Nc]: 1 / sqrt(distance of each context token to the nearest target), in tokens."""

    def coordinates(ids: Tensor) -> Tensor:
        slice_size = grid.h * grid.w
        return torch.stack([ids // slice_size, ids % slice_size // grid.w, ids % grid.w], -1).float()

    distance = torch.cdist(coordinates(mask.context), coordinates(mask.target.flatten(1)))
    if mask.weight is not None:
        distance = distance.masked_fill(mask.weight.flatten(1)[:, None] == 0, torch.inf)
    return distance.amin(-1).rsqrt()[:, None]


class Objective(nn.Module):
    """Maps (video f32 [B, 3, T, H, W], rng, masks) to {"loss": scalar, and parts for the log}. Accelerate
    prepares this module."""

    def __init__(
        self,
        encoder: Encoder,
        mask: Masker,
        target: Target,
        query: nn.Module,
        predictor: nn.Module,
        error: ErrorFunction,
        context_loss: ContextLoss | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.mask = mask
        self.target = target
        self.query = query
        self.predictor = predictor
        self.error = error
        self.context_loss = context_loss or ContextLoss()
        if bool(self.context_loss.weight) != (getattr(predictor, "proj_context", None) is not None):
            raise UserError(
                "method.context.weight and method.predictor.context_head go together: give both or neither"
            )

    @property
    def eval_encoder(self) -> Encoder:
        """The encoder that is evaluated: the EMA encoder where there is one (as in V-JEPA), else the
        trained one."""
        return self.encoder if self.target.encoder is None else self.target.encoder

    def draw_masks(self, shape: torch.Size, rng: KeyedRNG) -> list[Mask] | None:
        """Draws the masks of clips of this shape on the device of `rng`: on the host, ahead of the forward
        pass. None: the masker looks at the pixels, so it draws in the forward pass."""
        if needs_video(self.mask):
            return None
        clips = torch.empty(shape, device="meta")  # only its shape may be read
        return self.mask(clips, self.encoder.grid_of(clips), rng)

    def forward(self, video: Tensor, rng: KeyedRNG, masks: list[Mask] | None = None) -> dict[str, Tensor]:
        """masks: of draw_masks, on the device of the video; None: they are drawn here, on that of `rng`."""
        grid = self.encoder.grid_of(video)
        target = self.target(video)  # [B, N, K]
        if masks is None:
            masks = [mask.to(video.device) for mask in self.mask(video, grid, rng)]
            rng = rng.to(video.device)
        context_weight = self.context_loss.weight_at(rng.step)
        parts: dict[str, Tensor] = {}
        losses = []
        for i, mask in enumerate(masks):
            z = self.encoder(video, mask.context, return_levels=True, rng=rng)  # [B, (1 +) Nc, levels * D]
            pred: Prediction = self.predictor(z, mask, self.query(i), grid)
            error = self.error(pred.target.float(), gather_tokens(target, mask.target).float())
            loss = parts[f"loss_{i}"] = self.weighted_mean(error, mask)
            if pred.context is not None:
                context_loss = parts[f"context_loss_{i}"] = self.context_error(
                    pred.context, target, mask, grid
                )
                loss = loss + context_weight * context_loss
            losses.append(loss)
            parts |= {f"{name}_{i}": value for name, value in mask_ratios(mask, grid).items()}
        return {"loss": torch.stack(losses).mean(), **parts}

    def context_error(self, pred: Tensor, target: Tensor, mask: Mask, grid: Grid) -> Tensor:
        """Returns the mean error, a scalar, of pred [B, M, Nc, K] at the context tokens; target [B, N, K]."""
        error = self.error(pred.float(), gather_tokens(target, mask.context)[:, None].float())
        return (error * inverse_sqrt_distance(mask, grid) if self.context_loss.by_distance else error).mean()

    @staticmethod
    def weighted_mean(error: Tensor, mask: Mask) -> Tensor:
        """Returns the mean over clips of the weighted mean of a clip's errors; error [B, M, Nt]. All target
        errors are averaged here.

        A clip counts the same however many targets it has, so the loss of a batch does not depend on how it
        is divided into micro-batches and processes.
        """
        if mask.weight is None:
            return error.mean()
        total = (error * mask.weight).sum((1, 2))
        return (total / mask.weight.sum((1, 2)).clamp_min(torch.finfo(total.dtype).tiny)).mean()


def mask_ratios(mask: Mask, grid: Grid) -> dict[str, Tensor]:
    """Context tokens, and targets that carry loss, as fractions of all tokens; for the log."""
    weight = mask.weight
    targets: float | Tensor = mask.target[0].numel()
    if weight is not None:
        targets = (weight > 0).float().sum() / len(weight)
    context = torch.full((), mask.context.shape[1] / grid.n, device=mask.context.device)
    return {"context_ratio": context, "target_ratio": torch.ones_like(context) * (targets / grid.n)}

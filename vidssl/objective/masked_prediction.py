"""The first formula: method = mask x target x query x predictor x error.

loss = mean over masks m of  weighted_mean error( predictor(encoder(video, m.context), m, query),
                                                  gather_tokens(target(video), m.target) )

Options widen it at five places: a corruption of what the encoder sees, a score that the mask is made from, a
target that is made for each mask, auxiliary losses, and a part of the hidden tokens as targets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.prediction import Encoded, Predicted, Prediction
from vidssl.model.vit import Encoder
from vidssl.objective.corruptions import Corrupted, Corruption
from vidssl.objective.errors import ErrorFunction
from vidssl.objective.masks import needs_video, thin_targets
from vidssl.objective.objective import Masker, Masks, Objective
from vidssl.objective.schema import ContextLoss
from vidssl.objective.targets import Target


class MaskedPrediction(Objective):
    """Predicts the targets of hidden tokens from the features of visible ones."""

    def __init__(
        self,
        encoder: Encoder,
        mask: Masker,
        target: Target,
        query: nn.Module | None,
        predictor: nn.Module,
        error: ErrorFunction,
        context_loss: ContextLoss | None = None,
        corruption: Corruption | None = None,
        score: nn.Module | None = None,
        aux: Sequence[nn.Module] = (),
        target_fraction: float = 1.0,
        masks_per_clip: int = 1,
    ):
        """target_fraction: part of a mask's targets that is predicted; masks_per_clip: draws of the mask for
        each clip, which share one pass of the target (see MethodConfig for the others)."""
        super().__init__()
        self.encoder = encoder
        self.mask: Any = mask
        self.target: Target = target
        self.query = query
        self.predictor = predictor
        self.error = error
        self.context_loss = context_loss or ContextLoss()
        self.corruption = corruption
        self.score: Any = score
        self.aux = nn.ModuleList(aux)
        self.target_fraction = target_fraction
        self.masks_per_clip = masks_per_clip
        self.reads_class = any(getattr(part, "reads_class", False) for part in (predictor, *aux))
        self.reads_levels = not getattr(predictor, "needs_all_layers", False) or target.has_gradients
        if bool(self.context_loss.weight) != (getattr(predictor, "proj_context", None) is not None):
            raise UserError(
                "method.context.weight and method.predictor.context_head go together: give both or neither"
            )

    @property
    def parts(self) -> list[nn.Module]:
        return [
            self.target,
            *filter(None, (self.query, self.predictor, self.corruption, self.score)),
            *([self.error] if isinstance(self.error, nn.Module) else []),
            *self.aux,
        ]

    @property
    def varying_parts(self) -> list[nn.Module]:
        return [self.encoder, self.predictor] if getattr(self.mask, "counts_vary", True) else []

    def target_features(self, video: Tensor) -> Tensor | None:
        return None if self.target.per_mask else self.target(video)[..., : self.target.width]

    def draw_masks(self, shape: torch.Size, rng: KeyedRNG, motion: Tensor | None = None) -> Masks:
        if needs_video(self.mask if self.score is None else self.score):
            return None
        clips = torch.empty(shape, device="meta")  # only its shape may be read
        return self.make_masks(clips, rng, motion)[0]

    def make_masks(
        self, video: Tensor, rng: KeyedRNG, motion: Tensor | None = None
    ) -> tuple[list[Mask], Tensor | None]:
        """Returns the masks of the clips, and the scores f32 [B, N] that they were made from.

        motion: f16 [B, 2, T, h, w] on the host, for a score that says `needs_motion`, which is called with it
        in place of the video; None: nothing moves.
        """
        grid = self.encoder.grid_of(video)
        scored = video
        if self.needs_motion:
            still = torch.zeros(len(video), 2, video.shape[2], 1, 1, device=rng.positions.device)
            scored = still if motion is None else motion
        scores = None if self.score is None else self.score(scored, grid, rng, self.encoder)
        masks = []
        for _ in range(self.masks_per_clip):
            drawn = (
                self.mask(video, grid, rng) if scores is None else self.mask.from_scores(scores, grid, rng)
            )
            masks += [thin_targets(mask, self.target_fraction, rng) for mask in drawn]
        return masks, scores

    def forward(self, video: Tensor, rng: KeyedRNG, masks: Masks = None) -> dict[str, Tensor]:
        """masks: of draw_masks, on the device of the video; None: they are drawn here, on that of `rng`."""
        grid = self.encoder.grid_of(video)
        features, parts = (None, {}) if self.target.per_mask else self.target.with_aux(video)
        prepared = self.target.prepare(video) if self.target.per_mask else None
        losses = list(parts.values())
        scores = None
        if masks is None:
            masks, scores = self.make_masks(video, rng)
            masks = [mask.to(video.device) for mask in masks]
            rng = rng.to(video.device)
        per_mask = []
        for i, mask in enumerate(masks):
            predicted = self.predict(video, features, grid, i, mask, rng, scores, prepared)
            mask = predicted.encoded.mask
            loss = parts[f"loss_{i}"] = self.weighted_mean(predicted.error, mask)
            if predicted.prediction.context is not None:
                loss = self.with_context(loss, predicted, parts)
            for name, value in self.auxiliary_losses(predicted).items():
                parts[f"{name}_{i}"] = value
                loss = loss + value
            per_mask.append(loss)
            parts |= {f"{name}_{i}": value for name, value in mask_ratios(mask, grid).items()}
        return {"loss": sum(losses, torch.stack(per_mask).mean()), **parts}

    def predict(
        self,
        video: Tensor,
        features: Tensor | None,
        grid: Grid,
        index: int,
        mask: Mask,
        rng: KeyedRNG,
        scores: Tensor | None,
        prepared: Tensor | None = None,
    ) -> Predicted:
        """Encodes the context of a mask, predicts its targets and compares them."""
        encoded, prediction = self.predict_hidden(video, grid, index, mask, rng, scores, prepared)
        if features is None:
            target = self.target.for_mask(encoded)
        else:
            target = gather_tokens(features, mask.target)
        error = self.error(prediction.target.float(), target.float())
        return Predicted(encoded, features, target, prediction, error)

    def predict_hidden(
        self,
        video: Tensor,
        grid: Grid,
        index: int,
        mask: Mask,
        rng: KeyedRNG,
        scores: Tensor | None = None,
        prepared: Tensor | None = None,
    ) -> tuple[Encoded, Prediction]:
        """Encodes the context of a mask and predicts its targets."""
        seen = Corrupted(video) if self.corruption is None else self.corruption(video, mask, grid, rng, index)
        context: Tensor | None = mask.context
        if self.corruption is not None and self.corruption.sees_all:
            context = None
            mask = mask._replace(context=torch.arange(grid.n, device=video.device).expand(len(video), -1))
        all_layers = getattr(self.predictor, "needs_all_layers", False)
        condition = self.encoder.condition_of(seen.level, len(video), video.device)
        z = self.encoder(seen.video, context, True, rng, seen.replaced, all_layers, condition=condition)
        encoded = Encoded(video, seen.video, grid, index, mask, rng, z, scores, prepared, seen.noise)
        query = None if self.query is None else self.query(encoded, self.predictor)
        told = [condition] if getattr(self.predictor, "needs_condition", False) else []
        return encoded, self.predictor(z, mask, query, grid, *told)

    def auxiliary_losses(self, predicted: Predicted) -> dict[str, Tensor]:
        """The weighted losses of method.aux, and those of the score."""
        found: dict[str, Tensor] = {} if self.score is None else self.score.aux(predicted)
        for aux in self.aux:
            name = f"aux_{aux.kind}"
            found[name] = found.get(name, 0.0) + aux.weight * aux(predicted)
        return found

    def with_context(self, loss: Tensor, predicted: Predicted, parts: dict[str, Tensor]) -> Tensor:
        """Returns the loss of a mask with that of its context tokens, which is added to `parts`, too."""
        encoded = predicted.encoded
        pred = predicted.prediction.context
        assert predicted.features is not None and pred is not None
        if self.corruption is None:
            target: Tensor | None = gather_tokens(predicted.features, encoded.mask.context)
        else:
            target = self.corruption.context_target(predicted.features, encoded)
        if target is None:
            return loss
        error = self.error(pred.float(), target[:, None].float())
        if self.context_loss.by_distance:
            error = error * inverse_sqrt_distance(encoded.mask, encoded.grid)
        context_loss = parts[f"context_loss_{encoded.mask_index}"] = error.mean()
        weight = self.context_loss.weight_at(encoded.rng.step)
        loss = loss + weight * context_loss
        return loss / (1 + weight) if self.context_loss.mean else loss

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


def inverse_sqrt_distance(mask: Mask, grid: Grid) -> Tensor:
    """f32 [B, 1, Nc]: 1 / sqrt(distance of each context token to the nearest target), in tokens."""

    def coordinates(ids: Tensor) -> Tensor:
        slice_size = grid.h * grid.w
        return torch.stack([ids // slice_size, ids % slice_size // grid.w, ids % grid.w], -1).float()

    distance = torch.cdist(coordinates(mask.context), coordinates(mask.target.flatten(1)))
    if mask.weight is not None:
        distance = distance.masked_fill(mask.weight.flatten(1)[:, None] == 0, torch.inf)
    return distance.amin(-1).rsqrt()[:, None]


def mask_ratios(mask: Mask, grid: Grid) -> dict[str, Tensor]:
    """Context tokens, and targets that carry loss, as fractions of all tokens; for the log."""
    weight = mask.weight
    targets: float | Tensor = mask.target[0].numel()
    if weight is not None:
        targets = (weight > 0).float().sum() / len(weight)
    context = torch.full((), mask.context.shape[1] / grid.n, device=mask.context.device)
    return {"context_ratio": context, "target_ratio": torch.ones_like(context) * (targets / grid.n)}

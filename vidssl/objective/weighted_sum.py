"""The sum of several formulas over one encoder: ViC-MAE."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import Encoder
from vidssl.objective.objective import Masks, Objective


class WeightedSum(Objective):
    """loss = sum over terms of weight * loss of the term; all share one encoder.

    A term that does not compare the windows of a clip takes each window as a clip of its own.
    """

    def __init__(self, encoder: Encoder, terms: Sequence[tuple[float, Objective]]):
        super().__init__()
        self.encoder = encoder
        self.weights = [weight for weight, _ in terms]
        self.terms: Any = nn.ModuleList(term for _, term in terms)
        self.mask = terms[0][1].mask
        self.trains_class_only = all(term.trains_class_only for _, term in terms)
        for term in self.terms:
            share_module(term, "encoder", encoder)
        if sum(term.ema_encoder is not None for term in self.terms) > 1:
            raise UserError("method: target and agree average the encoder both; only one of them may")

    @property
    def eval_encoder(self) -> Encoder:
        return next((t.eval_encoder for t in self.terms if t.ema_encoder is not None), self.encoder)

    @property
    def parts(self) -> list[nn.Module]:
        return [part for term in self.terms for part in term.parts]

    @property
    def varying_parts(self) -> list[nn.Module]:
        return [part for term in self.terms for part in term.varying_parts]

    def target_features(self, video: Tensor) -> Tensor | None:
        return self.terms[0].target_features(video)

    def draw_masks(self, shape: torch.Size, rng: KeyedRNG, motion: Tensor | None = None) -> Masks:
        clips = torch.empty(shape, device="meta")  # only its shape may be read
        masks = []
        for term in self.terms:
            own, own_rng = self.clips_of(term, clips, rng)
            parts = len(own) // len(clips)
            apart = None if motion is None else torch.cat(motion.chunk(parts, 2))
            masks.append(term.draw_masks(own.shape, own_rng, apart))
        return masks

    def clips_of(self, term: Objective, video: Tensor, rng: KeyedRNG) -> tuple[Tensor, KeyedRNG]:
        """What a term takes for its clips, and their generator."""
        windows = self.windows_of(video)
        if term.takes_windows or len(windows) == 1:
            return video, rng
        return torch.cat(windows), rng.of_views(len(windows))

    def forward(self, video: Tensor, rng: KeyedRNG, masks: Masks = None) -> dict[str, Tensor]:
        masks = masks or [None] * len(self.terms)
        losses = []
        parts: dict[str, Tensor] = {}
        for i, (weight, term, drawn) in enumerate(zip(self.weights, self.terms, masks, strict=True)):
            found = term(*self.clips_of(term, video, rng), drawn)
            parts[f"loss_term_{i}"] = found.pop("loss")
            losses.append(weight * parts[f"loss_term_{i}"])
            parts |= found
        return {"loss": torch.stack(losses).sum(), **parts}


def share_module(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Makes owner.name a plain reference to a module that another one owns, so that state dicts hold it
    once."""
    del owner._modules[name]
    object.__setattr__(owner, name, module)

"""The sum of several formulas over one encoder: ViC-MAE, iBOT."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import Encoder
from vidssl.objective.objective import Masks, Objective


class WeightedSum(Objective):
    """loss = sum over terms of weight * loss of the term; all share one encoder, and one EMA encoder."""

    def __init__(self, encoder: Encoder, terms: Sequence[tuple[float, Objective]]):
        super().__init__()
        self.encoder = encoder
        self.weights = [weight for weight, _ in terms]
        self.terms: Any = nn.ModuleList(term for _, term in terms)
        self.mask = terms[0][1].mask
        for term in self.terms:
            share_module(term, "encoder", encoder)

    @property
    def parts(self) -> list[nn.Module]:
        return [part for term in self.terms for part in term.parts]

    @property
    def varying_parts(self) -> list[nn.Module]:
        return [part for term in self.terms for part in term.varying_parts]

    def target_features(self, video: Tensor) -> Tensor | None:
        return self.terms[0].target_features(video)

    def draw_masks(self, shape: torch.Size, rng: KeyedRNG, motion: Tensor | None = None) -> Masks:
        return [term.draw_masks(shape, rng, motion) for term in self.terms]

    def forward(self, video: Tensor, rng: KeyedRNG, masks: Masks = None) -> dict[str, Tensor]:
        masks = masks or [None] * len(self.terms)
        losses = []
        parts: dict[str, Tensor] = {}
        for i, (weight, term, drawn) in enumerate(zip(self.weights, self.terms, masks, strict=True)):
            found = term(video, rng, drawn)
            parts[f"loss_term_{i}"] = found.pop("loss")
            losses.append(weight * parts[f"loss_term_{i}"])
            parts |= found
        return {"loss": torch.stack(losses).sum(), **parts}


def share_module(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Makes owner.name a plain reference to a module that another one owns, so that state dicts hold it
    once."""
    del owner._modules[name]
    object.__setattr__(owner, name, module)

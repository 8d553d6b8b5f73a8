"""AdamW, learning rate and weight decay schedules, parameter groups. A schedule is a function of the step."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from vidssl.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.schedules import DECAYS, cosine, linear

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OptimConfig:
    """The `optim` section. Rates are absolute (without lr_batch), steps are optimiser steps.

    An infinite run (Ibrahim et al. 2024, arXiv 2403.08763) has decay "cosine" to the constant rate final_lr within
    `schedule_steps`; it can be continued with a larger run.steps. An annealing branch is a run of its own with
    run.init=THAT_RUN, lr at the constant rate, no warm-up and decay "exponential" (as in the paper) or another.
    """

    lr: PositiveFloat
    warmup_lr: NonNegativeFloat = 0.0  # at the start of the warm-up
    final_lr: NonNegativeFloat = 0.0  # at the end of the decay
    lr_batch: PositiveInt | None = (
        None  # value of run.batch to which the three rates refer; None: they are absolute
    )
    lr_scaling: Literal["linear", "sqrt"] = (
        "linear"  # with run.batch / lr_batch: MAE, VideoMAE (256); DINOv2 (1024)
    )
    warmup: NonNegativeInt = 0  # steps
    decay: Literal["cosine", "linear", "exponential", "constant"] = (
        "cosine"  # of lr to final_lr after the warm-up
    )
    ipe_scale: PositiveFloat = (
        1.0  # schedules are stretched over ipe_scale x run.steps and cut there (V-JEPA: 1.25)
    )
    schedule_steps: PositiveInt | None = (
        None  # length of all schedules after the warm-up; None: until run.steps
    )
    layer_decay: Fraction = 1.0  # factor on the rate from each encoder layer to the one below (fine-tuning)
    weight_decay: NonNegativeFloat = 0.05
    final_weight_decay: NonNegativeFloat | None = None  # at the end of a cosine; None: constant
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_grad: PositiveFloat | None = None  # largest norm of the gradients
    clip_per_module: bool = (
        False  # clip the encoder and the rest separately (V-JEPA), not all parameters together
    )
    clip_start: NonNegativeInt = 0  # first step that is clipped (V-JEPA does not clip during its warm-up)
    decay_tokens: bool = True  # weight decay on tokens and learned positions: V-JEPA and MAE yes, VideoMAE no

    def __post_init__(self) -> None:
        if self.decay == "exponential" and not self.final_lr:
            raise UserError(
                "optim.final_lr: an exponential decay cannot end at 0; give a rate, or another optim.decay"
            )
        if self.schedule_steps is not None and self.decay != "constant" and not self.final_lr:
            raise UserError(
                "optim.final_lr: with optim.schedule_steps training goes on at this rate; give one above 0"
            )
        if self.schedule_steps is not None and self.ipe_scale != 1:
            raise UserError(
                "optim.schedule_steps and optim.ipe_scale both set the length of the schedules: give one of them"
            )

    def scaled(self, batch: int) -> "OptimConfig":
        """This configuration with absolute rates for a global batch of `batch` clips.

        Source: Goyal et al. 2017 (arXiv 1706.02677), VideoMAE run_mae_pretraining.py; the root: DINOv2 (AdamW too).
        """
        if self.lr_batch is None:
            return self
        ratio = batch / self.lr_batch
        factor = ratio if self.lr_scaling == "linear" else math.sqrt(ratio)
        return replace(
            self,
            lr=factor * self.lr,
            warmup_lr=factor * self.warmup_lr,
            final_lr=factor * self.final_lr,
            lr_batch=None,
        )

    def is_open_ended(self, momentum: tuple[float, float]) -> bool:
        """Whether no step depends on run.steps. momentum: of the EMA target, at the first and the last step."""
        constant_decay = self.final_weight_decay in (None, self.weight_decay)
        constant = self.decay == "constant" and constant_decay and momentum[0] == momentum[1]
        return self.schedule_steps is not None or constant


def schedule(
    o: OptimConfig, step: int, steps: int, momentum: tuple[float, float] = (1.0, 1.0)
) -> dict[str, float]:
    """Learning rate, weight decay and EMA momentum (`ema`) at step 0..steps-1.

    lr and weight decay count a step before it is taken (the first is at 1), the momentum after it (the first is at 0).
    momentum: at the first and the last step.
    Source: V-JEPA, app/vjepa/{train,utils}.py and src/utils/schedulers.py; decay: V-JEPA 2 (constant, linear when
    cooling down). Checked against a trace of its training loop.
    """
    total = max(1, int(steps * o.ipe_scale)) if o.schedule_steps is None else o.warmup + o.schedule_steps
    count = step + 1
    if count < o.warmup:
        lr = linear(o.warmup_lr, o.lr, count / o.warmup)
    elif o.decay == "constant":
        lr = o.lr
    else:
        lr = DECAYS[o.decay](o.lr, o.final_lr, (count - o.warmup) / max(1, total - o.warmup))
    final_weight_decay = o.weight_decay if o.final_weight_decay is None else o.final_weight_decay
    return {
        "lr": lr,
        "weight_decay": cosine(o.weight_decay, final_weight_decay, count / total),
        "ema": linear(*momentum, step / total),
    }


def build_optimizer(model: nn.Module, o: OptimConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW; biases and 1-D parameters (norms) have no weight decay, as published.

    With layer_decay there are two groups per layer, else two in all. fused: one kernel for the whole update.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = [layer_of(name) for name, _ in named]
    top = max((layer for layer in layers if layer is not None), default=0) + 1
    by_layer: dict[int, tuple[list[nn.Parameter], list[nn.Parameter]]] = {
        top: ([], [])
    }  # decayed, not decayed
    for (name, p), layer in zip(named, layers, strict=True):
        level = top if layer is None or o.layer_decay == 1 else layer
        exempt = not o.decay_tokens if is_token(name) else p.ndim <= 1 or name.endswith(".bias")
        by_layer.setdefault(level, ([], []))[exempt].append(p)
    groups: list[dict[str, Any]] = []
    for level, (decayed, not_decayed) in by_layer.items():
        scale = {} if o.layer_decay == 1 else {"scale": o.layer_decay ** (top - level)}
        groups.append({"params": decayed, "decay": True, **scale})
        groups.append({"params": not_decayed, "decay": False, **scale})
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=fused or None)


def layer_of(name: str) -> int | None:
    """Layer of an encoder's parameter by its dotted name: 0 for the embedding, i + 1 for block i; None for the final
    norm, the head and everything outside the encoder.

    Source: BEiT's layer-wise rates as in VideoMAE, optim_factory.py: the rate of layer l of depth L is layer_decay to
    the power L + 1 - l; the last norm and the head have the full rate.
    """
    parts = name.split(".")
    inside = parts[parts.index("encoder") + 1 :] if "encoder" in parts else []
    if inside[:1] == ["blocks"]:
        return int(inside[1]) + 1
    embeds = inside and (inside[0].startswith("patch_embed") or is_token(".".join(inside)))
    return 0 if embeds else None


TOKEN_SUFFIXES = ("token", "tokens", "modality", "mod_embed")


def is_token(name: str) -> bool:
    """Whether the parameter of this dotted name is a learned token, a table of positions or a modality vector.

    These are 1-D here but [1, 1, D] in the references, where they count as decayed for that reason.
    """
    return any(part.endswith(TOKEN_SUFFIXES) or "position" in part for part in name.split("."))


def set_schedule(optimizer: torch.optim.Optimizer, hparams: dict[str, float]) -> None:
    """Sets learning rate and weight decay of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = hparams["lr"] * group.get("scale", 1.0)
        group["weight_decay"] = hparams["weight_decay"] if group["decay"] else 0.0

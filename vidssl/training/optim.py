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
    """The `optim` section. Rates are absolute (without lr_batch), steps are optimizer steps.

    An infinite run (Ibrahim et al. 2024, arXiv 2403.08763) has lr_decay "cosine" to the constant rate
    final_lr within `schedule_steps`; it can be continued with a larger run.steps. An annealing branch is a
    run of its own with run.init=THAT_RUN, lr at the constant rate, no warm-up and lr_decay "exponential" (as
    in the paper) or another.
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
    lr_decay: Literal["cosine", "linear", "exponential", "constant"] = (
        "cosine"  # of lr to final_lr after the warm-up
    )
    ipe_scale: PositiveFloat = (
        1.0  # schedules are stretched over ipe_scale x run.steps and cut there (V-JEPA: 1.25)
    )
    schedule_steps: PositiveInt | None = (
        None  # length of all schedules after the warm-up; None: until run.steps
    )
    layer_lr_decay: Fraction = (
        1.0  # factor on the rate from each encoder layer to the one below (fine-tuning)
    )
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
        if self.lr_decay == "exponential" and not self.final_lr:
            raise UserError(
                "optim.final_lr: an exponential decay cannot end at 0; give a rate, or another optim.lr_decay"
            )
        if self.schedule_steps is not None and self.lr_decay != "constant" and not self.final_lr:
            raise UserError(
                "optim.final_lr: with optim.schedule_steps training goes on at this rate; give one above 0"
            )
        if self.schedule_steps is not None and self.ipe_scale != 1:
            raise UserError(
                "optim.schedule_steps and optim.ipe_scale both set the length of the schedules: "
                "give one of them"
            )

    def scaled(self, batch: int) -> "OptimConfig":
        """This configuration with absolute rates for a global batch of `batch` clips.

        Source: Goyal et al. 2017 (arXiv 1706.02677), VideoMAE run_mae_pretraining.py; square-root scaling:
        DINOv2.
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
        """Whether no step depends on run.steps. momentum: of the EMA encoder, at the first and last step."""
        constant_decay = self.final_weight_decay in (None, self.weight_decay)
        constant = self.lr_decay == "constant" and constant_decay and momentum[0] == momentum[1]
        return self.schedule_steps is not None or constant


def schedule(
    config: OptimConfig, step: int, steps: int, momentum: tuple[float, float] = (1.0, 1.0)
) -> dict[str, float]:
    """Learning rate, weight decay and EMA momentum (`ema`) at step 0..steps-1.

    lr and weight decay use step + 1, the momentum uses step. momentum: at the first and the last step.
    Source: V-JEPA, app/vjepa/{train,utils}.py and src/utils/schedulers.py; lr_decay: V-JEPA 2 (constant,
    linear when cooling down). Checked against a trace of its training loop.
    """
    total = (
        max(1, int(steps * config.ipe_scale))
        if config.schedule_steps is None
        else config.warmup + config.schedule_steps
    )
    count = step + 1
    if count < config.warmup:
        lr = linear(config.warmup_lr, config.lr, count / config.warmup)
    elif config.lr_decay == "constant":
        lr = config.lr
    else:
        lr = DECAYS[config.lr_decay](
            config.lr, config.final_lr, (count - config.warmup) / max(1, total - config.warmup)
        )
    final_weight_decay = (
        config.weight_decay if config.final_weight_decay is None else config.final_weight_decay
    )
    return {
        "lr": lr,
        "weight_decay": cosine(config.weight_decay, final_weight_decay, count / total),
        "ema": linear(*momentum, step / total),
    }


def build_optimizer(model: nn.Module, config: OptimConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW; biases and 1-D parameters (norms) have no weight decay, as published.

    With layer_lr_decay there are up to two groups per layer, else up to two in all. fused: one kernel for the
    whole update.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = [layer_of(name) for name, _ in named]
    top = max((layer for layer in layers if layer is not None), default=0) + 1
    by_layer: dict[int, tuple[list[nn.Parameter], list[nn.Parameter]]] = {
        top: ([], [])
    }  # decayed, not decayed
    for (name, p), layer in zip(named, layers, strict=True):
        level = top if layer is None or config.layer_lr_decay == 1 else layer
        exempt = (
            not config.decay_tokens if is_token_or_position(name) else p.ndim <= 1 or name.endswith(".bias")
        )
        by_layer.setdefault(level, ([], []))[exempt].append(p)
    groups: list[dict[str, Any]] = []
    for level, (decayed, not_decayed) in by_layer.items():
        scale = {} if config.layer_lr_decay == 1 else {"scale": config.layer_lr_decay ** (top - level)}
        groups.append({"params": decayed, "has_weight_decay": True, **scale})
        groups.append({"params": not_decayed, "has_weight_decay": False, **scale})
    groups = [group for group in groups if group["params"]]  # set_optimizer_state_dict rejects empty ones
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)


def layer_of(name: str) -> int | None:
    """Layer of an encoder's parameter by its dotted name: 0 for the embedding, i + 1 for block i; None for
    the final norm, the head and everything outside the encoder.

    Source: BEiT's layer-wise rates as in VideoMAE, optim_factory.py: the rate of layer l of depth L is
    layer_lr_decay to the power L + 1 - l; the last norm and the head have the full rate.
    """
    parts = name.split(".")
    inside = parts[parts.index("encoder") + 1 :] if "encoder" in parts else []
    if inside[:1] == ["blocks"]:
        return int(inside[1]) + 1
    embeds = inside and (inside[0].startswith("patch_embed") or is_token_or_position(".".join(inside)))
    return 0 if embeds else None


TOKEN_SUFFIXES = ("token", "tokens", "modality", "mod_embed")


def is_token_or_position(name: str) -> bool:
    """Whether the parameter of this dotted name is a learned token, a table of positions or a modality
    vector.

    These are 1-D here but [1, 1, D] in the references, where they count as decayed for that reason.
    """
    return any(part.endswith(TOKEN_SUFFIXES) or "position" in part for part in name.split("."))


def set_schedule(optimizer: torch.optim.Optimizer, hparams: dict[str, float]) -> None:
    """Sets learning rate and weight decay of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = hparams["lr"] * group.get("scale", 1.0)
        group["weight_decay"] = hparams["weight_decay"] if group["has_weight_decay"] else 0.0

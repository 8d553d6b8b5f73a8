"""Optimiser, schedules and clipping; a schedule is a function of the step."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from vidssl.config import Amount, Count, Positive, Share, Size
from vidssl.core.errors import UserError
from vidssl.core.schedules import DECAYS, cosine, linear
from vidssl.training.distributed import Strategy

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class OptimConfig:
    """The `optim` section. Rates are absolute (without lr_batch), steps are optimiser steps.

    An infinite run (Ibrahim et al. 2024, arXiv 2403.08763) is decay "cosine" to the constant rate final_lr
    with `schedule_steps`; it can be prolonged by a larger run.steps. An annealing branch of it is a run of its own with
    run.init=THAT_RUN, lr at the constant rate, no warm-up and decay "exponential" (as in the paper) or another.
    """

    lr: Positive
    warmup_lr: Amount = 0.0  # at the start of the warm-up
    final_lr: Amount = 0.0  # at the end of the decay
    lr_batch: Count | None = (
        None  # clips of run.batch that these three rates are for; None: they are what they are
    )
    lr_scaling: Literal["linear", "sqrt"] = (
        "linear"  # of run.batch / lr_batch: MAE, VideoMAE (256); DINOv2 (1024)
    )
    warmup: Size = 0  # steps
    decay: Literal["cosine", "linear", "exponential", "constant"] = (
        "cosine"  # of lr after the warm-up, towards final_lr
    )
    ipe_scale: Positive = (
        1.0  # schedules are drawn over ipe_scale x run.steps and cut there (V-JEPA's ipe_scale: 1.25)
    )
    schedule_steps: Count | None = (
        None  # steps after the warm-up by which all schedules end and stay, whatever run.steps
    )
    layer_decay: Share = 1.0  # of the rate, from each layer of the encoder to the one below it (fine-tuning)
    weight_decay: Amount = 0.05
    final_weight_decay: Amount | None = None  # cosine towards it; None: constant
    momentum: tuple[Share, Share] = (0.998, 1.0)  # of the momentum encoder, linear from first to last step
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad: Positive | None = None  # largest norm of the gradients
    clip_per_module: bool = (
        False  # of the encoder's and of the rest's, each by itself (V-JEPA); else of all together
    )
    clip_start: Size = 0  # steps before it are not clipped (V-JEPA does not clip during its warm-up)
    decay_tokens: bool = True  # and learned positions: V-JEPA and MAE decay them, VideoMAE does not

    def __post_init__(self) -> None:
        if self.decay == "exponential" and not self.final_lr:
            raise UserError(
                "optim.final_lr: an exponential decay cannot end at 0; give a rate, or another optim.decay"
            )
        if self.schedule_steps is not None and self.decay != "constant" and not self.final_lr:
            raise UserError(
                "optim.final_lr: with optim.schedule_steps it is the rate that is kept; give one above 0"
            )
        if self.schedule_steps is not None and self.ipe_scale != 1:
            raise UserError(
                "optim.schedule_steps says when the schedules end, optim.ipe_scale too: give one of them"
            )

    def scaled(self, batch: int) -> "OptimConfig":
        """With the rates of a global batch of so many clips.

        Source: Goyal et al. 2017 (arXiv 1706.02677), VideoMAE run_mae_pretraining.py; the root: DINOv2 (AdamW too).
        """
        if self.lr_batch is None:
            return self
        by = batch / self.lr_batch if self.lr_scaling == "linear" else math.sqrt(batch / self.lr_batch)
        return replace(
            self, lr=by * self.lr, warmup_lr=by * self.warmup_lr, final_lr=by * self.final_lr, lr_batch=None
        )

    def endless(self, momentum: bool) -> bool:
        """Whether no step depends on run.steps, so that a run can be prolonged; momentum: is it made use of?"""
        flat = self.final_weight_decay in (None, self.weight_decay) and (
            not momentum or len(set(self.momentum)) == 1
        )
        return self.schedule_steps is not None or (self.decay == "constant" and flat)


def schedule(o: OptimConfig, step: int, steps: int) -> dict[str, float]:
    """lr, weight decay and momentum at step 0..steps-1.

    lr and weight decay count a step before it is taken (the first is at 1), the momentum after it (the first is at 0).
    Source: V-JEPA, app/vjepa/{train,utils}.py and src/utils/schedulers.py; decay: V-JEPA 2 (constant, linear when
    cooling down). Checked against a trace of its training loop.
    """
    total, count = (
        max(1, int(steps * o.ipe_scale)) if o.schedule_steps is None else o.warmup + o.schedule_steps,
        step + 1,
    )
    if count < o.warmup:
        lr = linear(o.warmup_lr, o.lr, count / o.warmup)
    elif o.decay == "constant":
        lr = o.lr
    else:
        lr = DECAYS[o.decay](o.lr, o.final_lr, (count - o.warmup) / max(1, total - o.warmup))
    decay_end = o.weight_decay if o.final_weight_decay is None else o.final_weight_decay
    return {
        "lr": lr,
        "weight_decay": cosine(o.weight_decay, decay_end, count / total),
        "momentum": linear(*o.momentum, step / total),
    }


def build_optimizer(model: nn.Module, o: OptimConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW; biases and 1-D parameters (norms) are not decayed, as published.

    With layer_decay there are two groups for each layer, else two in all. fused: one kernel for the whole update.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = [layer_of(name) for name, _ in named]
    top = max((layer for layer in layers if layer is not None), default=0) + 1
    parts: dict[int, tuple[list[nn.Parameter], list[nn.Parameter]]] = {
        top: ([], [])
    }  # by layer: decayed, others
    for (name, p), layer in zip(named, layers, strict=True):
        at = top if layer is None or o.layer_decay == 1 else layer
        free = not o.decay_tokens if is_token(name) else p.ndim <= 1 or name.endswith(".bias")
        parts.setdefault(at, ([], []))[free].append(p)
    groups: list[dict[str, Any]] = []
    for at, (decayed, others) in parts.items():
        scale = {} if o.layer_decay == 1 else {"scale": o.layer_decay ** (top - at)}
        groups += [{"params": decayed, "decay": True, **scale}, {"params": others, "decay": False, **scale}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=fused or None)


def layer_of(name: str) -> int | None:
    """Of an encoder's parameter, by its dotted name: 0 of what makes tokens, i + 1 of block i; None: above all blocks,
    or not of an encoder.

    Source: BEiT's layer-wise rates as in VideoMAE, optim_factory.py: the rate of layer l of depth L is layer_decay to
    the power L + 1 - l, that of the last norm and the head is whole.
    """
    parts = name.split(".")
    inside = parts[parts.index("encoder") + 1 :] if "encoder" in parts else []
    if inside[:1] == ["blocks"]:
        return int(inside[1]) + 1
    embeds = inside and (inside[0].startswith("patch_embed") or is_token(".".join(inside)))
    return 0 if embeds else None


TOKEN_SUFFIXES = ("token", "tokens", "modality", "mod_embed")


def is_token(name: str) -> bool:
    """Is the parameter, by its dotted name, a learned token, a learned table of positions or a modality's vector?

    Those are 1-D here where the references keep them as [1, 1, D], which is why they count as decayed there.
    """
    return any(part.endswith(TOKEN_SUFFIXES) or "position" in part for part in name.split("."))


def set_schedule(optimizer: torch.optim.Optimizer, now: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = now["lr"] * group.get("scale", 1.0)
        group["weight_decay"] = now["weight_decay"] if group["decay"] else 0.0


def clip_gradients(accelerator: Accelerator, model: nn.Module, o: OptimConfig, step: int) -> Tensor:
    """Strategy.clip for a plain Accelerator."""
    return Strategy(accelerator).clip(model, o, step)

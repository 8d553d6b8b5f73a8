"""Optimiser and schedules; a schedule is a function of the step."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from vidssl.config import Amount, Positive, Share, Size

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Optim:
    """The `optim` section. Rates are absolute, steps are optimiser steps."""

    lr: Positive
    lr_start: Amount = 0.0  # at the start of the warm-up
    lr_end: Amount = 0.0  # at the end of the cosine
    warmup: Size = 0  # steps
    weight_decay: Amount = 0.05
    weight_decay_end: Amount | None = None  # cosine towards it; None: constant
    momentum: tuple[Share, Share] = (0.998, 1.0)  # of the momentum encoder, linear from first to last step
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad: Positive | None = None  # largest total norm
    decay_tokens: bool = True  # V-JEPA decays its mask tokens, VideoMAE does not


def cosine(start: float, end: float, done: float) -> float:
    """From start (done 0) to end (done 1) along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def schedule(o: Optim, step: int, steps: int) -> dict[str, float]:
    """lr, weight decay and momentum at step 0..steps-1: linear warm-up and cosine, cosine, linear."""
    if step < o.warmup:
        lr = o.lr_start + (o.lr - o.lr_start) * (step + 1) / o.warmup
    else:
        lr = cosine(o.lr, o.lr_end, (step - o.warmup) / max(1, steps - o.warmup))
    done = step / steps
    decay_end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
    return {
        "lr": lr,
        "weight_decay": cosine(o.weight_decay, decay_end, done),
        "momentum": o.momentum[0] + (o.momentum[1] - o.momentum[0]) * done,
    }


def make_optimizer(model: nn.Module, o: Optim) -> torch.optim.AdamW:
    """AdamW; biases and 1-D parameters (norms) are not decayed, as published."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            free = p.ndim <= 1 or name.endswith(".bias") or (not o.decay_tokens and "tokens" in name)
            (plain if free else decayed).append(p)
    groups = [{"params": decayed, "decay": True}, {"params": plain, "decay": False}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)


def set_schedule(optimizer: torch.optim.Optimizer, now: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = now["lr"]
        group["weight_decay"] = now["weight_decay"] if group["decay"] else 0.0

"""Optimiser, schedules and clipping; a schedule is a function of the step."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from vidssl.config import Amount, Positive, Share, Size

Beta = Annotated[float, Field(ge=0, lt=1)]
NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Optim:
    """The `optim` section. Rates are absolute, steps are optimiser steps."""

    lr: Positive
    lr_start: Amount = 0.0  # at the start of the warm-up
    lr_end: Amount = 0.0  # at the end of the decay
    warmup: Size = 0  # steps
    decay: Literal["cosine", "linear", "constant"] = "cosine"  # of lr after the warm-up, towards lr_end
    stretch: Positive = 1.0  # schedules are drawn over stretch x run.steps and cut there (V-JEPA's ipe_scale: 1.25)
    weight_decay: Amount = 0.05
    weight_decay_end: Amount | None = None  # cosine towards it; None: constant
    momentum: tuple[Share, Share] = (0.998, 1.0)  # of the momentum encoder, linear from first to last step
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad: Positive | None = None  # largest norm of the gradients
    clip_each: bool = False  # of the encoder's and of the rest's, each by itself (V-JEPA); else of all together
    clip_from: Size = 0  # steps before it are not clipped (V-JEPA does not clip during its warm-up)
    decay_tokens: bool = True  # and learned positions: V-JEPA and MAE decay them, VideoMAE does not


def cosine(start: float, end: float, done: float) -> float:
    """From start (done 0) to end (done 1 and later) along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def linear(start: float, end: float, done: float) -> float:
    """From start (done 0) to end (done 1 and later) along a line."""
    return start + (end - start) * min(done, 1.0)


def schedule(o: Optim, step: int, steps: int) -> dict[str, float]:
    """lr, weight decay and momentum at step 0..steps-1.

    lr and weight decay count a step before it is taken (the first is at 1), the momentum after it (the first is at 0).
    Source: V-JEPA, app/vjepa/{train,utils}.py and src/utils/schedulers.py; decay: V-JEPA 2 (constant, linear when
    cooling down). Checked against a trace of its training loop.
    """
    total, count = max(1, int(steps * o.stretch)), step + 1
    if count < o.warmup:
        lr = linear(o.lr_start, o.lr, count / o.warmup)
    elif o.decay == "constant":
        lr = o.lr
    else:
        fall = linear if o.decay == "linear" else cosine
        lr = fall(o.lr, o.lr_end, (count - o.warmup) / max(1, total - o.warmup))
    decay_end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
    return {
        "lr": lr,
        "weight_decay": cosine(o.weight_decay, decay_end, count / total),
        "momentum": linear(*o.momentum, step / total),
    }


def make_optimizer(model: nn.Module, o: Optim) -> torch.optim.AdamW:
    """AdamW; biases and 1-D parameters (norms) are not decayed, as published."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            free = not o.decay_tokens if is_token(name) else p.ndim <= 1 or name.endswith(".bias")
            (plain if free else decayed).append(p)
    groups = [{"params": decayed, "decay": True}, {"params": plain, "decay": False}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)


TOKENS = ("token", "tokens", "modality", "mod_embed")


def is_token(name: str) -> bool:
    """Is the parameter, by its dotted name, a learned token, a learned table of positions or a modality's vector?

    Those are 1-D here where the references keep them as [1, 1, D], which is why they count as decayed there.
    """
    return any(part.endswith(TOKENS) or "position" in part for part in name.split("."))


def set_schedule(optimizer: torch.optim.Optimizer, now: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = now["lr"]
        group["weight_decay"] = now["weight_decay"] if group["decay"] else 0.0


def clip_gradients(accelerator: Accelerator, model: nn.Module, o: Optim, step: int) -> Tensor:
    """Clip the gradients of step 0.. as `o` asks; returns their total norm before that.

    Only accelerator.clip_grad_norm_ undoes the scale of fp16, which may happen once a step.
    Source of clip_each: V-JEPA, app/vjepa/train.py: encoder and predictor (its mask tokens included) apart.
    """
    limit = o.clip_grad if o.clip_grad is not None and step >= o.clip_from else NO_LIMIT
    norm = accelerator.clip_grad_norm_(model.parameters(), NO_LIMIT if o.clip_each else limit)
    if o.clip_each and limit < NO_LIMIT:
        named = [("encoder" in name.split("."), p) for name, p in model.named_parameters() if p.grad is not None]
        for part in (True, False):
            nn.utils.clip_grad_norm_([p for of_encoder, p in named if of_encoder == part], limit)
    return norm

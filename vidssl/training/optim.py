"""AdamW, learning rate and weight decay schedules, parameter groups. A schedule is a function of the step."""

from typing import Any

import torch
from torch import nn

from vidssl.core.schedules import DECAYS, cosine, linear
from vidssl.training.schema import OptimConfig


def schedule(
    config: OptimConfig, step: int, steps: int, momentum: tuple[float, float] | None = (1.0, 1.0)
) -> dict[str, float]:
    """Learning rate, weight decay and EMA momentum (`ema`) at step 0..steps-1.

    lr and weight decay use step + 1, the momentum uses step. momentum: at the first and the last step; None:
    there is no EMA encoder, and no `ema` is returned.
    Source: V-JEPA, app/vjepa/{train,utils}.py and src/utils/schedulers.py; lr_decay: V-JEPA 2 (constant,
    linear when cooling down). Checked against a trace of its training loop.
    """
    total = schedule_length(config, steps)
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
    hparams = {"lr": lr, "weight_decay": cosine(config.weight_decay, final_weight_decay, count / total)}
    if momentum is None:
        return hparams
    return {**hparams, "ema": linear(*momentum, schedule_progress(config, step, steps))}


def schedule_length(config: OptimConfig, steps: int) -> int:
    """Number of steps over which the schedules of a run of `steps` steps are drawn."""
    if config.schedule_steps is not None:
        return config.warmup + config.schedule_steps
    return max(1, int(steps * config.ipe_scale))


def schedule_progress(config: OptimConfig, step: int, steps: int) -> float:
    """Part of the schedules that lies before step 0..steps-1; for Objective.update."""
    return step / schedule_length(config, steps)


def build_optimizer(model: nn.Module, config: OptimConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW; biases and 1-D parameters (norms) have no weight decay, as published.

    With layer_lr_decay there are up to two groups per layer, else up to two in all. fused: one kernel for the
    whole update.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = [layer_of(name) for name, _ in named]
    top = max((layer for layer in layers if layer is not None), default=0) + 1
    own_scales = part_scales(model)
    # (layer, factor on the rate, factor on the decay) -> parameters that are decayed, and the others
    by_scale: dict[tuple[int, float, float], tuple[list[nn.Parameter], list[nn.Parameter]]] = {
        (top, 1.0, 1.0): ([], [])
    }
    for (name, p), layer in zip(named, layers, strict=True):
        level = top if layer is None or config.layer_lr_decay == 1 else layer
        exempt = (
            not config.decay_tokens if is_token_or_position(name) else p.ndim <= 1 or name.endswith(".bias")
        )
        key = (level, *own_scales.get(p, (1.0, 1.0)))
        by_scale.setdefault(key, ([], []))[exempt].append(p)
    groups: list[dict[str, Any]] = []
    for (level, lr_scale, wd_scale), (decayed, not_decayed) in by_scale.items():
        factor = lr_scale * config.layer_lr_decay ** (top - level)
        scale = {} if factor == 1 and config.layer_lr_decay == 1 else {"scale": factor}
        decay_scale = {} if wd_scale == 1 else {"wd_scale": wd_scale}
        groups.append({"params": decayed, "has_weight_decay": True, **scale, **decay_scale})
        groups.append({"params": not_decayed, "has_weight_decay": False, **scale})
    groups = [group for group in groups if group["params"]]  # set_optimizer_state_dict rejects empty ones
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)


def part_scales(model: nn.Module) -> dict[nn.Parameter, tuple[float, float]]:
    """Parameter -> factors on its learning rate and weight decay, of modules that have their own (`lr_scale`,
    `wd_scale`)."""
    scales = {}
    for module in model.modules():
        own: Any = (getattr(module, "lr_scale", 1.0), getattr(module, "wd_scale", 1.0))
        if own != (1.0, 1.0):
            scales.update(dict.fromkeys(module.parameters(), own))
    return scales


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
        decay = hparams["weight_decay"] * group.get("wd_scale", 1.0)
        group["weight_decay"] = decay if group["has_weight_decay"] else 0.0

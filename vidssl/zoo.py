"""Encoders in and out: our own files, and the state dicts of the public reference implementations."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidssl import config
from vidssl.checkpoint import load_weights, save_weights
from vidssl.errors import UserError
from vidssl.model.vit import MODELS, Encoder
from vidssl.objective.objective import Objective
from vidssl.objective.targets import Ema


class Loaded(NamedTuple):
    """An encoder, and what it was trained with."""

    encoder: Encoder
    about: dict[str, Any]  # config (resolved), data (hash), step, versions


def evaluated(objective: Objective) -> Encoder:
    """The encoder that evaluation uses: the momentum encoder where there is one (as V-JEPA does), else the trained."""
    return objective.target.net if isinstance(objective.target, Ema) else objective.encoder


def save_encoders(folder: Path, objective: Objective, about: dict[str, Any], snapshot: bool) -> None:
    """encoder.safetensors: the evaluated one; encoder_online.safetensors where that is not the trained one; with
    `snapshot` also snapshots/step-00000100.safetensors, which stays."""
    weights = evaluated(objective).state_dict()
    save_weights(folder / "encoder.safetensors", weights, about)
    if isinstance(objective.target, Ema):
        save_weights(folder / "encoder_online.safetensors", objective.encoder.state_dict(), about)
    if snapshot:
        (folder / "snapshots").mkdir(exist_ok=True)
        save_weights(folder / "snapshots" / f"step-{about['step']:08d}.safetensors", weights, about)


def load_encoder(where: str, random_init: int | None = None) -> Loaded:
    """where: a run folder or a .safetensors file; random_init: a seed, for the same encoder untrained."""
    path = Path(where)
    path = path / "encoder.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such encoder; give a run folder with encoder.safetensors, or a .safetensors file")
    weights, about = load_weights(path)
    if random_init is not None:
        torch.manual_seed(random_init)
    try:
        cfg = about["config"]
        size = cfg["augment"]["size"]
        encoder = config.build(cfg["model"], MODELS, frames=cfg["data"]["frames"], height=size, width=size)
        if random_init is None:
            encoder.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as e:
        raise UserError(
            f"{path}: its weights are not those its header describes ({' '.join(str(e).split())})"
        ) from None
    return Loaded(encoder.eval().requires_grad_(False), about)


def from_vjepa(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Encoder or predictor of a V-JEPA state dict (keys under `prefix`) -> our names. Positions are made, not read."""
    names = {
        "predictor_embed": "embed",
        "predictor_blocks": "blocks",
        "predictor_norm": "norm",
        "predictor_proj": "proj",
    }
    out = {}
    for key, value in state.items():
        if key.startswith(prefix):
            first, _, rest = key[len(prefix) :].partition(".")
            if first not in ("pos_embed", "predictor_pos_embed", "mask_tokens"):
                out[f"{names.get(first, first)}.{rest}"] = value
    return out


def from_videomae(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Encoder ("encoder.") or decoder ("decoder.") of a VideoMAE state dict -> our names; the key bias, which VideoMAE
    does not have, becomes zero."""
    out = {}
    for key, value in state.items():
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :].replace("head.", "proj.") if prefix == "decoder." else key[len(prefix) :]
        if name.endswith("attn.q_bias"):
            v = state[key.replace("q_bias", "v_bias")]
            out[name.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros_like(value), v])
        elif not name.endswith("attn.v_bias"):
            out[name] = value
    if prefix == "decoder.":
        out["embed.weight"] = state["encoder_to_decoder.weight"]
    return out

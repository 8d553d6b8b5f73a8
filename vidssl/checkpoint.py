"""Checkpoints: written beside and renamed into place, read weights-only."""

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidssl.errors import UserError
from vidssl.files import replace


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """folder/step-00000100.pt; the `keep` newest stay."""
    folder.mkdir(exist_ok=True)
    replace(folder / f"step-{step:08d}.pt", lambda path: torch.save({"step": step, **state}, path))
    for old in _checkpoints(folder)[:-keep]:
        old.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8}\.pt", p.name))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint, on the CPU; None if there is none."""
    found = _checkpoints(folder)
    if not found:
        return None
    try:
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
        if {"step", "model", "optimizer", "scaler", "provenance"} <= state.keys():
            return state
        why = "not a checkpoint of vidssl"
    except (RuntimeError, EOFError, UnpicklingError, OSError, ValueError, AttributeError) as e:
        why = str(e).strip().splitlines()[0]
    raise UserError(f"{found[-1]}: cannot be read ({why}); remove it to continue from the one before, if there is one")


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
    """safetensors with `about` (JSON) in its header, so that the file alone says what it is."""
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    replace(path, lambda beside: save_file(plain, beside, {"vidssl": json.dumps(about, sort_keys=True)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (weights, about)."""
    try:
        with safe_open(path, "pt") as f:
            about = (f.metadata() or {}).get("vidssl")
            weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({e})") from None
    if about is None:
        raise UserError(f"{path}: not an encoder written by vidssl (no description in its header)")
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{path}: some of its weights are not finite: the run that wrote it had diverged")
    return weights, json.loads(about)

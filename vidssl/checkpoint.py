"""Checkpoints: written beside and renamed into place, read weights-only."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidssl.errors import UserError


def _replace(path: Path, write: Any) -> None:
    """write(temporary path), sync it to the disk, rename it to `path`: a kill leaves the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    with open(beside, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(beside, path)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """folder/step-00000100.pt; the `keep` newest stay."""
    folder.mkdir(exist_ok=True)
    _replace(folder / f"step-{step:08d}.pt", lambda path: torch.save({"step": step, **state}, path))
    for old in _checkpoints(folder)[:-keep]:
        old.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8}\.pt", p.name))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint, on the CPU; None if there is none."""
    found = _checkpoints(folder)
    return torch.load(found[-1], map_location="cpu", weights_only=True) if found else None


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
    """safetensors with `about` (JSON) in its header, so that the file alone says what it is."""
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    _replace(path, lambda beside: save_file(plain, beside, {"vidssl": json.dumps(about, sort_keys=True)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (weights, about)."""
    with safe_open(path, "pt") as f:
        about = (f.metadata() or {}).get("vidssl")
        if about is None:
            raise UserError(f"{path}: not an encoder written by vidssl (no description in its header)")
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(about)  # noqa: SIM118

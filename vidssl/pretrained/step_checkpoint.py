"""Reads the encoder of a step checkpoint, RUN/checkpoints/step-00000100, of a pre-training run."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import file_sha256
from vidssl.core.pixels import MEAN, STD
from vidssl.pretrained.infer_config import Checkpoint

NOT_BUILT = ("kind", "drop_path")  # entries of the `model` section that only training needs


def is_step_checkpoint(path: Path) -> bool:
    return (path / "state.json").is_file()


def read_step_checkpoint(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Returns (checkpoint, its provenance): the EMA encoder where the run has one, as a run folder does."""
    try:
        state = json.loads((folder / "state.json").read_text())
        tree = state["provenance"]["config"]
        if "method" not in tree:
            raise UserError(f"{folder} is a fine-tuning checkpoint; give the run's folder")
        weights = folder / "model.safetensors"
        if file_sha256(weights) != state["sha256"]["model"]:
            raise ValueError(f"{weights.name} does not have the hash it was written with")
        tensors = load_file(weights)
        model = {name: value for name, value in tree["model"].items() if name not in NOT_BUILT}
        size = tree["augment"]["size"]
        model |= {"frames": tree["data"]["frames"], "height": size, "width": size}
        header = {**state["provenance"], "step": state["step"]}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise UserError(f"{folder}: cannot be read ({str(e).strip().splitlines()[0]})") from None
    encoder, momentum = (_part(tensors, name) for name in ("encoder", "target.encoder"))
    checkpoint = Checkpoint("vidssl", model, momentum or encoder, {"mean": list(MEAN), "std": list(STD)})
    if momentum:
        checkpoint.online = encoder
    return checkpoint, header


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

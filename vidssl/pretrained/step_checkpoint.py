"""Reads the encoder of a step checkpoint, RUN/checkpoints/step-00000100, of a pre-training run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import file_sha256
from vidssl.core.pixels import MEAN, STD
from vidssl.pretrained.infer_config import Checkpoint

NOT_BUILT = ("kind", "drop_path")  # entries of the `model` section that only training needs


class StoredNames(NamedTuple):
    """Where the state dict of a run has what other runs and evaluations read, as dotted names."""

    evaluated: str  # the encoder that is evaluated: "encoder", or an average of it
    average: str | None  # the EMA encoder; None: there is none
    prediction: str  # before the names of a masked prediction's parts: "", or "terms.0." in a sum


def encoder_of_state(tensors: dict[str, Tensor], model: dict[str, Any], evaluated: str) -> Checkpoint:
    """The evaluated encoder of a run, with the online one where they differ. model: its arguments."""
    pixels = {"mean": list(MEAN), "std": list(STD)}
    checkpoint = Checkpoint("vidssl", model, module_state(tensors, evaluated), pixels)
    if evaluated != "encoder":
        checkpoint.online = module_state(tensors, "encoder")
    return checkpoint


def evaluated_encoder(provenance: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Returns the name of the encoder that a run evaluates, and its arguments."""
    if "encoder" in provenance:
        return provenance["encoder"]["evaluated"], provenance["encoder"]["arguments"]
    # written before the name was: V-JEPA's families were the only ones with an average
    tree = provenance["config"]
    model = {name: value for name, value in tree["model"].items() if name not in NOT_BUILT}
    size = tree["augment"]["size"]
    model |= {"frames": tree["data"]["frames"], "height": size, "width": size}
    has_average = any(name.startswith("target.encoder.") for name in tensors)
    return "target.encoder" if has_average else "encoder", model


def is_step_checkpoint(path: Path) -> bool:
    return (path / "state.json").is_file()


def read_step_checkpoint(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Returns (checkpoint, its provenance): the encoder that the run evaluates, as its folder has it."""
    try:
        state = json.loads((folder / "state.json").read_text())
        tree = state["provenance"]["config"]
        if "method" not in tree:
            raise UserError(f"{folder} is a fine-tuning checkpoint; give the run's folder")
        weights = folder / "model.safetensors"
        if file_sha256(weights) != state["sha256"]["model"]:
            raise ValueError(f"{weights.name} does not have the hash it was written with")
        tensors = load_file(weights)
        evaluated, model = evaluated_encoder(state["provenance"], tensors)
        header = {**state["provenance"], "step": state["step"]}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise UserError(f"{folder}: cannot be read ({str(e).strip().splitlines()[0]})") from None
    return encoder_of_state(tensors, model, evaluated), header


def module_state(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of the module `name`, by their names in it."""
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

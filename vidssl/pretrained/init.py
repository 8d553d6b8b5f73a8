"""Weights between a run and its files: initialisation from a checkpoint, and the files written for
evaluation."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidssl.config import Spec
from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD
from vidssl.model.grid import Grid
from vidssl.model.positions import resize_table
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.objective import Objective
from vidssl.objective.schema import MethodConfig
from vidssl.pretrained.files import native_header, save_native, save_weights
from vidssl.pretrained.infer_config import Checkpoint, token_grid
from vidssl.pretrained.step_checkpoint import StoredNames, encoder_of_state, module_state

TERM = re.compile(r"^terms\.\d+\.")  # before the names of a term of a sum
# First word of a tensor's name -> section of the method
PART_SECTIONS = {"predictor": "predictor", "query": "query", "target": "target"}
PART_SECTIONS |= {"corruption": "corrupt", "score": "score"}


def pretrained_weights(
    objective: Objective, checkpoint: Checkpoint, model: Spec, method: MethodConfig, source: str
) -> dict[str, Tensor]:
    """Weights, by their names in the objective, of encoder, EMA encoder and (where the checkpoint has
    one) predictor.

    model, method: the configuration of the objective; source: the checkpoint's name in error messages.

    The configuration must describe the same networks: rotary and fixed positions, heads and epsilons leave no
    trace in the weights, so that wrong ones would load without an error. Only the native clip size may
    differ: learned positions are then interpolated, fixed and rotary ones are computed for the new size. An
    encoder of pixels with other statistics becomes one of ours.
    """
    check_same_options("model", checkpoint.model, model.arguments, source)
    checkpoint = with_pixels(checkpoint)
    parts = {"encoder": checkpoint.online or checkpoint.encoder}
    names = stored_names(objective)
    if names.average is not None:
        parts[names.average] = checkpoint.encoder
    is_joint = (method.predictor.kind, method.query.kind) == ("joint", "token")
    if is_joint and checkpoint.predictor is not None and checkpoint.query is not None:
        check_same_options("method.predictor", checkpoint.predictor, method.predictor.arguments, source)
        groups = method.query.arguments["groups"]  # V-JEPA 2 has ten mask tokens and uses the first ones
        parts[f"{names.prediction}predictor"] = checkpoint.predictor_weights
        parts[f"{names.prediction}query"] = {"tokens": checkpoint.query[:groups]}
    weights: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        resized = resize_positions(tensors, token_grid(checkpoint.model), objective.encoder.grid)
        weights |= {f"{part}.{name}": tensor for name, tensor in resized.items()}
    prefixes = tuple(f"{part}." for part in parts)
    expected = {name: t.shape for name, t in objective.state_dict().items() if name.startswith(prefixes)}
    if differing := sorted(expected.keys() ^ weights.keys()):
        problem = "is missing" if differing[0] in expected else "is not in the configured model"
        raise UserError(f"run.init: {source} does not fit: {differing[0]} {problem}")
    for name, shape in expected.items():
        if (found := weights[name].shape) != shape:
            raise UserError(f"run.init: {source} does not fit: {name} is {tuple(found)}, not {tuple(shape)}")
    return weights


def with_pixels(checkpoint: Checkpoint) -> Checkpoint:
    """The same encoder for pixels that are normalised as in training (core/pixels.py): its patch embedding
    takes up the difference."""
    statistics = [torch.tensor(checkpoint.pixels[key]) for key in ("mean", "std")]
    ours = torch.tensor(MEAN), torch.tensor(STD)
    if all(torch.allclose(a, b, atol=1e-4) for a, b in zip(statistics, ours, strict=True)):
        return checkpoint
    scale = ours[1] / statistics[1]
    shift = (ours[0] - statistics[0]) / statistics[1]

    def converted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(weights)
        for name in ("patch_embed.proj", "patch_embed_img.proj"):
            if f"{name}.weight" in weights:
                kernel = weights[f"{name}.weight"]
                found[f"{name}.bias"] = weights[f"{name}.bias"] + kernel.sum((2, 3, 4)) @ shift
                found[f"{name}.weight"] = kernel * scale[:, None, None, None]
        return found

    online = None if checkpoint.online is None else converted(checkpoint.online)
    pixels = {"mean": list(MEAN), "std": list(STD)}
    return replace(checkpoint, encoder=converted(checkpoint.encoder), online=online, pixels=pixels)


def stored_names(objective: Objective) -> StoredNames:
    """Where an objective's state dict has what other runs and evaluations read."""
    names = {id(module): name for name, module in objective.named_modules()}
    ema = objective.ema_encoder
    prediction = next((m for m in objective.modules() if isinstance(m, MaskedPrediction)), objective)
    return StoredNames(
        names[id(objective.eval_encoder)],
        None if ema is None else names[id(ema)],
        f"{names[id(prediction)]}.".removeprefix("."),
    )


def same_parts(
    objective: Objective, state: dict[str, Tensor], stored: dict[str, Any], method: dict[str, Any]
) -> dict[str, str]:
    """Name of a tensor of the objective -> its name in `state`, of the parts that both methods have.

    stored, method: the `method` sections of the checkpoint and of this run. A part is the same if its kind
    is, and a tensor fits if its shape does; a term of a sum is found outside of sums, too.
    """

    def kinds(section: dict[str, Any], part: str) -> Any:
        if part == "aux":
            return [aux["kind"] for aux in section.get("aux", [])]
        if part == "encoder":
            return None
        if part in PART_SECTIONS:
            return section.get(PART_SECTIONS[part], {}).get("kind")
        return [section.get(formula, {}).get("kind") for formula in ("agree", "pretext")]

    plain = {TERM.sub("", name): name for name in reversed(state)}
    found = {}
    for name, tensor in objective.state_dict().items():
        same = name if name in state else plain.get(TERM.sub("", name))
        part = TERM.sub("", name).split(".")[0]
        fits = same is not None and state[same].shape == tensor.shape
        if same is not None and fits and kinds(stored, part) == kinds(method, part):
            found[name] = same
    return found


def resize_positions(weights: dict[str, Tensor], old: Grid, new: Grid) -> dict[str, Tensor]:
    """Weights of an encoder or predictor with learned positions interpolated from one grid to another."""
    for name, axes in (("table", "thw"), ("time", "t"), ("space", "hw")):
        key = f"positions.{name}"
        source, target = (
            Grid(*(n if axis in axes else 1 for axis, n in zip("thw", grid, strict=True)))
            for grid in (old, new)
        )
        if key in weights and source != target:
            weights = {**weights, key: resize_table(weights[key], source, target)}
    return weights


def check_same_options(section: str, stored: dict[str, Any], ours: dict[str, Any], source: str) -> None:
    """Raises UserError naming the key to change if `ours` describes another network than `stored`."""
    for key in stored.keys() & ours.keys():
        a: Any = _as_list(stored[key])
        b: Any = _as_list(ours[key])
        if not (math.isclose(a, b, rel_tol=1e-3) if isinstance(a, float) else a == b):
            raise UserError(f"run.init: {source} has {section}.{key}={a}, not {b}: set that")


def _as_list(value: Any) -> Any:
    """A header holds lists where the configuration has tuples."""
    return list(value) if isinstance(value, tuple) else value


def to_checkpoint(
    objective: Objective, model: dict[str, Any], predictor: Spec, state: dict[str, Tensor]
) -> Checkpoint:
    """The checkpoint of a run. model: arguments of its Encoder; state: the full state dict of the
    objective."""
    checkpoint = encoder_of_state(state, model, stored_names(objective).evaluated)
    add_joint_predictor(checkpoint, predictor, state)
    return checkpoint


def add_joint_predictor(checkpoint: Checkpoint, predictor: Spec, state: dict[str, Tensor]) -> None:
    """Adds the predictor of a run, which other runs can start from and other formats have, if it is joint.

    state: the full state dict of the run's objective.
    """
    tokens = next((name for name in state if TERM.sub("", name) == "query.tokens"), None)
    if predictor.kind != "joint" or tokens is None:
        return
    weights = module_state(state, tokens.removesuffix("query.tokens") + "predictor")
    checkpoint.predictor_weights = weights
    checkpoint.predictor = {**predictor.arguments, "out": weights["proj.weight"].shape[0]}
    checkpoint.query = state[tokens]


def save_run_encoder(
    out: Path, checkpoint: Checkpoint, metadata: dict[str, Any], snapshot: bool, is_best: bool = False
) -> None:
    """Writes encoder.safetensors and its companions; with `snapshot` also
    snapshots/step-00000100.safetensors, which is never overwritten, and with `is_best`
    encoder_best.safetensors."""
    save_native(out, checkpoint, metadata)
    header = native_header(checkpoint, metadata)
    if is_best:
        save_weights(out / "encoder_best.safetensors", checkpoint.encoder, header)
    if snapshot:
        folder = out / "snapshots"
        folder.mkdir(exist_ok=True)
        save_weights(folder / f"step-{metadata['step']:08d}.safetensors", checkpoint.encoder, header)

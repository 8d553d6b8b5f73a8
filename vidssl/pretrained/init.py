"""Weights between a run and its files: initialisation from a checkpoint, and the files written for
evaluation."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from vidssl.config import Spec
from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD
from vidssl.model.grid import Grid
from vidssl.model.positions import resize_table
from vidssl.objective.objective import Objective
from vidssl.objective.schema import MethodConfig
from vidssl.pretrained.files import native_header, save_native, save_weights
from vidssl.pretrained.infer_config import Checkpoint, token_grid


def pretrained_weights(
    objective: Objective, checkpoint: Checkpoint, model: Spec, method: MethodConfig, source: str
) -> dict[str, Tensor]:
    """Weights, by their names in the objective, of encoder, EMA encoder and (where the checkpoint has
    one) predictor.

    model, method: the configuration of the objective; source: the checkpoint's name in error messages.

    The configuration must describe the same networks: rotary and fixed positions, heads and epsilons leave no
    trace in the weights, so that wrong ones would load without an error. Only the native clip size may
    differ: learned positions are then interpolated, fixed and rotary ones are computed for the new size.
    """
    check_same_options("model", checkpoint.model, model.arguments, source)
    parts = {"encoder": checkpoint.online or checkpoint.encoder}
    if (ema_name := ema_encoder_name(objective)) is not None:
        parts[ema_name] = checkpoint.encoder
    is_joint = (method.predictor.kind, method.query.kind) == ("joint", "token")
    if is_joint and checkpoint.predictor is not None and checkpoint.query is not None:
        check_same_options("method.predictor", checkpoint.predictor, method.predictor.arguments, source)
        groups = method.query.arguments["groups"]  # V-JEPA 2 has ten mask tokens and uses the first ones
        parts["predictor"] = checkpoint.predictor_weights
        parts["query"] = {"tokens": checkpoint.query[:groups]}
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


def ema_encoder_name(objective: Objective) -> str | None:
    """Dotted name of the EMA encoder within the objective; None where there is none."""
    ema = objective.ema_encoder
    return None if ema is None else next(name for name, m in objective.named_modules() if m is ema)


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

    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}

    pixels = {"mean": list(MEAN), "std": list(STD)}
    ema_name = ema_encoder_name(objective)
    is_online = ema_name is None or objective.eval_encoder is objective.encoder
    checkpoint = Checkpoint("vidssl", model, part("encoder" if is_online else str(ema_name)), pixels)
    if not is_online:
        checkpoint.online = part("encoder")
    if predictor.kind == "joint" and "query.tokens" in state:
        checkpoint.predictor = {**predictor.arguments, "out": state["predictor.proj.weight"].shape[0]}
        checkpoint.predictor_weights = part("predictor")
        checkpoint.query = state["query.tokens"]
    return checkpoint


def save_run_encoder(out: Path, checkpoint: Checkpoint, metadata: dict[str, Any], snapshot: bool) -> None:
    """Writes encoder.safetensors and its companions; with `snapshot` also
    snapshots/step-00000100.safetensors, which is never overwritten."""
    save_native(out, checkpoint, metadata)
    if snapshot:
        folder = out / "snapshots"
        folder.mkdir(exist_ok=True)
        header = native_header(checkpoint, metadata)
        save_weights(folder / f"step-{metadata['step']:08d}.safetensors", checkpoint.encoder, header)

"""Weights between a run and its files: what it starts from, and what it leaves for evaluation and conversion."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vidssl.checkpoint import save_weights
from vidssl.errors import UserError
from vidssl.objective.objective import Objective
from vidssl.objective.targets import MEAN, STD, Ema
from vidssl.zoo import native
from vidssl.zoo.describe import Checkpoint


def start_from(objective: Objective, cfg: dict[str, Any]) -> None:
    """The weights of run.init, ours or public, into encoder, momentum encoder and (where the file has one) predictor.

    The configuration must describe the same networks: rotary and fixed positions, heads and epsilons leave no trace in
    the weights, so that a wrong one would load. Only the native size of a clip may differ.
    """
    where = cfg["run"]["init"]
    found, _ = native.read(where)
    check_same("model", found.model, cfg["model"], where)
    parts: list[tuple[nn.Module, dict[str, Tensor]]] = [(objective.encoder, found.online or found.encoder)]
    if isinstance(objective.target, Ema):
        parts.append((objective.target.net, found.encoder))
    if found.predictor is not None and found.query is not None:
        check_same("method.predictor", found.predictor, cfg["method"]["predictor"], where)
        groups = cfg["method"]["query"]["groups"]  # V-JEPA 2 has ten mask tokens, of which it uses the first
        parts += [(objective.predictor, found.predictor_weights), (objective.query, {"tokens": found.query[:groups]})]
    for module, weights in parts:
        try:
            module.load_state_dict(weights)
        except RuntimeError as e:
            raise UserError(f"run.init: {where} does not fit: {' '.join(str(e).split())}") from None


def check_same(section: str, theirs: dict[str, Any], ours: dict[str, Any], where: str) -> None:
    """An error that says what to set, where `ours` describes another network than `theirs`."""
    for key in theirs.keys() & ours.keys():
        a, b = theirs[key], ours[key]
        a = list(a) if isinstance(a, tuple) else a
        if not (math.isclose(a, b, rel_tol=1e-3) if isinstance(a, float) else a == b):
            raise UserError(f"run.init: {where} has {section}.{key}={a}, not {b}: set that")


def as_checkpoint(objective: Objective, cfg: dict[str, Any]) -> Checkpoint:
    """What a run has learned. cfg: the resolved configuration it was made from."""
    size, predictor = cfg["augment"]["size"], dict(cfg["method"]["predictor"])
    model = {k: v for k, v in cfg["model"].items() if k != "kind"}
    model |= {"frames": cfg["data"]["frames"], "height": size, "width": size}
    found = Checkpoint("vidssl", model, objective.evaluated.state_dict(), {"mean": list(MEAN), "std": list(STD)})
    if isinstance(objective.target, Ema):
        found.online = objective.encoder.state_dict()
    if predictor.pop("kind") == "joint":
        found.predictor = {**predictor, "out": objective.target.width}
        found.predictor_weights, found.query = objective.predictor.state_dict(), objective.query.state_dict()["tokens"]
    return found


def save_run(out: Path, objective: Objective, about: dict[str, Any], snapshot: bool) -> None:
    """What `objective` has learned, as `write_run` writes it."""
    write_run(out, as_checkpoint(objective, about["config"]), about, snapshot)


def write_run(out: Path, found: Checkpoint, about: dict[str, Any], snapshot: bool) -> None:
    """encoder.safetensors and what stands beside it; with `snapshot` also snapshots/step-00000100, which stays."""
    native.save(out, found, about)
    if snapshot:
        place = out / "snapshots"
        place.mkdir(exist_ok=True)
        save_weights(place / f"step-{about['step']:08d}.safetensors", found.encoder, native.header(found, about))

"""Weights between a run and its files: what it starts from, and what it leaves for evaluation and conversion."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD
from vidssl.model.grid import Grid
from vidssl.model.positions import resize_table
from vidssl.objective.objective import Objective
from vidssl.objective.targets import Ema
from vidssl.pretrained import files
from vidssl.pretrained.files import save_weights
from vidssl.pretrained.infer_config import Checkpoint, grid_of
from vidssl.training.checkpoint import read_checkpoint


def start_from(objective: Objective, cfg: dict[str, Any]) -> None:
    """The weights of run.init into encoder, momentum encoder and (where there is one) predictor. It names a run, a
    public checkpoint, or one of a run's own (RUN/checkpoints/step-00000100).

    The configuration must describe the same networks: rotary and fixed positions, heads and epsilons leave no trace in
    the weights, so that a wrong one would load. Only the native size of a clip may differ: learned places are then
    interpolated, fixed and rotary ones are those of the new size.
    """
    where = cfg["run"]["init"]
    found = (
        of_step(Path(where), objective) if (Path(where) / "state.json").is_file() else files.read(where)[0]
    )
    check_same("model", found.model, cfg["model"], where)
    parts: list[tuple[nn.Module, dict[str, Tensor]]] = [(objective.encoder, found.online or found.encoder)]
    if isinstance(objective.target, Ema):
        parts.append((objective.target.encoder, found.encoder))
    if found.predictor is not None and found.query is not None:
        check_same("method.predictor", found.predictor, cfg["method"]["predictor"], where)
        groups = cfg["method"]["query"]["groups"]  # V-JEPA 2 has ten mask tokens, of which it uses the first
        parts += [
            (objective.predictor, found.predictor_weights),
            (objective.query, {"tokens": found.query[:groups]}),
        ]
    for module, weights in parts:
        try:
            module.load_state_dict(refit(weights, grid_of(found.model), objective.encoder.grid))
        except RuntimeError as e:
            raise UserError(f"run.init: {where} does not fit: {' '.join(str(e).split())}") from None


def refit(weights: dict[str, Tensor], old: Grid, new: Grid) -> dict[str, Tensor]:
    """The weights of an encoder or predictor with its learned places interpolated from one grid to another."""
    for name, axes in (("table", "thw"), ("time", "t"), ("space", "hw")):
        key = f"positions.{name}"
        a, b = (
            Grid(*(n if axis in axes else 1 for axis, n in zip("thw", g, strict=True))) for g in (old, new)
        )
        if key in weights and a != b:
            weights = {**weights, key: resize_table(weights[key], a, b)}
    return weights


def of_step(place: Path, objective: Objective) -> Checkpoint:
    """What a run had learned by the step of one of its checkpoints."""
    try:
        state = read_checkpoint(place)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"run.init: {place}: cannot be read ({str(e).strip().splitlines()[0]})") from None
    cfg = state["provenance"]["config"]
    if "method" not in cfg:
        raise UserError(f"run.init: {place} is not of a pre-training run; give the run's folder")
    return as_checkpoint(objective, cfg, state["model"])


def check_same(section: str, theirs: dict[str, Any], ours: dict[str, Any], where: str) -> None:
    """An error that says what to set, where `ours` describes another network than `theirs`."""
    for key in theirs.keys() & ours.keys():
        a, b = theirs[key], ours[key]
        a = list(a) if isinstance(a, tuple) else a
        if not (math.isclose(a, b, rel_tol=1e-3) if isinstance(a, float) else a == b):
            raise UserError(f"run.init: {where} has {section}.{key}={a}, not {b}: set that")


def model_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Encoder, but for what only training knows. cfg: the resolved configuration of a run."""
    model = {k: v for k, v in cfg["model"].items() if k not in ("kind", "drop_path")}
    return model | {
        "frames": cfg["data"]["frames"],
        "height": cfg["augment"]["size"],
        "width": cfg["augment"]["size"],
    }


def as_checkpoint(objective: Objective, cfg: dict[str, Any], learned: dict[str, Tensor]) -> Checkpoint:
    """What a run has learned. cfg: the resolved configuration it was made from; learned: the objective's state dict,
    whole."""

    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in learned.items() if k.startswith(f"{name}.")}

    predictor, slow = dict(cfg["method"]["predictor"]), part("target.encoder")
    found = Checkpoint(
        "vidssl", model_of(cfg), slow or part("encoder"), {"mean": list(MEAN), "std": list(STD)}
    )
    if slow:
        found.online = part("encoder")
    if predictor.pop("kind") == "joint":
        found.predictor = {**predictor, "out": objective.target.width}
        found.predictor_weights, found.query = part("predictor"), learned["query.tokens"]
    return found


def write_run(out: Path, found: Checkpoint, about: dict[str, Any], snapshot: bool) -> None:
    """encoder.safetensors and what stands beside it; with `snapshot` also snapshots/step-00000100, which stays."""
    files.save(out, found, about)
    if snapshot:
        place = out / "snapshots"
        place.mkdir(exist_ok=True)
        save_weights(
            place / f"step-{about['step']:08d}.safetensors", found.encoder, files.header(found, about)
        )

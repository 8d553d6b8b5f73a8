"""What a run starts from: of a step of the same method everything, of another one what both have."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vidssl.config import to_tree
from vidssl.objective.objective import Objective
from vidssl.pretrained.init import stored_names
from vidssl.pretrained.step_checkpoint import encoder_of_state, evaluated_encoder
from vidssl.training.state import initial_weights

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import small

# Parts that own weights: predictors of several kinds, clusters, a token, averages, projectors, a task.
SAME = ["capi", "maskfeat", "hpm", "levjepa", "byol", "siammae", "pretext_order", "vjepa"]


def save(monkeypatch, folder: Path, method: str) -> dict[str, Any]:
    """A step of a method with other weights than a fresh run's; AdamW's moments are named by parameter."""
    cfg = small(method, "run.seed=5")
    objective = cfg.build_objective()
    moments = {name: {"exp_avg": p.detach()} for name, p in objective.named_parameters() if p.requires_grad}
    names = {"arguments": cfg.encoder_arguments(), "evaluated": stored_names(objective).evaluated}
    saved = {
        "provenance": {"config": to_tree(cfg), "encoder": names},
        "optimizer": {"state": moments, "param_groups": []},
        "model": objective.state_dict(),
    }
    (folder / "state.json").touch()
    monkeypatch.setattr("vidssl.training.state.read_checkpoint", lambda _: saved)
    return saved


def start(method: str, folder: Path, *more: str) -> tuple[Objective, dict, dict]:
    cfg = small(method, *more)
    objective = cfg.build_objective()
    weights, optimizer = initial_weights(objective, cfg, str(folder))
    assert optimizer is not None
    return objective, weights, optimizer["state"]


@pytest.mark.parametrize("method", SAME)
def test_a_step_of_the_same_method_gives_everything(method, tmp_path, monkeypatch):
    saved = save(monkeypatch, tmp_path, method)
    objective, weights, moments = start(method, tmp_path)
    state = saved["model"]
    assert weights.keys() == state.keys() == objective.state_dict().keys()
    assert all(weights[name].equal(state[name]) for name in state)
    assert moments.keys() == saved["optimizer"]["state"].keys()


@pytest.mark.parametrize(
    "stored, method, shared, fresh",
    [
        ("videomae", "crossmae", (), ("predictor.",)),
        ("mae", "crossmae", (), ("predictor.",)),
        ("videomae", "adamae", ("predictor.", "query."), ("score.",)),
        ("hpm", "mae", ("predictor.", "query."), ()),
    ],
)
def test_another_method_gives_what_both_have_without_moments_of_the_rest(
    stored, method, shared, fresh, tmp_path, monkeypatch
):
    same = ["model.tubelet=2", "data.frames=8", "model.positions=sincos_flat", "model.class_token=false"]
    model = [*same, "model.final_norm=true", "model.init=xavier"]
    cfg_of = small
    monkeypatch.setattr(
        sys.modules[__name__], "small", lambda name, *more: cfg_of(name, *options_of(name, model), *more)
    )
    saved = save(monkeypatch, tmp_path, stored)
    objective, weights, moments = start(method, tmp_path)
    names = objective.state_dict().keys()
    assert all(name in weights for name in names if name.startswith(("encoder.", *shared)))
    assert not any(name.startswith(fresh) for name in weights)
    assert all(weights[name].equal(saved["model"][name]) for name in weights)
    assert moments.keys() <= weights.keys()


def options_of(method: str, model: list[str]) -> list[str]:
    """A model that all methods of these tests can have."""
    own = {"mae": ["method.predictor.class_token=none"], "hpm": ["method.predictor.class_token=none"]}
    own["hpm"] += ["method.score.class_token=none", "method.score.positions=sincos_flat"]
    positions = [] if method in ("adamae", "videomae") else ["method.predictor.positions=sincos_flat"]
    mix = ["method.predictor.memory=last"] if method == "crossmae" else []
    return [*model, *own.get(method, []), *positions, *mix]


@pytest.mark.parametrize(
    "method, evaluated",
    [
        ("levjepa", "average.encoder"),
        ("byol", "encoder"),
        ("vjepa", "target.encoder"),
        ("videomae", "encoder"),
    ],
)
def test_a_step_is_evaluated_as_its_run(method, evaluated, tmp_path, monkeypatch):
    saved = save(monkeypatch, tmp_path, method)
    name, arguments = evaluated_encoder(saved["provenance"], saved["model"])
    assert name == evaluated and arguments == small(method).encoder_arguments()
    found = encoder_of_state(saved["model"], arguments, name)
    assert found.encoder["norm.weight"] is saved["model"][f"{evaluated}.norm.weight"]
    assert (found.online is None) == (evaluated == "encoder")


def test_averages_that_were_not_loaded_start_from_the_encoder():
    objective = small("hpm").build_objective()
    with torch.no_grad():
        for p in objective.encoder.parameters():
            p.add_(1.0)
    objective.start_averages(["encoder.norm.weight", "score.average_encoder.norm.weight"])
    assert not objective.score.average_encoder.norm.weight.equal(objective.encoder.norm.weight)
    objective.start_averages(["encoder.norm.weight"])
    pairs = zip(objective.score.average_encoder.parameters(), objective.encoder.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)

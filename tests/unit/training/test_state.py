"""training/state.py: which runs may be continued, and the limit of rollbacks."""

import copy
from argparse import Namespace
from pathlib import Path

import pytest

from vidssl.config import load_config, to_tree
from vidssl.core.errors import UserError
from vidssl.training.loss_guard import LossGuard
from vidssl.training.schema import TrainConfig, resume_mutable
from vidssl.training.state import RunState, check_same_run

ROOT = Path(__file__).parents[3]
FILES = [str(ROOT / f"configs/{name}.yaml") for name in ("method/vjepa_tiny", "data/quickstart", "run/smoke")]
CONFIG = load_config([*FILES, "model.kind=vit_tiny", "data.train=x", "run.out=x"], TrainConfig)


def check(stored: dict, tree: dict) -> None:
    state = {"step": 1, "provenance": {"data": "hash", "config": stored}}
    provenance = {"data": "hash", "config": tree}
    check_same_run(state, provenance, CONFIG.run.steps, resume_mutable(CONFIG), Path("x"), TrainConfig)


def test_options_added_since_the_checkpoint_have_their_defaults():
    tree = to_tree(CONFIG)
    stored = copy.deepcopy(tree)
    del stored["optim"]["clip_start"]
    check(stored, tree)
    tree["optim"]["clip_start"] = 5
    with pytest.raises(UserError, match=r"optim\.clip_start is 0 there, 5 here"):
        check(stored, tree)


def test_only_mutable_keys_may_change():
    tree = to_tree(CONFIG)
    tree["run"]["save_every"] = 7
    tree["efficiency"]["workers"] = 3
    check(to_tree(CONFIG), tree)
    tree["run"]["seed"] = 1
    with pytest.raises(UserError, match=r"run\.seed is 0 there, 1 here"):
        check(to_tree(CONFIG), tree)


@pytest.mark.parametrize("rollbacks", [1, 2])  # two: the limit was lowered when the run was continued
def test_no_rollback_beyond_the_limit(rollbacks, tmp_path, monkeypatch):
    guard = LossGuard(1, 1, None)
    guard.rollbacks = rollbacks
    strategy = Namespace(barrier=lambda: None)  # without load_state: nothing may be loaded
    state = RunState(strategy, None, None, guard, tmp_path, {}, TrainConfig, 10, ())
    monkeypatch.setattr(state, "_read_newest", lambda: ({}, {"step": 4}))
    with pytest.raises(UserError, match="the limit max_rollbacks=1 is reached"):
        state.rollback(9, "loss nan")

"""training/state.py: which runs may be continued, and the limit of rollbacks."""

import contextlib
import copy
import logging
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from vidssl.config import load_config, to_tree
from vidssl.core.errors import UserError
from vidssl.training.loss_guard import LossGuard
from vidssl.training.schema import TrainConfig, resume_mutable
from vidssl.training.state import RunState, check_same_run, initial_weights

ROOT = Path(__file__).parents[3]
FILES = [str(ROOT / f"configs/{name}.yaml") for name in ("method/vjepa_tiny", "data/quickstart", "run/smoke")]
CONFIG = load_config([*FILES, "model.kind=vit_tiny", "data.train=x", "run.out=x"], TrainConfig)


def check(stored: dict, tree: dict) -> None:
    state = {"step": 1, "provenance": {"data": "hash", "config": stored}}
    provenance = {"data": "hash", "config": tree}
    check_same_run(state, provenance, CONFIG.run.steps, resume_mutable(CONFIG), Path("x"), TrainConfig)


def test_a_run_is_not_continued_with_another_teacher():
    tree = to_tree(CONFIG)
    state = {"step": 1, "provenance": {"data": "hash", "config": tree, "networks": {"t": "1", "moved": "2"}}}
    for digest, refused in (("1", False), ("3", True)):
        now = {"data": "hash", "config": tree, "networks": {"t": digest, "here": "2"}}
        context = pytest.raises(UserError, match="x: t, which this run reads, has changed since")
        with context if refused else contextlib.nullcontext():
            check_same_run(state, now, CONFIG.run.steps, (), Path("x"), TrainConfig)


def test_options_added_since_the_checkpoint_have_their_defaults():
    tree = to_tree(CONFIG)
    stored = copy.deepcopy(tree)
    del stored["optim"]["clip_start"]
    check(stored, tree)
    tree["optim"]["clip_start"] = 5
    with pytest.raises(UserError, match=r"optim\.clip_start is 0 there, 5 here"):
        check(stored, tree)


def test_a_line_names_the_options_that_are_newer_than_the_run(caplog):
    tree = to_tree(CONFIG)
    stored = copy.deepcopy(tree)
    del stored["optim"]["clip_start"]
    del stored["efficiency"]["fused"]
    logger = logging.getLogger("vidssl")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    try:
        check(stored, tree)
    finally:
        logger.removeHandler(caplog.handler)
    assert "newer than this run have their defaults: optim.clip_start, efficiency.fused" in caplog.text


def test_a_run_with_an_option_that_was_removed_is_continued_with_a_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vidssl"), "propagate", True)
    caplog.set_level("INFO", "vidssl")
    tree = to_tree(CONFIG)
    stored = copy.deepcopy(tree)
    stored["efficiency"]["cache_mb"] = 0
    check(stored, tree)
    line = "x: efficiency.cache_mb was removed since and does nothing now; data.cache keeps decoded videos"
    assert set(caplog.messages) == {line}
    stored["efficiency"]["cache_gb"] = 0
    with pytest.raises(UserError, match=r"x: efficiency\.cache_gb: unknown key"):
        check(stored, tree)


@pytest.mark.parametrize("then, now", [("bf16", "fp32"), ("fp32", "fp32")])
def test_another_precision_than_before_is_told(then, now, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vidssl"), "propagate", True)
    stored, tree = to_tree(CONFIG), to_tree(CONFIG)
    stored["efficiency"]["precision"] = then
    tree["efficiency"]["precision"] = now
    check(stored, tree)
    warnings = {r.getMessage() for r in caplog.records if r.levelname == "WARNING"}
    line = (
        "x: efficiency.precision was bf16, the run goes on in fp32: give efficiency.precision=bf16 to keep it"
    )
    assert warnings == ({line} if then != now else set())


def test_weights_of_a_step_with_an_option_that_was_removed_start_a_run(tmp_path, monkeypatch):
    tree = to_tree(CONFIG)
    tree["efficiency"]["cache_mb"] = 0
    objective = CONFIG.build_objective()
    state = objective.state_dict()
    saved = {"provenance": {"config": tree}, "optimizer": {"state": {}}, "model": state}
    (tmp_path / "state.json").touch()
    monkeypatch.setattr("vidssl.training.state.read_checkpoint", lambda _: saved)
    found, optimizer = initial_weights(objective, CONFIG, str(tmp_path))
    assert found.keys() == state.keys() and optimizer == {"state": {}}


def test_a_longer_run_is_refused_with_the_way():
    tree = to_tree(CONFIG)
    tree["run"]["steps"] += 1
    with pytest.raises(UserError, match=r"run\.init of this folder.*optim\.schedule_steps"):
        check(to_tree(CONFIG), tree)


class FakeStrategy:
    """One process."""

    saves_alone = True

    def run_on_main(self, function):
        return function()


@pytest.mark.parametrize("whole, saved, saves", [(3, 2, True), (3, 3, False), (None, 2, False)])
@pytest.mark.parametrize("error", [RuntimeError("fault"), UserError("bad data"), OSError("disk"), None])
def test_the_last_whole_step_is_saved_at_any_end(whole, saved, saves, error, tmp_path, monkeypatch):
    state = RunState(FakeStrategy(), None, None, LossGuard(1, 1, None), tmp_path, {}, TrainConfig, 10, ())
    written = []
    monkeypatch.setattr(state, "save", lambda step, before_write: written.append(step))
    state.whole_step = whole
    state.saved_step = saved
    with contextlib.suppress(RuntimeError, UserError, OSError), state.save_last_step(lambda: None):
        if error:
            raise error
    assert written == ([whole] if saves else [])


def test_a_disk_without_room_for_the_checkpoints_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    model = torch.nn.Linear(1000, 1000)
    state = RunState(FakeStrategy(), model, None, LossGuard(1, 1, None), tmp_path, {}, TrainConfig, 10, ())
    needed = 3 * 3 * 4 * 1001 * 1000 + 4 * 1001 * 1000  # weights and two moments, f32, and the encoder
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    state.check_space()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match=r"3 checkpoints .* GB free"):
        state.check_space()


def test_only_mutable_keys_may_change():
    tree = to_tree(CONFIG)
    tree["run"]["save_every"] = 7
    tree["efficiency"]["workers"] = 3
    check(to_tree(CONFIG), tree)
    tree["run"]["seed"] = 1
    with pytest.raises(UserError, match=r"run\.seed is 0 there, 1 here"):
        check(to_tree(CONFIG), tree)


@pytest.mark.parametrize("rollbacks", [1, 2])  # two: the limit was lowered when the run was continued
def test_no_rollback_beyond_the_limit(rollbacks, tmp_path):
    guard = LossGuard(1, 1, None)
    guard.rollbacks = rollbacks
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    # without load_state, and an empty checkpoint: nothing may be read or loaded
    strategy = Namespace(run_on_main=lambda function: function())
    state = RunState(strategy, None, None, guard, tmp_path, {}, TrainConfig, 10, ())
    with pytest.raises(UserError, match="the limit max_rollbacks=1 is reached"):
        state.rollback(9, "loss nan")

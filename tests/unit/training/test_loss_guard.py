"""LossGuard against losses and gradients that are never finite, and checkpoints of weights that are not."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vidssl.training.loss_guard import SCALER_SKIPS, LossGuard
from vidssl.training.schema import TrainConfig
from vidssl.training.state import RunState

GOOD = {"loss": 1.0, "grad_norm": 1.0}
TOLERATED = 2


def steps_until_rollback(guard: LossGuard, metrics: dict[str, float], limit: int = 1000) -> int:
    for step in range(1, limit):
        guard.check_step(metrics)
        if guard.should_rollback:
            return step
    return limit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "both"])
def test_whatever_is_never_finite_is_counted_and_stopped(name, scaled, value):
    guard = LossGuard(TOLERATED, 1, None, has_grad_scaler=scaled)
    metrics = GOOD | dict.fromkeys(GOOD if name == "both" else [name], value)
    overflows = SCALER_SKIPS if scaled and name == "grad_norm" else 0
    steps = steps_until_rollback(guard, metrics)
    assert steps == TOLERATED + overflows + 1 == guard.skipped
    guard.end_skips()  # rolled back, and the same again
    assert steps_until_rollback(guard, metrics) == steps


def test_a_scale_that_is_found_ends_the_count():
    guard = LossGuard(0, 1, None, has_grad_scaler=True)
    for _ in range(5):
        for _ in range(SCALER_SKIPS):
            assert guard.check_step(GOOD | {"grad_norm": math.inf}) == "grad_norm inf"
            assert not guard.should_rollback
        assert guard.check_step(GOOD) is None
    assert guard.skipped == 5 * SCALER_SKIPS


def test_overflows_do_not_excuse_losses():
    guard = LossGuard(TOLERATED, 1, None, has_grad_scaler=True)
    for _ in range(4):
        guard.check_step(GOOD | {"grad_norm": math.inf})
    assert steps_until_rollback(guard, GOOD | {"loss": math.nan}) == TOLERATED + 1


def test_the_count_goes_on_after_a_restart():
    guard = LossGuard(TOLERATED, 1, None, has_grad_scaler=True)
    for _ in range(SCALER_SKIPS):
        guard.check_step(GOOD | {"grad_norm": math.nan})
    again = LossGuard(TOLERATED, 1, None, has_grad_scaler=True)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    assert steps_until_rollback(again, GOOD | {"grad_norm": math.nan}) == TOLERATED + 1


def test_a_real_grad_scaler_is_stopped():
    """Finite loss, gradients that overflow at every scale: the weights stay as they are."""
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    guard = LossGuard(TOLERATED, 1, None, has_grad_scaler=True)
    while not guard.should_rollback:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).sum()
        scaler.scale(loss).backward()
        model.weight.grad.mul_(math.inf)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        reason = guard.check_step({"loss": loss.item(), "grad_norm": float(norm)})
        assert reason is not None and guard.skipped < 50
        scaler.update()
    assert model.weight.equal(before) and scaler.get_scale() < 1


@pytest.mark.parametrize("name", ["encoder.weight", "target.encoder.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_written(name, value, tmp_path):
    weights = {"encoder.weight": torch.ones(3), "target.encoder.weight": torch.ones(3), "n": torch.tensor(1)}
    weights[name][1] = value
    strategy = SimpleNamespace(full_state=lambda *_: {"model": weights}, is_main=True)
    state = RunState(strategy, None, None, LossGuard(1, 1, None), tmp_path, {}, TrainConfig, 10, ())
    with state.writer:
        state.save(4, lambda: None)
        state.writer.wait()
        (line,) = state.writer.pop_errors()
    assert line == (
        f"the checkpoint of step 4 could not be written: {name} is not finite; earlier checkpoints are kept"
    )
    assert not list(tmp_path.iterdir())

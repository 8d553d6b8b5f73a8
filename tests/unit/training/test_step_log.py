"""run.log_every: the device decides about steps as the host does, and a row sums several of them up."""

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_host_reads import step_log
from test_optim import Operations
from torch import nn

from vidssl.training.distributed import Strategy
from vidssl.training.loss_guard import MIN_HISTORY, LossGuard
from vidssl.training.step_log import ReadStep, sum_up

LOSSES = [1.0, 2.0, math.nan, 3.0, math.inf, 1.0, 9.0, 1.0]


def take_steps(every: int, fused: bool) -> tuple[dict[str, torch.Tensor], LossGuard, int]:
    """Weights and moments after LOSSES, the guard, and how often the host read a number in a step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    strategy = Strategy(Accelerator(cpu=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    log = step_log(every, strategy)
    log.guard.loss_spike_std = 2.0
    for values in log.guard.history.values():
        values.extend([1.0, 3.0] * (MIN_HISTORY // 2))
    log.guard.limits = log.guard._limits()
    reads = 0
    for step, loss in enumerate(LOSSES, 1):
        for p in model.parameters():
            p.grad = torch.full_like(p, loss)
        with Operations() as seen:
            norm = torch.tensor(1.0)
            accepted = log.add(step, {"loss": torch.tensor(loss)}, norm, {"stop": 0}, {})
            strategy.step_if(optimizer, accepted)
        reads += seen.counts["_local_scalar_dense"] + seen.counts["item"]
    log.read()
    moments = {f"{name} {i}": v for i, s in enumerate(optimizer.state.values()) for name, v in s.items()}
    return {**model.state_dict(), **moments}, log.guard, reads


@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_skipped_on_the_device_as_on_the_host(fused):
    """A kernel that cannot be told on the device costs a read a step."""
    want, guard, _ = take_steps(1, fused)
    got, guard_of_rows, reads = take_steps(10, fused)
    assert all(got[name].equal(value) for name, value in want.items())
    assert guard.skipped == guard_of_rows.skipped == 3  # two are not finite, one is a spike
    assert guard_of_rows.history == guard.history
    assert reads == 0 if fused else reads >= len(LOSSES)


def test_the_limits_stay_until_the_row_is_read_and_in_checkpoints():
    guard = LossGuard(3, 2, 2.0)
    for value in [1.0, 3.0] * (MIN_HISTORY // 2):
        guard.check_step({"loss": value, "grad_norm": 1.0})
    before = guard.limits
    guard.check_step({"loss": 2.0, "grad_norm": 1.0}, keep_limits=True)
    assert guard.limits is before and before["loss"] == 4.0
    again = LossGuard(3, 2, 2.0)
    again.load(guard.state())
    assert again.limits == before
    other = LossGuard(3, 2, 3.0)  # run.loss_spike_std was changed
    other.load(guard.state())
    assert other.limits["loss"] > 4.5


def test_a_row_is_the_mean_of_the_steps_that_were_taken():
    def read(loss: float, reason: str | None = None) -> Any:
        metrics = {"loss": loss, "grad_norm": 2 * loss, "undecodable_samples": 1.0, "hash_0": 5.0}
        return ReadStep(1, ["loss"], metrics, reason)

    counted = {"undecodable_samples": 3, "hash_0": 15}
    steps = [read(1.0), read(math.nan, "loss nan"), read(4.0)]
    assert sum_up(steps) == {"loss": 2.5, "grad_norm": 5.0, **counted}
    assert math.isnan(sum_up([read(math.nan, "loss nan")])["loss"])

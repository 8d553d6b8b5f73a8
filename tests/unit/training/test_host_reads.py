"""A step waits for the device once, when its metrics are read; with run.log_every not even then.

Every method takes two steps on the meta device, on which each read of a value raises, while masks and keys
are drawn on the CPU as in training. What crosses between the two, and what mixes them, is counted. This is
no test on a GPU: it shows neither that copies overlap nor that a kernel exists.
"""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.data.loader import Batch, CollatedBatch, CollatedStep
from vidssl.model.grid import Mask
from vidssl.objective.masks import count_cut_groups, mask_from_scores
from vidssl.training.device_batches import DeviceBatches
from vidssl.training.distributed import Strategy
from vidssl.training.loss_guard import LossGuard
from vidssl.training.micro_batches import PartMaker
from vidssl.training.optim import build_optimizer, schedule, schedule_progress, set_schedule
from vidssl.training.step import forward_backward
from vidssl.training.step_log import StepLog

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import METHODS, make_teacher, small

META = torch.device("meta")
CLIPS = 4


class Crossings(TorchDispatchMode):
    """Counts copies between the CPU and the meta device, and operations on tensors of both."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # a number of the CPU that is no dimension of its own goes with the kernel's arguments
        own = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel() + t.dim() > 1]
        devices = {t.device.type for t in own}
        if devices == {"cpu"} and func is torch.ops.aten._to_copy.default:
            devices |= {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        if len(devices) > 1:
            self.found.append(str(func))
        return out


def meta_strategy() -> Strategy:
    strategy = Strategy(Accelerator(cpu=True))
    strategy.device = META
    return strategy


def step_log(every: int, strategy: Strategy) -> StepLog:
    state: Any = SimpleNamespace(guard=LossGuard(3, 2, None))
    outside: Any = None  # throughput and folder, which a row needs
    return StepLog(every, strategy, state, outside, outside)


def batch_at(step: int, frames: int) -> Batch:
    video = torch.empty(CLIPS, 3, frames, 32, 32, dtype=torch.uint8)
    position = torch.arange(CLIPS) + CLIPS * step
    return Batch(video, torch.zeros(CLIPS), position, [""] * CLIPS, [])


def take_step(
    inputs: DeviceBatches,
    strategy: Strategy,
    objective: Any,
    cfg: Any,
    optimizer: Any,
    step: int,
    log: StepLog,
) -> list[str]:
    """Returns what crossed after the input of the step was made, besides the numbers for the log."""
    parts = next(inputs).parts
    crossings = Crossings()
    with crossings if step else contextlib.nullcontext():
        hparams = schedule(cfg.optim, step, 2, objective.momentum)
        set_schedule(optimizer, hparams)
        optimizer.zero_grad()
        losses = forward_backward(strategy, objective, parts)
        norm = strategy.clip(objective, cfg.optim, step)
    accepted = log.add(step + 1, losses, norm, {"stop": False}, hparams)
    with crossings if step else contextlib.nullcontext():
        optimizer.step()
        objective.update(schedule_progress(cfg.optim, step, 2), accepted)
    assert isinstance(accepted, Tensor) and accepted.device == norm.device == META
    assert all(loss.device == META for loss in losses.values())
    return crossings.found


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_read_from_the_device_in_a_step(method, tmp_path):
    """Constants are uploaded in the first step, nothing in the second. The steps share a row of the log
    (run.log_every), so that not even its numbers are read, and the device decides whether to take them."""
    more = ["model.drop_path=0.3", f"run.batch={CLIPS}", *make_teacher(method, tmp_path)]
    cfg = small(method, *more)
    objective = cfg.build_objective().to(META)
    optimizer = build_optimizer(objective, cfg.optim)
    strategy = meta_strategy()
    make_parts = PartMaker(objective, strategy, 0, 1, partial(count_cut_groups, objective.mask))
    batches = ([batch_at(step, cfg.data.frames)] for step in range(2))
    inputs = DeviceBatches(batches, 0, META, make_parts)
    log = step_log(10, strategy)
    take_step(inputs, strategy, objective, cfg, optimizer, 0, log)
    assert take_step(inputs, strategy, objective, cfg, optimizer, 1, log) == []
    with pytest.raises((NotImplementedError, RuntimeError)):
        log.read()
    with pytest.raises(StopIteration):
        next(inputs)


def test_the_counter_sees_what_crosses():
    with Crossings() as crossings:
        on_meta = torch.zeros(3).to(META)
        _ = on_meta[torch.tensor([0, 2])]
        _ = on_meta * torch.tensor(2.0)  # no tensor of its own
    assert [name.split(".")[1] for name in crossings.found] == ["_to_copy", "index"]
    with pytest.raises((NotImplementedError, RuntimeError)):
        on_meta.sum().item()


class Brightest:
    """Hides the brighter half of the tokens."""

    needs_video = True

    def __call__(self, video: Tensor, grid: Any, rng: KeyedRNG) -> list[Mask]:
        assert video.device.type == "cpu" and video.isfinite().all()
        return [mask_from_scores(video.flatten(1)[:, : grid.n], grid.n // 2)]


@pytest.mark.parametrize("mask", [None, Brightest()])
def test_only_masks_that_look_at_pixels_are_drawn_in_the_forward_pass(mask):
    cfg = small("videomae")
    objective = cfg.build_objective()
    objective.mask = mask or objective.mask
    strategy = Strategy(Accelerator(cpu=True))
    (part,) = PartMaker(objective, strategy, 0)(0, [batch_at(0, cfg.data.frames)])
    assert (part.masks is None) == (mask is not None)
    assert forward_backward(strategy, objective, [part])["loss"].isfinite()


def inputs_of(loader: Callable[[], Any]) -> DeviceBatches:
    make_parts: Any = lambda step, batches: [step]  # noqa: E731
    return DeviceBatches(loader(), 0, torch.device("cpu"), make_parts)


def test_without_a_gpu_nothing_is_ahead():
    asked = []

    def loader():
        for i in range(2):
            asked.append(i)
            yield [batch_at(i, 2)]
        raise UserError("the third")

    inputs = inputs_of(loader)
    given = next(inputs)
    inputs.prefetch()
    assert asked == [0] and given.parts == [0] and next(inputs).parts == [1]
    with pytest.raises(UserError, match="the third"):
        next(inputs)


@pytest.mark.parametrize("error", [UserError("gone"), RuntimeError("gone"), StopIteration()])
def test_an_error_ahead_is_raised_at_its_own_step(error, monkeypatch):
    inputs = inputs_of(lambda: iter([[batch_at(0, 2)]]))
    inputs.side = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def load():
        raise error

    monkeypatch.setattr(inputs, "_load", load)
    inputs.prefetch()
    with pytest.raises(type(error)):
        next(inputs)


def test_pinning_keeps_the_structure_of_a_step(monkeypatch):
    """torch's thread that pins memory walks through named tuples, lists and strings."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda t, *_: pinned.append(t) or t)
    batch = CollatedBatch(torch.zeros(2, 3, 1, 2, 2), [0, 1], [2, 3], ["a", "b"], [])
    step = CollatedStep([batch, batch], None)
    got = pin_memory(step)
    assert isinstance(got, CollatedStep) and isinstance(got.batches[0], CollatedBatch)
    assert len(pinned) == 2 and got.batches[1].positions == [2, 3] and got.exhausted is None
    assert got.batches[0].to_batch().position.tolist() == [2, 3]

"""What a plan says is what a probe takes, within a fifth: FLOPs and memory of heads, and what is read."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidssl.config import load_config
from vidssl.evaluation.feature_cache import FeatureShape
from vidssl.evaluation.features import StoredFeatures
from vidssl.evaluation.heads import Attentive
from vidssl.evaluation.plan import RunSize, head_flops, training_seconds, work_of_run
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.protocol import TrainingSet, select_and_train
from vidssl.evaluation.tasks import Task
from vidssl.training.perf import count_flops

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
FIVE = Task("x", "class", list("abcde"))
TOLERANCE = 0.2


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in its context and alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        if key in self.storages or not size:
            return
        self.storages.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def end() -> None:
            self.storages.discard(key)
            self.now -= size

        weakref.finalize(storage, end)


def training_set(samples: int, tokens: int, width: int) -> TrainingSet:
    torch.manual_seed(0)
    source = StoredFeatures(torch.randn(samples, 2, tokens // 2, width), CPU)
    labels = [n % 5 for n in range(samples)]
    return TrainingSet(source, list(range(samples)), labels, torch.tensor(labels))


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 1, "lr": (1e-3, 1e-2), "weight_decay": (0.0, 0.1, 0.2)},
        {"depth": 4, "lr": (1e-3, 1e-2)},
        {"depth": 4, "lr": (1e-3,), "precision": "bf16"},
        {"depth": 4, "lr": (1e-3, 1e-2), "head_memory_gb": 1e-3},
        {"depth": 4, "lr": (1e-3,), "head_memory_gb": 8e-4, "precision": "bf16"},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_memory_of_heads_in_training(options):
    tokens, width = 128, 64
    protocol = Attentive(segments=2, heads=4, epochs=2, batch=4, **{"precision": "fp32", **options})
    data = training_set(4, tokens, width)
    size = protocol.head_size(width, tokens)
    assert size.recompute == ("head_memory_gb" in options)
    planned = size.state_bytes + size.cast_bytes
    planned += protocol.examples_at_once(width, tokens) * size.example_bytes
    with AllocatedBytes() as allocated:
        protocol.train(FIVE, data, protocol.hyperparameters())
    assert allocated.peak == pytest.approx(planned, rel=TOLERANCE)


@pytest.mark.parametrize("depth", [1, 3])
def test_flops_of_a_row(depth, monkeypatch):
    """Training, selection and prediction, counted in the programs that do them."""
    protocol = Attentive(segments=2, heads=4, depth=depth, epochs=2, batch=8, lr=(1e-3, 1e-2))
    data = training_set(30, 32, 48)
    test = training_set(10, 32, 48)
    original = Attentive.predict

    def predict(self: Attentive, models: list[nn.Module], *arguments: Any) -> torch.Tensor:
        # torch's counter fails on weights with gradients in a forward pass without
        for model in models:
            model.requires_grad_(False)
        return original(self, models, *arguments)

    monkeypatch.setattr(Attentive, "predict", predict)
    with count_flops() as counted:
        probe = select_and_train(protocol, FIVE, data, [str(n) for n in range(30)])
        protocol.predict([probe.model], test.source, test.indices, FIVE)
        total = counted()
    work = work_of_run(RunSize(30, 6, 10), protocol)
    planned = head_flops(protocol, data.source.shape, 5).of(work)
    assert planned == pytest.approx(total, rel=TOLERANCE)


def test_rates_are_measured_with_the_heads_that_are_trained():
    protocol = Attentive(segments=2, heads=4, depth=2, epochs=3, batch=8, lr=(1e-3, 1e-2))
    shape = FeatureShape(100, 2, 8, 16)
    for task in (FIVE, Task("x", "tags", ["a", "b"]), Task("x", "number", ["x"])):
        flops = head_flops(protocol, shape, task.num_outputs)
        one, grid = training_seconds(protocol, shape, task, flops, CPU)
        assert 0 < one < grid == 2 * one


def test_the_grid_of_vjepa2_on_240000_videos():
    """By hand: a block has 24 D^2 FLOPs a token in products with weights and 4 N D in attention; the backward
    pass has twice as many."""
    required = ["encoder=x", "out=x", "data.train=x", "data.test=x", "probe.precision=bf16"]
    path = str(ROOT / "configs/probe/attentive_vjepa2.yaml")
    protocol = load_config([path, *required], ProbeConfig).probe.build()
    shape = FeatureShape(240_000, 2, 1568, 1024)
    protocol = protocol.fitted_to(shape.width, shape.tokens, 16)
    flops = head_flops(protocol, shape, 400)
    tokens = 2 * 1568
    by_hand = 3 * tokens * (24 * 1024**2 + 4 * tokens * 1024)
    assert flops.forward == pytest.approx(by_hand, rel=0.05)
    assert flops.training == pytest.approx(3 * by_hand, rel=0.05)
    work = work_of_run(RunSize(240_000, 48_000, 20_000), protocol)
    assert work.grid == 20 * 192_000 and work.single == 20 * 240_000
    assert flops.of(work) == pytest.approx(20 * 192_000 * 20 * 3 * by_hand * 1.08, rel=0.1)
    size = protocol.head_size(1024, tokens)
    at_once = protocol.examples_at_once(1024, tokens)
    assert 15e9 < size.state_bytes < 17e9 and 14e9 < at_once * size.example_bytes <= 16e9
    assert not size.recompute
    assert replace(protocol, head_memory_gb=0.3).head_size(1024, tokens).recompute

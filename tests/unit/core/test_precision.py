"""The precision `auto`, without a GPU: torch is told of devices that are not there."""

import pytest
import torch
from accelerate.state import AcceleratorState

from vidssl.core.precision import resolve_precision, use_tf32
from vidssl.training.distributed import Strategy
from vidssl.training.schema import EfficiencyConfig


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ([], "fp32"),
        ([(7, 5)], "fp32"),
        ([(8, 0)], "bf16"),
        ([(9, 0), (9, 0)], "bf16"),
        ([(9, 0), (7, 0)], "fp32"),
    ],
)
def test_auto_is_bf16_where_every_gpu_has_it(capabilities, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert resolve_precision("auto") == precision
    assert [resolve_precision(name) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize(("given", "precision"), [("auto", "fp32"), ("bf16", "bf16")])
def test_a_strategy_tells_the_precision_that_it_resolved(given, precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    strategy = Strategy.from_env(EfficiencyConfig(precision=given))
    assert strategy.precision == precision
    with strategy.autocast():
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_tf32_is_for_gpus(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    use_tf32()
    assert chosen == (["high"] if has_gpu else [])

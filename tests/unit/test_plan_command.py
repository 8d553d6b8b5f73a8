"""vidssl plan: what it prints, by whom the model is shared, and what it refuses."""

import json
from pathlib import Path

import pytest

from vidssl.commands import plan
from vidssl.core.errors import UserError
from vidssl.planning.device_memory import FLOAT, ParameterCount, in_parts, planned_memory
from vidssl.planning.devices import DEVICES, parse_devices
from vidssl.planning.step_memory import StepMemory
from vidssl.training.flops import published_peak

ROOT = Path(__file__).parents[2]
TINY = [
    str(ROOT / "configs/method/vjepa_tiny.yaml"),
    str(ROOT / "configs/model/vit_micro.yaml"),
    "data.frames=8",
    "data.stride=2",
    "augment.kind=center_crop",
    "augment.size=16",
    "run.steps=100",
    "run.batch=16",
]
COUNT = ParameterCount(encoder=900, others=100, frozen=900, largest_block=100, outside_blocks=200)
STEP = StepMemory(clips=8, kept=80_000, peak=100_000, peak_beside=98_000, casts=2_000)


def planned(capsys, *arguments: str) -> dict:
    plan.main([*TINY, *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_plan_adds_up(capsys):
    found = planned(capsys, "--gpus", "2xH100", "--hosts", "2", "--mfu", "0.4", "--videos", "100")
    rate = 4 * 0.4 * 989.4e12
    assert found["flops_run"] == pytest.approx(100 * 16 * found["flops_clip"])
    assert found["run_s"] == pytest.approx(found["flops_run"] / rate)
    assert found["clips_s"] == pytest.approx(100 * 16 / found["run_s"])
    assert found["joules"] == pytest.approx(4 * 700 * 1.5 * found["run_s"])
    assert found["cores"] == pytest.approx(found["clips_s"] * 0.0477)
    assert found["memory"]["total"] == sum(v for k, v in found["memory"].items() if k != "total")
    count = found["parameters"]
    assert found["memory"]["weights"] == 4 * (count["encoder"] + count["others"])
    assert found["parameters"]["frozen"] == count["encoder"]  # the momentum encoder
    assert found["corpus"]["videos"] == 100
    assert found["assumptions"]["mfu"] == 0.4


def test_a_plan_is_read_by_people(capsys):
    plan.main([*TINY, "--gpus", "H100", "efficiency.micro_batches=2"])
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == [
        "model",
        "memory of a device (bf16, 16 clips in 2 micro-batches)",
        "time",
        "data",
        "failures",
        "assumed",
    ]
    for needed in ("fits", "kWh", "cores for decoding", "best run.save_every", "--mfu", "--mtbf"):
        assert needed in text


def test_what_is_here_is_measured(capsys, synthetic_shards):
    found = planned(capsys, "--gpus", "4xCPU", "--measure", "3", f"data.train={synthetic_shards}/train")
    assert found["corpus"]["videos"] == 60
    assert found["corpus"]["size_bytes"] > 0
    assert 0 < found["assumptions"]["cpu_ms"] != 47.7
    assert found["config"]["sharding"] == "none"


def test_strategies_share_what_they_say():
    def memory(sharding, micro_batches=1):
        return planned_memory(COUNT, STEP, sharding, 4, micro_batches, 500, rounded=True)

    weights = FLOAT * COUNT.trained
    none = memory("none")
    assert (none.weights, none.moments, none.gradients) == (weights, 2 * weights, 0)
    assert none.total == 3 * weights + FLOAT * COUNT.frozen + STEP.peak + 1000
    assert memory("none", 2).gradients == weights
    assert memory("ddp").gradients == weights
    assert memory("zero1").moments == memory("zero2").moments == memory("fsdp2").moments == weights // 2
    sharded = memory("fsdp2")
    assert sharded.weights == weights // 4 + 2 * (2 * COUNT.largest_block + COUNT.outside_blocks)
    assert sharded.frozen == FLOAT * COUNT.frozen // 4
    assert sharded.activations == STEP.kept - STEP.casts
    half = in_parts(STEP, 2)
    assert (half.clips, half.kept, half.casts) == (4, 2_000 + 39_000, 2_000)


def test_what_does_not_fit_is_told_with_what_would(capsys, monkeypatch):
    small = DEVICES["4090"]._replace(memory_bytes=1_012_000_000)
    monkeypatch.setitem(DEVICES, "4090", small)
    found = planned(capsys, "--gpus", "4090", "run.batch=128")
    assert not found["fits"]
    assert "efficiency.activation_checkpointing=true" in found["advice"]


@pytest.mark.parametrize("text, count, name", [("8xH100", 8, "H100"), ("nvidia-rtx 4090", 1, "RTX 4090")])
def test_devices_are_named_as_people_do(text, count, name):
    assert parse_devices(text) == (count, next(d for d in DEVICES.values() if d.name == name))


def test_every_device_has_a_peak():
    for device in DEVICES.values():
        assert device.is_cpu or published_peak(device.name, "fp16")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpus", "8xH1000"], "no data sheet of H1000 is known; did you mean H100?"),
        (["--gpus", "0xH100"], "give at least 1"),
        (["--gpus", "3xH100"], "run.lanes 8 is not a multiple of the 3 processes"),
        (["--gpus", "V100", "efficiency.precision=bf16"], "does not have it: give fp32 or fp16"),
        (["--gpus", "H100", "--mfu", "40"], "it is a share: give at most 1"),
        (["--gpus", "H100", "--measure", "4", "data.train=nowhere"], "data.train: nowhere: no such folder"),
        (["--gpus", "H100", "modle.kind=vit"], "did you mean model"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        plan.main([*TINY, *arguments])
    assert "\n" not in str(error.value)

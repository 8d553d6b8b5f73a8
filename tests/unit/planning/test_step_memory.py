"""Memory and FLOPs that are planned without values are those of a real step."""

import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vidssl.core.pixels import channel_statistics, normalise
from vidssl.objective.targets import spread_frames
from vidssl.planning.devices import DEVICES
from vidssl.planning.run_plan import Assumptions, Cluster, plan_run
from vidssl.planning.step_memory import (
    StepMemory,
    WithoutValues,
    build_without_values,
    count_step_memory,
    largest_part,
)
from vidssl.training.blocks import configure_blocks
from vidssl.training.perf import count_flops, peak_memory
from vidssl.zoo.flops import drawn_parts, flops_without_values

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import make_teacher, small

SIZES = ["augment.size=64", "model.dim=96", "model.depth=2", "run.batch=8"]


def growth(work, keep: list) -> tuple[int, int]:
    """Bytes that torch has allocated at the end of work(), and the most at any time; its result is kept."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        keep.append(work())
    steps = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(steps, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def measured(cfg, precision: str, checkpointing: bool) -> StepMemory:
    """What count_step_memory counts, of a step that is computed."""
    objective = cfg.build_objective()
    configure_blocks(objective, checkpointing)
    part = largest_part(drawn_parts(cfg, objective))
    kept: list = []

    video = torch.randint(0, 256, part.video.shape, dtype=torch.uint8)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return objective(normalise(video), part.rng, part.masks)["loss"]

    forward().backward()  # what is made once stays out
    objective.zero_grad()
    held, peak = growth(forward, kept)
    _, more = growth(lambda: kept[0].backward(), [])
    return StepMemory(len(part.video), held, max(peak, held + more), 0, 0)


@pytest.mark.parametrize(
    ("method", "precision", "checkpointing"),
    [
        ("videomae", "fp32", False),
        ("vjepa_tiny", "bf16", False),
        ("vjepa_tiny", "fp32", True),
    ],
)
def test_planned_memory_is_that_of_a_step(method, precision, checkpointing):
    cfg = small(method, *SIZES)
    objective = build_without_values(cfg)
    configure_blocks(objective, checkpointing)
    planned = count_step_memory(objective, largest_part(drawn_parts(cfg, objective)), precision)
    real = measured(cfg, precision, checkpointing)
    assert planned.kept == pytest.approx(real.kept, rel=0.1)
    assert planned.peak == pytest.approx(real.peak, rel=0.1)


@pytest.mark.parametrize(
    "method",
    [
        "adamae",  # masks by scores of a network
        "colormae",  # by filtered noise
        "mgmae",  # by motion
        "mae_st",  # a part of the frames is predicted
        "ibot_patch",  # prototypes with a running mean
        "given_tokens",  # classes by a given network
    ],
)
def test_a_plan_of_every_kind_of_part(method, tmp_path):
    """Nothing without values is left for what the process does next."""
    cfg = small(method, *make_teacher(method, tmp_path))
    found = plan_run(cfg, Cluster(DEVICES["H100"], 2, 1, "ddp"), Assumptions(0.3, 40.0))
    assert found.flops_clip > 0 and found.memory.activations > 0
    assert all(type(value) is torch.Tensor for value in channel_statistics(torch.zeros(1, 3, 1, 1, 1)))


@pytest.mark.parametrize(("frames", "count"), [(16, 4), (160, 40), (2, 1), (10, 3)])
def test_frames_are_spread_as_torch_does(frames, count):
    """160 of them are rounded in f32, as in the published code: some differ from the quotient."""
    assert list(spread_frames(frames, count)) == torch.linspace(0, frames - 1, count).long().tolist()


def test_planned_flops_are_those_that_torch_counts():
    """It counts what the backward pass of attention computes again, too."""
    cfg = small("videomae", *SIZES)
    objective = cfg.build_objective()
    part = largest_part(drawn_parts(cfg, objective))
    with count_flops() as counted:
        objective(torch.rand(part.video.shape), part.rng, part.masks)["loss"].backward()
    planned = flops_without_values(cfg, build_without_values(cfg), [part])
    assert planned == pytest.approx(counted(), rel=0.1)
    assert planned < counted()


def test_drawing_ends_whatever_the_memory_held_before():
    weight = torch.full((300, 300), 1e3)
    with WithoutValues():
        torch.nn.init.trunc_normal_(weight, std=0.02)
    assert weight.eq(1e3).all()


def test_weights_without_values_take_no_room():
    """These are 3.2 GB of them."""
    cfg = small("vjepa_tiny", "model.dim=4096", "model.depth=2", "model.heads=16")
    before = peak_memory(torch.device("cpu"))
    objective = build_without_values(cfg)
    assert sum(p.numel() for p in objective.parameters()) > 8e8
    assert peak_memory(torch.device("cpu")) - before < 1e9

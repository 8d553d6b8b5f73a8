"""Recipes to start from: each is complete but for data and folder, takes steps, and has a true header."""

import re
from pathlib import Path
from typing import Any

import pytest
from programs import run_here

from vidssl import train
from vidssl.config import load_config
from vidssl.planning import run_plan
from vidssl.planning.devices import parse_devices
from vidssl.planning.run_plan import Assumptions, Cluster, peak_flops, plan_run
from vidssl.training.schema import TrainConfig
from vidssl.zoo.flops import drawn_parts

ROOT = Path(__file__).parents[2]
# adapt.yaml goes on from a checkpoint
RECIPES = [path for path in sorted((ROOT / "configs/recipe").glob("*.yaml")) if path.stem != "adapt"]
TINY = [
    "model.kind=vit",
    "model.dim=24",
    "model.depth=1",
    "model.heads=2",
    "model.patch=8",
    "augment.size=16",
]
TINY += ["data.frames=8", "optim.warmup=1", "run.steps=2", "run.save_every=2", "run.lanes=4"]
TINY += ["efficiency.workers=0", "efficiency.micro_batches=1", "efficiency.decode_in_subprocess=false"]
HEADER = re.compile(
    r"vidssl plan (?P<file>\S+) --gpus (?P<gpus>\S+): (?P<gflop>\S+) GFLOP a clip, "
    r"(?P<flop>\S+) FLOP the run, (?P<memory>\S+) (?P<unit>[GM]B) of memory, "
    r"(?P<clips>\S+) clips/s and (?P<hours>\S+) h at (?P<mfu>\S+) of"
)


def tiny(path: Path) -> list[str]:
    """Arguments that make the recipe a matter of milliseconds."""
    method = load_config([str(path), "data.train=x", "run.out=x"], TrainConfig).method
    repeat = 4 if "repeat: 4" in path.read_text() else 1
    more = [f"run.batch={4 * repeat}"]
    if method.predicts:
        more += ["method.predictor.width=16", "method.predictor.depth=1", "method.predictor.heads=2"]
    if "truncate_over" in path.read_text():
        more.append("method.mask.truncate_over=4")
    if not method.agree.is_absent:
        views = "[{}, {count: 2, size: 8, scale: [0.2, 0.4], role: online}]"
        more += [f"method.agree.views={views}", "method.agree.mask.ratio=0.5"]
        more.append("method.agree.projector.widths=[16, 8]")
    return [str(path), *TINY, *more]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_needs_data_and_a_folder_alone(path, synthetic_shards, tmp_path):
    data = f"data.train={synthetic_shards}/train"
    complete = load_config([str(path), data, f"run.out={tmp_path}"], TrainConfig)
    assert complete.optim.warmup < complete.run.steps
    assert run_here(train.main, *tiny(path), data, f"run.out={tmp_path}/run") == 0
    assert (tmp_path / "run/encoder.safetensors").exists()


def deep_plan(path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Bytes on a device, and FLOPs of a clip. Both are linear in the depths of encoder and predictor, so that
    plans of one and of two layers tell those of many."""
    drawn: list = []

    def draw_once(*arguments: Any) -> list:
        drawn[:] = drawn or drawn_parts(*arguments)
        return drawn

    def planned(depths: dict[str, int]) -> tuple[float, float]:
        more = [f"{key}={depth}" for key, depth in depths.items()]
        cfg = load_config([str(path), "data.train=x", "run.out=x", *more], TrainConfig)
        plan = plan_run(cfg, cluster, Assumptions(mfu=1.0, cpu_ms=1.0))
        return plan.memory.total, plan.flops_clip

    monkeypatch.setattr(run_plan, "drawn_parts", draw_once)
    full = load_config([str(path), "data.train=x", "run.out=x"], TrainConfig)
    if not full.method.predicts:
        # with few layers the peak is where views are cut
        return planned({})
    depths = {"model.depth": full.model.arguments["depth"]}
    depths["method.predictor.depth"] = full.method.predictor.arguments["depth"]
    shallow = dict.fromkeys(depths, 1)
    base = planned(shallow)
    memory, flops = base
    for key, depth in depths.items():
        deeper = planned({**shallow, key: 2})
        memory += (depth - 1) * (deeper[0] - base[0])
        flops += (depth - 1) * (deeper[1] - base[1])
    return memory, flops


# the others' headers come from the same function, and take as long again to plan
@pytest.mark.parametrize("recipe", ["laptop", "one_gpu_day_videomae"])
def test_the_header_of_a_recipe_is_what_is_planned(recipe, monkeypatch):
    path = ROOT / f"configs/recipe/{recipe}.yaml"
    comment = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    header = HEADER.search(comment)
    assert header is not None
    assert header["file"] == f"configs/recipe/{path.name}"
    per_host, device = parse_devices(header["gpus"])
    cluster = Cluster(device, per_host, 1, "ddp" if per_host > 1 else "none")
    memory, flops = deep_plan(path, cluster, monkeypatch)
    run = load_config([str(path), "data.train=x", "run.out=x"], TrainConfig).run
    rate = per_host * float(header["mfu"]) * peak_flops(device, "fp32" if device.is_cpu else "bf16")
    stated = {name: float(header[name]) for name in ("gflop", "flop", "memory", "clips", "hours")}
    stated["memory"] *= {"GB": 1e9, "MB": 1e6}[header["unit"]]
    expected = {"gflop": flops / 1e9, "flop": flops * run.batch * run.steps, "memory": memory}
    expected |= {"clips": rate / flops, "hours": flops * run.batch * run.steps / rate / 3600}
    assert stated == pytest.approx(expected, rel=0.01)
    assert device.memory_bytes is None or memory < device.memory_bytes

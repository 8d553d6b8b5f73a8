"""Every method's YAML builds and gives the losses written in tests/losses/: a refactor leaves them as they are.

After a change that is meant to move them: python tests/test_methods.py, and say why in the commit.
"""

import sys
from pathlib import Path

import pytest
import torch

from vidssl import config
from vidssl.draws import Draws
from vidssl.objective.targets import Ema, normalise
from vidssl.optim import Optim, make_optimizer, schedule, set_schedule
from vidssl.train import SCHEMA, make_objective

ROOT = Path(__file__).parents[1]
METHODS = sorted(p.stem for p in (ROOT / "configs/method").glob("*.yaml"))
STEPS = 5
SMALL = ["run.out=x", "run.steps=5", "run.batch=8", "data.train=x", "data.frames=8", "data.stride=1"]
SMALL += ["augment.kind=center_crop", "augment.size=32", "optim.warmup=0", "optim.lr=1e-3"]
SMALL += ["method.predictor.width=24", "method.predictor.depth=1", "method.predictor.heads=2"]


def losses(method: str) -> list[float]:
    """Five steps of a tiny encoder on moving noise."""
    model = ["model.kind=vit", "model.dim=48", "model.depth=2", "model.heads=3", "model.patch=8"]
    cfg = config.load([str(ROOT / f"configs/method/{method}.yaml"), *SMALL, *model], SCHEMA)
    objective, optim = make_objective(cfg), config.build(cfg["optim"], Optim)
    optimizer = make_optimizer(objective, optim)
    noise = torch.randint(0, 256, (8, 3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video = torch.cat([noise.roll(t, -1) for t in range(8)], 2)
    out = []
    for step in range(STEPS):
        now = schedule(optim, step, STEPS)
        set_schedule(optimizer, now)
        loss = objective(normalise(video), Draws(0, step, torch.arange(8) + 8 * step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(objective.target, Ema):
            objective.target.update(objective.encoder, now["momentum"])
        out.append(loss.item())
    return out


def write(method: str) -> str:
    return "".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(losses(method)))


@pytest.mark.parametrize("method", METHODS)
def test_golden_losses(method):
    golden = [float(line.split()[1]) for line in (ROOT / f"tests/losses/{method}.txt").read_text().splitlines()]
    assert losses(method) == pytest.approx(golden, rel=1e-4)  # other processors round differently
    assert golden[-1] < golden[0]


def test_parameters_without_decay_are_biases_and_norms():
    cfg = config.load([str(ROOT / "configs/method/videomae.yaml"), *SMALL, "model.kind=vit_tiny"], SCHEMA)
    objective = make_objective(cfg)
    optimizer = make_optimizer(objective, config.build(cfg["optim"], Optim))
    plain = {id(p) for p in optimizer.param_groups[1]["params"]}
    names = {n for n, p in objective.named_parameters() if id(p) in plain}
    assert all(p.ndim <= 1 or n == "query.tokens" for n, p in objective.named_parameters() if n in names)
    assert {"query.tokens", "encoder.norm.weight", "encoder.blocks.0.attn.qkv.bias"} <= names
    decayed = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    assert decayed + sum(p.numel() for p in optimizer.param_groups[1]["params"]) == sum(
        p.numel() for p in objective.parameters() if p.requires_grad
    )


def test_schedules():
    o = Optim(lr=1.0, lr_start=0.1, lr_end=0.2, warmup=10, weight_decay=0.04, weight_decay_end=0.4, momentum=(0.9, 1.0))
    assert schedule(o, 0, 110)["lr"] == pytest.approx(0.19)
    assert schedule(o, 9, 110)["lr"] == schedule(o, 10, 110)["lr"] == pytest.approx(1.0)
    assert schedule(o, 60, 110)["lr"] == pytest.approx(0.6)
    assert schedule(o, 110, 110) == pytest.approx({"lr": 0.2, "weight_decay": 0.4, "momentum": 1.0})
    assert schedule(o, 55, 110)["weight_decay"] == pytest.approx(0.22)


if __name__ == "__main__":
    for m in sys.argv[1:] or METHODS:
        (ROOT / f"tests/losses/{m}.txt").write_text(write(m))

"""vidssl/optim.py: schedules against the reference's trace, and who is decayed and clipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from vidssl import config
from vidssl.optim import Optim, clip_gradients, is_token, make_optimizer, schedule
from vidssl.train import SCHEMA, make_objective

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
SMALL = ["run.out=x", "run.steps=5", "run.batch=8", "data.train=x", "data.frames=8", "data.stride=1"]
SMALL += ["augment.kind=center_crop", "augment.size=32", "model.kind=vit_tiny", "model.patch=8"]
LR = {"lr": 1.0, "lr_start": 0.1, "lr_end": 0.2, "warmup": 10}


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference tensors are not beside the repository")
def test_schedules_are_those_of_the_reference_run():
    trace = load_file(GOLDEN / "vjepa_run.safetensors")
    h = json.loads((GOLDEN / "vjepa_run.json").read_text())["hyperparameters"]
    epoch = h["iterations_per_epoch"]
    o = Optim(
        lr=h["ref_lr"],
        lr_start=h["start_lr"],
        lr_end=h["final_lr"],
        warmup=h["warmup"] * epoch,
        stretch=h["ipe_scale"],
        weight_decay=h["wd"],
        weight_decay_end=h["final_wd"],
        momentum=tuple(h["ema"]),
    )
    steps = h["num_epochs"] * epoch
    assert steps == len(trace["trace.lr"]) == 20
    now = [schedule(o, step, steps) for step in range(steps)]
    for ours, theirs in (("lr", "trace.lr"), ("weight_decay", "trace.wd"), ("momentum", "trace.momentum")):
        assert [n[ours] for n in now] == pytest.approx(trace[theirs].tolist(), rel=1e-9), ours


def test_schedules():
    o = Optim(**LR, weight_decay=0.04, weight_decay_end=0.4, momentum=(0.9, 1.0))
    assert schedule(o, 0, 110)["lr"] == pytest.approx(0.19)
    assert schedule(o, 8, 110)["lr"] == pytest.approx(0.91) and schedule(o, 9, 110)["lr"] == pytest.approx(1.0)
    assert schedule(o, 59, 110)["lr"] == pytest.approx(0.6)
    assert schedule(o, 109, 110)["lr"] == pytest.approx(0.2)
    assert schedule(o, 54, 110)["weight_decay"] == pytest.approx(0.22)
    assert schedule(o, 109, 110)["weight_decay"] == pytest.approx(0.4)
    assert schedule(o, 0, 110)["momentum"] == 0.9 and schedule(o, 55, 110)["momentum"] == pytest.approx(0.95)


def test_decay_of_the_learning_rate_after_the_warm_up():
    line, flat = (Optim(**LR, decay=kind) for kind in ("linear", "constant"))
    for step in range(10):
        assert (
            schedule(line, step, 110)["lr"] == schedule(flat, step, 110)["lr"] == schedule(Optim(**LR), step, 110)["lr"]
        )
    assert [schedule(line, step, 110)["lr"] for step in (34, 59, 109)] == pytest.approx([0.8, 0.6, 0.2])
    assert {schedule(flat, step, 110)["lr"] for step in range(9, 110)} == {1.0}


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_stretch_draws_the_schedules_longer_and_cuts_them(decay):
    o = {**LR, "decay": decay, "weight_decay_end": 0.4}
    for step in range(100):
        assert schedule(Optim(**o, stretch=1.25), step, 100) == schedule(Optim(**o), step, 125)
    over = schedule(Optim(**o, stretch=0.5, momentum=(0.9, 1.0)), 99, 100)  # done at half time; it stays there
    assert over == pytest.approx({"lr": 0.2, "weight_decay": 0.4, "momentum": 1.0})


def test_published_v_jepa_ends_where_its_stretched_schedules_are_cut():
    o = Optim(
        lr=6.25e-4,
        lr_start=2e-4,
        lr_end=1e-6,
        warmup=12000,
        stretch=1.25,
        weight_decay=0.04,
        weight_decay_end=0.4,
        momentum=(0.998, 1.0),
    )
    end = schedule(o, 90000 - 1, 90000)
    assert end == pytest.approx({"lr": 7.5e-5, "weight_decay": 0.366, "momentum": 0.9996}, rel=0.01)


def make(method: str, *more: str) -> tuple[nn.Module, Optim]:
    cfg = config.load([str(ROOT / f"configs/method/{method}.yaml"), *SMALL, *more], SCHEMA)
    return make_objective(cfg), config.build(cfg["optim"], Optim)


def test_parameters_without_decay_are_biases_and_norms():
    objective, o = make("videomae")
    optimizer = make_optimizer(objective, o)
    plain = {id(p) for p in optimizer.param_groups[1]["params"]}
    names = {n for n, p in objective.named_parameters() if id(p) in plain}
    assert all(p.ndim <= 1 or n == "query.tokens" for n, p in objective.named_parameters() if n in names)
    assert {"query.tokens", "encoder.norm.weight", "encoder.blocks.0.attn.qkv.bias"} <= names
    decayed = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    assert decayed + sum(p.numel() for p in optimizer.param_groups[1]["params"]) == sum(
        p.numel() for p in objective.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("decay", ["true", "false"])
def test_decay_tokens_holds_for_learned_tokens_and_positions(decay):
    """Whatever their shape: a class token is 1-D here, and decayed in MAE-ST."""
    objective, o = make("mae_st", f"optim.decay_tokens={decay}", "model.image_tokenizer=true")
    optimizer = make_optimizer(objective, o)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    tokens = {n for n, p in objective.named_parameters() if is_token(n)}
    assert {"query.tokens", "encoder.class_token", "predictor.class_token", "encoder.positions.space"} <= tokens
    assert {"encoder.positions.time", "predictor.positions.time", "encoder.img_mod_embed"} <= tokens
    for name, p in objective.named_parameters():
        assert (id(p) in decayed) == (decay == "true" if name in tokens else p.ndim > 1), name


class Parts(nn.Module):
    """Two parameters of an encoder and of a predictor, and a query."""

    def __init__(self):
        super().__init__()
        self.encoder, self.predictor = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.query = nn.Parameter(torch.zeros(1))


def parts(*gradients: list[float]) -> Parts:
    """Gradients of encoder, predictor and query."""
    model = Parts()
    for p, g in zip((model.encoder.weight, model.predictor.weight, model.query), gradients, strict=True):
        p.grad = torch.tensor(g).reshape(p.shape)
    return model


def gradients(model: Parts) -> list[float]:
    return torch.cat([model.get_parameter(n).grad.flatten() for n in NAMES]).tolist()


NAMES = ("encoder.weight", "predictor.weight", "query")
GIVEN: Any = ([30.0, 40.0], [4.0, 4.0], [2.0])  # norms 50 and 6 (with the query), 50.36 together


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator()


@pytest.mark.parametrize(
    "options, step, want",
    [
        ({}, 0, [30, 40, 4, 4, 2]),
        ({"clip_grad": 100.0}, 0, [30, 40, 4, 4, 2]),
        ({"clip_grad": 2536**0.5 / 2}, 0, [15, 20, 2, 2, 1]),
        ({"clip_grad": 10.0, "clip_each": True}, 0, [6, 8, 4, 4, 2]),
        ({"clip_grad": 3.0, "clip_each": True}, 0, [1.8, 2.4, 2, 2, 1]),
        ({"clip_grad": 3.0, "clip_each": True, "clip_from": 7}, 6, [30, 40, 4, 4, 2]),
        ({"clip_grad": 3.0, "clip_each": True, "clip_from": 7}, 7, [1.8, 2.4, 2, 2, 1]),
        ({"clip_grad": 2536**0.5 / 2, "clip_from": 7}, 6, [30, 40, 4, 4, 2]),
        ({"clip_each": True}, 0, [30, 40, 4, 4, 2]),
    ],
)
def test_clipping_together_or_each_and_from_a_step(accelerator, options, step, want):
    model = parts(*GIVEN)
    norm = clip_gradients(accelerator, model, Optim(lr=1.0, **options), step)
    assert float(norm) == pytest.approx(2536**0.5)  # of all, before clipping
    assert gradients(model) == pytest.approx(want, rel=1e-5)


def test_clipping_finds_the_encoder_in_a_wrapped_model(accelerator):
    model = parts(*GIVEN)
    clip_gradients(accelerator, nn.ModuleDict({"module": model}), Optim(lr=1.0, clip_grad=10.0, clip_each=True), 0)
    assert gradients(model) == pytest.approx([6, 8, 4, 4, 2], rel=1e-5)


@pytest.mark.parametrize("each", [False, True])
def test_the_scale_of_fp16_is_undone_once_a_step(accelerator, each, monkeypatch):
    calls = []
    monkeypatch.setattr(accelerator, "unscale_gradients", lambda: calls.append(1))
    clip_gradients(accelerator, parts(*GIVEN), Optim(lr=1.0, clip_grad=1.0, clip_each=each), 0)
    assert calls == [1]

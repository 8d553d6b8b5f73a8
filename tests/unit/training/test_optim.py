"""training/optim.py: schedules against the reference's trace, parameter groups, clipping, continued runs."""

import itertools
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vidssl import train
from vidssl.config import from_tree, load_config
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.model.positions import resize_table
from vidssl.model.vit import Block, TransformerStack
from vidssl.pretrained.load import load_encoder
from vidssl.training.checkpoint import load_checkpoint
from vidssl.training.distributed import Strategy
from vidssl.training.optim import build_optimizer, is_token_or_position, schedule, set_schedule
from vidssl.training.schema import OptimConfig, TrainConfig
from vidssl.training.state import initial_weights

ROOT = Path(__file__).parents[3]
VECTORS = ROOT / "tests" / "parity" / "vectors"  # of the reference implementations
SMALL = ["run.out=x", "run.steps=5", "run.batch=8", "data.train=x", "data.frames=8", "data.stride=1"]
SMALL += ["augment.kind=center_crop", "augment.size=32", "model.kind=vit_tiny", "model.patch=8"]
LR = {"lr": 1.0, "warmup_lr": 0.1, "final_lr": 0.2, "warmup": 10}


def test_schedules_are_those_of_the_reference_run():
    trace = load_file(VECTORS / "vjepa_run.safetensors")
    h = json.loads((VECTORS / "vjepa_run.json").read_text())["hyperparameters"]
    epoch = h["iterations_per_epoch"]
    o = OptimConfig(
        lr=h["ref_lr"],
        warmup_lr=h["start_lr"],
        final_lr=h["final_lr"],
        warmup=h["warmup"] * epoch,
        ipe_scale=h["ipe_scale"],
        weight_decay=h["wd"],
        final_weight_decay=h["final_wd"],
    )
    momentum = tuple(h["ema"])
    steps = h["num_epochs"] * epoch
    assert steps == len(trace["trace.lr"]) == 20
    now = [schedule(o, step, steps, momentum) for step in range(steps)]
    for ours, theirs in (("lr", "trace.lr"), ("weight_decay", "trace.wd"), ("ema", "trace.momentum")):
        assert [n[ours] for n in now] == pytest.approx(trace[theirs].tolist(), rel=1e-9), ours


def test_schedules():
    o = OptimConfig(**LR, weight_decay=0.04, final_weight_decay=0.4)
    assert schedule(o, 0, 110)["lr"] == pytest.approx(0.19)
    assert schedule(o, 8, 110)["lr"] == pytest.approx(0.91) and schedule(o, 9, 110)["lr"] == pytest.approx(
        1.0
    )
    assert schedule(o, 59, 110)["lr"] == pytest.approx(0.6)
    assert schedule(o, 109, 110)["lr"] == pytest.approx(0.2)
    assert schedule(o, 54, 110)["weight_decay"] == pytest.approx(0.22)
    assert schedule(o, 109, 110)["weight_decay"] == pytest.approx(0.4)
    assert schedule(o, 0, 110)["ema"] == 1.0
    assert schedule(o, 0, 110, (0.9, 1.0))["ema"] == 0.9
    assert schedule(o, 55, 110, (0.9, 1.0))["ema"] == pytest.approx(0.95)


def test_learning_rate_decay():
    line, flat = (OptimConfig(**LR, lr_decay=kind) for kind in ("linear", "constant"))
    for step in range(10):
        assert (
            schedule(line, step, 110)["lr"]
            == schedule(flat, step, 110)["lr"]
            == schedule(OptimConfig(**LR), step, 110)["lr"]
        )
    assert [schedule(line, step, 110)["lr"] for step in (34, 59, 109)] == pytest.approx([0.8, 0.6, 0.2])
    assert {schedule(flat, step, 110)["lr"] for step in range(9, 110)} == {1.0}


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_ipe_scale_stretches_and_cuts_the_schedules(decay):
    o = {**LR, "lr_decay": decay, "final_weight_decay": 0.4}
    for step in range(100):
        assert schedule(OptimConfig(**o, ipe_scale=1.25), step, 100) == schedule(OptimConfig(**o), step, 125)
    over = schedule(OptimConfig(**o, ipe_scale=0.5), 99, 100, (0.9, 1.0))  # constant after half of the steps
    assert over == pytest.approx({"lr": 0.2, "weight_decay": 0.4, "ema": 1.0})


def test_final_values_of_published_v_jepa():
    o = OptimConfig(
        lr=6.25e-4,
        warmup_lr=2e-4,
        final_lr=1e-6,
        warmup=12000,
        ipe_scale=1.25,
        weight_decay=0.04,
        final_weight_decay=0.4,
    )
    end = schedule(o, 90000 - 1, 90000, (0.998, 1.0))
    assert end == pytest.approx({"lr": 7.5e-5, "weight_decay": 0.366, "ema": 0.9996}, rel=0.01)


def make(method: str, *more: str) -> tuple[nn.Module, OptimConfig]:
    cfg = load_config([str(ROOT / f"configs/method/{method}.yaml"), *SMALL, *more], TrainConfig)
    return cfg.build_objective(), cfg.optim


def test_parameters_without_decay_are_biases_and_norms():
    objective, o = make("videomae")
    optimizer = build_optimizer(objective, o)
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
    optimizer = build_optimizer(objective, o)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    tokens = {n for n, p in objective.named_parameters() if is_token_or_position(n)}
    assert {
        "query.tokens",
        "encoder.class_token",
        "predictor.class_token",
        "encoder.positions.space",
    } <= tokens
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
        ({"clip_grad": 10.0, "clip_per_module": True}, 0, [6, 8, 4, 4, 2]),
        ({"clip_grad": 3.0, "clip_per_module": True}, 0, [1.8, 2.4, 2, 2, 1]),
        ({"clip_grad": 3.0, "clip_per_module": True, "clip_start": 7}, 6, [30, 40, 4, 4, 2]),
        ({"clip_grad": 3.0, "clip_per_module": True, "clip_start": 7}, 7, [1.8, 2.4, 2, 2, 1]),
        ({"clip_grad": 2536**0.5 / 2, "clip_start": 7}, 6, [30, 40, 4, 4, 2]),
        ({"clip_per_module": True}, 0, [30, 40, 4, 4, 2]),
    ],
)
def test_clipping(accelerator, options, step, want):
    model = parts(*GIVEN)
    norm = Strategy(accelerator).clip(model, OptimConfig(lr=1.0, **options), step)
    assert float(norm) == pytest.approx(2536**0.5)  # of all, before clipping
    assert gradients(model) == pytest.approx(want, rel=1e-5)


def test_clipping_of_a_wrapped_model(accelerator):
    model = parts(*GIVEN)
    wrapped = nn.ModuleDict({"module": model})
    Strategy(accelerator).clip(wrapped, OptimConfig(lr=1.0, clip_grad=10.0, clip_per_module=True), 0)
    assert gradients(model) == pytest.approx([6, 8, 4, 4, 2], rel=1e-5)


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "parts_scaled"),
    [({}, 0), ({"clip_grad": 9.0}, 1), ({"clip_grad": 9.0, "clip_per_module": True}, 2)],
)
def test_clipping_reads_a_gradient_once_and_the_host_reads_nothing(accelerator, options, parts_scaled):
    with Operations() as seen:
        Strategy(accelerator).clip(parts(*GIVEN), OptimConfig(lr=1.0, **options), 0)
    assert seen.counts["_foreach_norm"] == max(1, parts_scaled)
    assert seen.counts["_foreach_mul_"] == parts_scaled
    assert not seen.counts["_local_scalar_dense"]


@pytest.mark.parametrize("each", [False, True])
def test_fp16_gradients_are_unscaled_once(accelerator, each, monkeypatch):
    calls = []
    monkeypatch.setattr(accelerator, "unscale_gradients", lambda: calls.append(1))
    Strategy(accelerator).clip(parts(*GIVEN), OptimConfig(lr=1.0, clip_grad=1.0, clip_per_module=each), 0)
    assert calls == [1]


INFINITE = {
    "lr": 1.0,
    "final_lr": 0.1,
    "warmup": 10,
    "schedule_steps": 40,
    "final_weight_decay": 0.4,
}


def test_infinite_schedule_is_independent_of_run_steps():
    o = OptimConfig(**INFINITE)
    rows = [schedule(o, step, 60, (0.9, 0.99)) for step in range(200)]
    assert rows == [schedule(o, step, 10**6, (0.9, 0.99)) for step in range(200)]
    assert (
        rows[9]["lr"] == 1.0
        and rows[29]["lr"] == pytest.approx(0.55)
        and rows[49]["lr"] == pytest.approx(0.1)
    )
    assert all(row == pytest.approx({"lr": 0.1, "weight_decay": 0.4, "ema": 0.99}) for row in rows[50:])


def test_exponential_annealing():
    o = OptimConfig(lr=0.1, final_lr=0.001, lr_decay="exponential")
    rates = [0.1, *(schedule(o, step, 20)["lr"] for step in range(20))]
    assert rates[20] == pytest.approx(0.001) and rates[10] == pytest.approx(0.01)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([0.01**0.05] * 20)
    with pytest.raises(UserError, match="exponential decay cannot end at 0"):
        OptimConfig(lr=0.1, lr_decay="exponential")


@pytest.mark.parametrize(
    "options, momentum, want",
    [
        ({}, (0.998, 1.0), False),
        ({"lr_decay": "linear"}, (1.0, 1.0), False),
        ({"lr_decay": "constant"}, (0.998, 1.0), False),
        ({"lr_decay": "constant"}, (1.0, 1.0), True),
        ({"lr_decay": "constant"}, (0.99, 0.99), True),
        ({"lr_decay": "constant", "final_weight_decay": 0.4}, (1.0, 1.0), False),
        ({"schedule_steps": 40, "final_weight_decay": 0.4}, (0.998, 0.999), True),
    ],
)
def test_open_ended_schedules_are_independent_of_run_steps(options, momentum, want):
    o = OptimConfig(lr=1.0, final_lr=0.1, warmup=5, **options)
    assert o.is_open_ended(momentum) == want
    rows = [[schedule(o, step, steps, momentum) for step in range(50)] for steps in (50, 80)]
    assert (rows[0] == rows[1]) == want


def test_rates_are_scaled_to_the_batch():
    o = OptimConfig(**LR, lr_batch=256)
    assert [getattr(o.scaled(64), k) for k in ("lr", "warmup_lr", "final_lr")] == pytest.approx(
        [0.25, 0.025, 0.05]
    )
    assert OptimConfig(lr=3.0, lr_batch=1024, lr_scaling="sqrt").scaled(256).lr == pytest.approx(1.5)
    assert OptimConfig(**LR).scaled(64) == OptimConfig(**LR)
    assert OptimConfig(lr=1.5e-4, lr_batch=256).scaled(2048).lr == pytest.approx(
        1.2e-3
    )  # VideoMAE's, as its recipe here has it


def test_rates_by_layer_and_the_two_groups_without():
    objective, o = make(
        "mae_st",
        "optim.layer_lr_decay=0.5",
        "model.depth=2",
        "model.kind=vit",
        "model.dim=24",
        "model.heads=2",
    )
    optimizer = build_optimizer(objective, o)
    set_schedule(optimizer, {"lr": 2.0, "weight_decay": 0.1})
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in objective.named_parameters():
        want = next((r for part, r in LAYERS.items() if name.startswith("encoder." + part)), 2.0)
        assert rates.pop(id(p)) == want, name
    assert not rates
    plain = build_optimizer(objective, replace(o, layer_lr_decay=1.0)).state_dict()["param_groups"]
    assert [(g["has_weight_decay"], "scale" in g) for g in plain] == [(True, False), (False, False)]


LAYERS = {"patch_embed": 0.25, "class_token": 0.25, "positions": 0.25, "blocks.0": 0.5, "blocks.1": 1.0}


def test_stochastic_depth_passes_samples_by_in_training_only():
    torch.manual_seed(0)
    blocks = TransformerStack(Block(8, 2) for _ in range(3))
    blocks.drop_path = 0.5
    block = blocks[2]
    x = torch.randn(400, 3, 8)

    def last(rng):
        return blocks(x, None, [1, 2], rng=rng)

    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)  # what remains is the attention
    before, after = last(KeyedRNG(0, 0, torch.arange(400)))
    branch = block.attn(block.norm1(before))
    left = after - before
    kept = left.flatten(1).any(1)
    assert 0.4 < kept.float().mean() < 0.6 and torch.allclose(left[kept], 2 * branch[kept], atol=1e-5)
    assert last(None)[1].equal(blocks.eval()(x, None, [2], rng=KeyedRNG(0, 0, torch.arange(400)))[0])
    assert not any("drop" in k for k in blocks.state_dict())


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_stochastic_depth_is_a_function_of_seed_and_position(rate):
    """Not of the batch at hand, its order, torch's generator, or whether activations are recomputed."""
    torch.manual_seed(0)
    blocks = TransformerStack(Block(8, 2) for _ in range(4))
    blocks.drop_path = rate
    x = torch.randn(12, 3, 8)

    def outputs(rows: list[int], seed: int = 0, first: int = 0) -> torch.Tensor:
        torch.manual_seed(len(rows))
        rng = KeyedRNG(seed, first // 12, torch.tensor(rows) + first)
        return blocks(x[rows], None, [3], rng=rng)[0].detach()

    whole = outputs([*range(12)])
    for rows in ([3], [0, 1, 2, 3], [11, 5, 7, 0]):
        assert torch.allclose(outputs(rows), whole[rows], atol=1e-6)
    blocks.activation_checkpointing = True
    assert outputs([*range(12)]).equal(whole) and whole.isfinite().all()
    # no step and no seed repeats another one's draws
    runs = [outputs([*range(12)], seed, 12 * step) for seed in range(3) for step in range(3)]
    if rate < 1:
        assert all(not a.equal(b) for i, a in enumerate(runs) for b in runs[:i])


def test_stochastic_depth_is_of_the_trained_encoder_alone():
    objective, _ = make("vjepa", "model.drop_path=0.4", "model.depth=3")
    video = torch.randn(4, 3, 4, 16, 16)
    assert objective.encoder.blocks.drop_path == 0.4 and not objective.predictor.blocks.drop_path
    assert objective.target(video).equal(objective.target(video))


# Runs that go on from one another, in this process.
TINY = [
    "model.kind=vit",
    "model.dim=24",
    "model.depth=1",
    "model.heads=2",
    "model.patch=8",
    "run.batch=8",
    "run.lanes=8",
]
TINY += [
    "method.predictor.width=16",
    "method.predictor.depth=1",
    "method.predictor.heads=2",
    "efficiency.workers=0",
]
TINY += [
    "data.stride=1",
    "efficiency.decode_in_subprocess=false",
    "run.feature_stats_every=100",
    "optim.warmup=1",
    "augment.kind=random_crop",
]
HELD = ["optim.lr=2e-3", "optim.final_lr=1e-3", "optim.schedule_steps=2", "method.target.momentum=[0.9,0.99]"]


def run(shards: Path, out: Path, *more: str, frames: int = 4, size: int = 16) -> list[dict]:
    """Returns the log of a tiny V-JEPA-like run."""
    where = [
        f"data.train={shards / 'train'}",
        f"run.out={out}",
        f"data.frames={frames}",
        f"augment.size={size}",
        "method.mask.past=1",
    ]
    train.main([str(ROOT / "configs/method/vjepa_tiny.yaml"), *TINY, *where, *more])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def infinite(synthetic_shards, tmp_path_factory) -> Path:
    """Four steps with checkpoints at two and four."""
    out = tmp_path_factory.mktemp("infinite") / "run"
    run(synthetic_shards, out, *HELD, "run.steps=4", "run.save_every=2")
    return out


def test_a_continued_infinite_run_equals_the_long_one(infinite, synthetic_shards, tmp_path):
    whole = run(synthetic_shards, tmp_path / "whole", *HELD, "run.steps=6")
    shutil.copytree(infinite, tmp_path / "run")
    longer = run(synthetic_shards, tmp_path / "run", *HELD, "run.steps=6")
    for key in ("loss", "lr", "ema", "weight_decay", "samples_hash"):
        assert [r[key] for r in longer] == [r[key] for r in whole], key
    a, b = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "run"))
    assert all(a[k].equal(b[k]) for k in a)
    with pytest.raises(UserError, match="6 steps are done, more than the 4 of this configuration"):
        run(synthetic_shards, tmp_path / "run", *HELD, "run.steps=4")


def test_other_runs_cannot_be_continued(synthetic_shards, tmp_path):
    run(synthetic_shards, tmp_path / "run", "run.steps=1")
    with pytest.raises(UserError, match=r"run\.steps is 1 there, 2 here"):
        run(synthetic_shards, tmp_path / "run", "run.steps=2")
    with pytest.raises(UserError, match="a momentum of 1 freezes the EMA encoder"):
        still = ("optim.schedule_steps=2", "optim.final_lr=1e-4", "method.target.momentum=[0.9,1]")
        run(synthetic_shards, tmp_path / "other", "run.steps=2", *still)
    with pytest.raises(UserError, match=r"optim\.final_lr: with optim\.schedule_steps training goes on"):
        run(synthetic_shards, tmp_path / "other", "run.steps=2", "optim.schedule_steps=2")


@pytest.mark.parametrize("file", ["infinite", "anneal"])
def test_infinite_and_anneal_compose_with_a_published_method(file):
    method, data = ROOT / "configs/method/vjepa2.yaml", ROOT / "configs/data/vjepa2_16f_4fps.yaml"
    more = (
        ["optim.lr_decay=cosine", "optim.final_lr=2e-4"]
        if file == "infinite"
        else ["optim.warmup=0", "optim.lr_decay=linear", "optim.final_lr=1e-6"]
    )
    files = [str(p) for p in (method, data, ROOT / f"configs/run/{file}.yaml")]
    cfg = load_config([*files, "model.kind=vit_tiny", "data.train=x", *more], TrainConfig)
    o = cfg.optim
    rates = [schedule(o, step, cfg.run.steps)["lr"] for step in (60_000, cfg.run.steps - 1)]
    assert rates == pytest.approx([2e-4, 2e-4] if file == "infinite" else [1e-6, 1e-6])


@pytest.mark.parametrize("step", [None, 2])
def test_branch_from_a_run_or_a_step_checkpoint(step, infinite, synthetic_shards, tmp_path):
    """A checkpoint brings AdamW's moments along."""
    place = infinite / "checkpoints" / f"step-{step or 4:08d}"
    where = place if step else infinite
    fall = [
        "optim.lr=5e-4",
        "optim.final_lr=5e-6",
        "optim.lr_batch=4",
        "optim.lr_decay=exponential",
        "optim.warmup=0",
        "run.steps=2",
    ]
    fall += ["method.target.momentum=[0.99,0.99]", "optim.betas=[0.9,0.99]"]
    rows = run(synthetic_shards, tmp_path / "run", *fall, f"run.init={where}")
    assert [r["lr"] for r in rows] == pytest.approx([1e-4, 1e-5])
    state = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert {float(of["step"]) for of in state["optimizer"]["state"].values()} == {2.0 + (step or 0)}
    assert {tuple(g["betas"]) for g in state["optimizer"]["param_groups"]} == {(0.9, 0.99)}
    cfg = from_tree(state["provenance"]["config"], TrainConfig, "state")
    objective = cfg.build_objective()
    objective.load_state_dict(initial_weights(objective, cfg, str(where))[0], strict=False)
    before = load_file(place / "model.safetensors")
    assert all(before[k].equal(v) for k, v in objective.state_dict().items())


@pytest.mark.parametrize("positions", ["sincos_uniform", "learned", "learned_separable", "rope"])
def test_cooldown_with_larger_and_longer_clips(positions, synthetic_shards, tmp_path):
    kind = [f"model.positions={positions}", f"method.predictor.positions={positions}", "run.steps=1"]
    run(synthetic_shards, tmp_path / "small", *kind)
    where = tmp_path / "small" / "checkpoints" / "step-00000001"
    (row,) = run(synthetic_shards, tmp_path / "large", *kind, f"run.init={where}", frames=8, size=32)
    assert math.isfinite(row["loss"]) and row["lr"] > 0
    state = load_checkpoint(tmp_path / "large" / "checkpoints")
    cfg = from_tree(state["provenance"]["config"], TrainConfig, "state")
    objective = cfg.build_objective()
    before = load_file(where / "model.safetensors")
    objective.load_state_dict(initial_weights(objective, cfg, str(where))[0], strict=False)
    for name, value in objective.state_dict().items():
        if "positions." not in name:
            assert value.equal(before[name]), name
        else:
            axes = {"table": "thw", "time": "t", "space": "hw"}[name.rsplit(".", 1)[1]]
            old, new = (
                Grid(*(n if axis in axes else 1 for axis, n in zip("thw", g, strict=True))) for g in GRIDS
            )
            assert value.equal(resize_table(before[name], old, new)), name
            assert len(value) == new.n
    assert load_encoder(str(tmp_path / "large")).encoder.grid == GRIDS[1]


GRIDS = Grid(2, 2, 2), Grid(4, 4, 4)

"""training/blocks.py: which graphs torch.compile makes of the blocks, and which kernels attention may use."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vidssl.config import load_config
from vidssl.core.rng import KeyedRNG
from vidssl.model.cross_predictor import CrossBlock, CrossStack
from vidssl.model.grid import Grid
from vidssl.model.vit import Block, TransformerStack
from vidssl.objective.masks import MASKS
from vidssl.objective.objective import Objective
from vidssl.training.blocks import all_stacks, configure_blocks, varying_stacks
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[3]
SMALL = ["run.out=x", "data.train=x", "augment.kind=center_crop", "augment.size=32", "data.frames=8"]
SMALL += ["data.stride=1", "model.patch=8", "run.steps=9", "run.batch=4", "optim.warmup=0"]
SMALL += ["model.kind=vit", "model.dim=48", "model.depth=2", "model.heads=3"]
SMALL += ["method.predictor.width=24", "method.predictor.depth=2", "method.predictor.heads=2"]


def build(method: str, *more: str) -> Objective:
    file = str(ROOT / f"configs/method/{method}.yaml")
    return load_config([file, *SMALL, *more], TrainConfig).build_objective()


def take_step(objective: Objective, step: int, clips: int) -> Tensor:
    """Forward and backward pass in bf16."""
    video = torch.rand(clips, 3, 8, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(video, KeyedRNG(0, step, torch.arange(clips) + 4 * step))["loss"]
    loss.backward()
    return loss


@pytest.mark.parametrize(("method", "sizes", "most"), [("videomae", (3,), 3), ("vjepa2", (3, 2), 8)])
def test_blocks_are_not_compiled_again(method, sizes, most, monkeypatch):
    """Drop path, the one block with fewer outputs, target and online encoder, recomputed activations, micro-
    batches of two sizes, masks of other counts: after a step of each size there is nothing new."""
    monkeypatch.setattr(
        Block, "compile", lambda self, **options: nn.Module.compile(self, backend="eager", **options)
    )
    torch._dynamo.reset()
    counters.clear()
    objective = build(method, "model.drop_path=0.2")
    graphs = []
    counts = set()
    objective.predictor.register_forward_pre_hook(lambda _, args: counts.add(args[1].target.shape[2]))
    for recomputed in (False, True):
        configure_blocks(objective, activation_checkpointing=recomputed, compile=True)
        for step in range(3):
            for clips in sizes:
                take_step(objective, step, clips)
            graphs.append(counters["stats"]["unique_graphs"])
    assert len(counts) > 1 or method == "videomae"
    assert graphs[0] == graphs[-1] <= most, graphs
    assert not counters["graph_break"]


VIDEO = ["model.tubelet=2", "model.positions=sincos_uniform", "method.predictor.positions=sincos_uniform"]


@pytest.mark.parametrize(
    ("method", "stack"), [("crossmae", CrossStack), ("umd", TransformerStack)], ids=["cross", "conditioned"]
)
def test_compiled_stacks_of_predictors_give_the_same_loss_and_gradients(method, stack, monkeypatch):
    backend = partial(nn.Module.compile, backend="aot_eager")
    for block in (Block, CrossBlock):
        monkeypatch.setattr(block, "compile", lambda self, **options: backend(self, **options))
    torch._dynamo.reset()
    counters.clear()
    objective = build(method, *VIDEO, "model.depth=1", "method.predictor.depth=1")
    assert isinstance(objective.predictor.blocks, stack)
    with torch.no_grad():  # what starts at zero would hide what follows it
        for name, p in objective.named_parameters():
            if "modulation" in name:
                p.normal_(std=0.1)
    found = []
    for compiled in (False, True):
        configure_blocks(objective, activation_checkpointing=compiled, compile=compiled)
        objective.zero_grad()
        loss = objective(torch.ones(2, 3, 8, 32, 32), KeyedRNG(0, 0, torch.arange(2)))["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in objective.parameters() if p.requires_grad)])
    for plain, same in zip(*found, strict=True):
        torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] > 1 and not counters["graph_break"]


@pytest.mark.parametrize("kind", [k for k, mask in MASKS.items() if not getattr(mask, "counts_vary", True)])
def test_masks_that_say_so_keep_their_counts(kind):
    grid = Grid(4, 5, 6)
    counts = set()
    masker = MASKS[kind]() if kind != "scored" else MASKS[kind](share=(0.0, 1.0), share_steps=20)
    for step in range(20):
        rng = KeyedRNG(0, step, torch.arange(3) + 3 * step)
        if kind == "scored":
            masks = masker.from_scores(torch.rand(3, grid.n), grid, rng)
        else:
            masks = masker(torch.zeros(3, 3, 8, 40, 48), grid, rng)
        counts.add(tuple((m.context.shape[1], *m.target.shape[1:]) for m in masks))
    assert len(counts) == 1


def test_only_stacks_whose_counts_vary_do_without_the_kernel_that_plans_each_shape():
    for method, some in (("videomae", False), ("vjepa", True)):
        objective = build(method)
        configure_blocks(objective, activation_checkpointing=False)
        varying = set(varying_stacks(objective))
        assert varying == ({objective.encoder.blocks, objective.predictor.blocks} if some else set())
        for stack in all_stacks(objective):
            assert {block.attn.counts_vary for block in stack} == {stack in varying}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("method", ["videomae", "vjepa", "vjepa2_1"])
def test_attention_is_called_as_flash_attention_takes_it(method, recomputed, monkeypatch):
    """Its conditions: f16 or bf16 for all of q, k and v, a contiguous last axis, no mask, no dropout. That
    the kernel is chosen only a GPU can show."""
    calls = []
    attention = F.scaled_dot_product_attention

    def seen(*qkv, **options):
        calls.append(
            (
                {t.dtype for t in qkv},
                {t.stride(-1) for t in qkv},
                len(qkv),
                options,
                torch.backends.cuda.cudnn_sdp_enabled(),
            )
        )
        return attention(*qkv, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    objective = build(method, *(["model.levels=[0,1]"] if method == "vjepa2_1" else []))
    configure_blocks(objective, activation_checkpointing=recomputed)
    take_step(objective, 0, 2)
    stacks = 2 if method == "videomae" else 5
    assert len(calls) == (2 * stacks if not recomputed else 2 * stacks + 2 * (stacks - (stacks > 2)))
    for dtypes, strides, tensors, options, _ in calls:
        assert (dtypes, strides, tensors, options) == ({torch.bfloat16}, {1}, 3, {"attn_mask": None})
    assert sum(with_cudnn for *_, with_cudnn in calls) == (len(calls) if method == "videomae" else 2)

"""FLOPs and utilization of a step, and the allocator's memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.heads import AttentiveHead
from vidssl.model.vit import Attention, Block, Encoder
from vidssl.objective import agreement
from vidssl.objective.agreement import ViewAgreement
from vidssl.objective.errors import ERRORS
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.training import perf
from vidssl.training.blocks import configure_blocks
from vidssl.training.flops import ModelFlops, patch_flops, published_peak

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import METHODS, make_teacher, small


@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_a_block_are_those_of_its_products(backward):
    """Also on the CPU, whose attention torch itself does not count."""
    batch, tokens, dim = 2, 96, 64
    block = Block(dim, heads=4)
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    with perf.count_flops() as total:
        y = block(x)
        if backward:
            y.sum().backward()
    linear = 2 * batch * tokens * dim * dim * (3 + 1 + 4 + 4)  # q, k, v; output projection; MLP of width 4
    product = 2 * batch * tokens * tokens * dim  # q k^T, or scores v
    assert total() == (3 * linear + (2 + 5) * product if backward else linear + 2 * product)


def test_flops_do_not_depend_on_the_kernel_of_attention():
    layer = Attention(64, heads=4)
    x = torch.randn(2, 96, 64)
    counted = []
    for kernel in (nn.attention.SDPBackend.FLASH_ATTENTION, nn.attention.SDPBackend.MATH):
        with nn.attention.sdpa_kernel(kernel), perf.count_flops() as total:
            layer(x)
        counted.append(total())
    assert counted[0] == counted[1] > 0


def counted(objective: nn.Module, frames: int, step: int) -> tuple[int, int]:
    """Returns our count and torch's of a step's forward pass, without gradients."""
    video = torch.rand(4, 3, frames, 32, 32)
    meter = ModelFlops(objective)
    objective.requires_grad_(False)
    with meter.counting(), perf.count_flops() as total:
        objective(video, KeyedRNG(0, step, torch.arange(4) + step * 4))
    return meter.total, total()


@pytest.mark.parametrize("method", METHODS)
def test_model_flops_of_the_masks_drawn_are_those_that_torch_counts(method, monkeypatch, tmp_path):
    """Batches have one shape; the block masks keep other numbers of tokens in each step."""
    cfg = small(method, *make_teacher(method, tmp_path))
    objective = cfg.build_objective()
    for term in getattr(objective, "terms", [objective]):  # comparing features is no network's work
        if isinstance(term, MaskedPrediction):
            term.aux = nn.ModuleList()
            if cfg.method.error.kind in ("nce", "swapped_clusters"):
                del term.error
                term.error = ERRORS["l2"]()
        if isinstance(term, ViewAgreement):  # nor is making views
            monkeypatch.setattr(agreement, "cut_view", lambda v, view, *_: v[..., : view.size, : view.size])
            monkeypatch.setattr(term.loss, "forward", lambda pred, *_: pred.mean())
            term.aux = []
    frames = cfg.data.frames
    totals = {counted(objective, frames, step) for step in range(4)}
    assert all(ours == torchs > 0 for ours, torchs in totals)
    assert len(totals) > 1 or not objective.varying_parts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_count_twice_and_what_is_computed_again_does_not(checkpointing):
    encoder = Encoder(8, 32, 32, tubelet=2, patch=8, dim=32, depth=2, heads=2)
    configure_blocks(encoder, activation_checkpointing=checkpointing)
    video = torch.rand(2, 3, 8, 32, 32)
    meter = ModelFlops(encoder)
    with meter.counting(), torch.no_grad():
        encoder(video)
    forward = meter.total
    with meter.counting():
        encoder(video).sum().backward()
    embedding = patch_flops(encoder.patch_embed)(torch.empty(2, 64, 3, 2, 8, 8))
    assert meter.total == 3 * forward - embedding  # of the pixels there is no gradient
    encoder(video)
    assert meter.total == 3 * forward - embedding  # outside of the context nothing counts


@pytest.mark.parametrize("depth", [1, 3])
def test_flops_of_an_attentive_head(depth):
    head = AttentiveHead(32, 4, 5, depth)
    tokens = torch.randn(2, 96, 32)
    meter = ModelFlops(head)
    head.requires_grad_(False)
    with meter.counting(), perf.count_flops() as total:
        head(tokens)
    assert meter.total == total()


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA L4", "fp32", 30.3),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
        ("Some Device 3", "bf16", None),
    ],
)
def test_published_peaks_are_found_by_the_device_name(name, precision, tflops):
    peak = published_peak(name, precision)
    assert peak == (tflops and pytest.approx(tflops * 1e12))


@pytest.mark.parametrize("known", [True, False])
def test_utilization_of_an_unknown_device_is_not_called_mfu(known, monkeypatch):
    monkeypatch.setattr(perf, "published_peak", lambda *_: 1e12 if known else None)
    monkeypatch.setattr(perf.torch.cuda, "get_device_name", lambda _: "A device")
    monkeypatch.setattr(perf, "matmul_rate", lambda *_: 5e11)
    utilization = perf.Utilization(torch.device("cuda"), "bf16", nn.Linear(10, 10))
    assert utilization.row(10**11, seconds=0.5) == {"mfu": 0.2} if known else {"matmul_utilization": 0.4}


FAULTS = """
import resource, torch
from vidssl.training.malloc import tune_malloc
tuned = {tune} and tune_malloc()
for i in range(30):  # the first ones warm the allocator up
    if i == 20:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
print(tuned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""


@pytest.mark.slow
def test_tuned_malloc_keeps_freed_memory():
    """Counts page faults while 64 MB are allocated and freed ten times."""
    faults = {}
    for tune in (True, False):
        script = FAULTS.format(tune=tune)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        tuned, faults[tune] = done.stdout.split()
        if tune and tuned == "False":
            pytest.skip("a GPU, or a C library without mallopt")
    assert int(faults[True]) < 20 and int(faults[False]) >= 10 * (64 // 2)  # with pages of 2 MB

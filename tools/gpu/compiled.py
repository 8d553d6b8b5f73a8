"""Compiled blocks compute what they compute uncompiled, and are not compiled again in every step."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from gpu.check import run
from torch._dynamo.utils import counters

from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.training.blocks import configure_blocks

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/integration"))
from test_methods import small

METHODS = ("videomae", "videomaev2", "vjepa", "vjepa2")
STEPS = 8
LIMIT = 2e-3  # relative difference of a loss, in f32 (a compiled product may use other tiles)


def losses(method: str, device: str, compile: bool) -> list[float]:
    """Of forward and backward passes with the masks of different steps; the weights stay."""
    objective = small(method).build_objective().to(device)
    configure_blocks(objective, False, compile)
    frames = objective.encoder.grid.t * 2
    video = torch.randint(0, 256, (8, 3, frames, 32, 32), dtype=torch.uint8).to(device)
    positions = torch.arange(8, device=device)
    found = []
    for step in range(STEPS):
        loss = objective(normalise(video), KeyedRNG(0, step, positions + 8 * step))["loss"]
        loss.backward()
        found.append(loss.item())
    return found


def compiled(a: argparse.Namespace) -> tuple[bool, str, dict[str, Any]]:
    figures: dict[str, Any] = {}
    for method in METHODS:
        torch.manual_seed(0)
        plain = torch.tensor(losses(method, a.device, False))
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        fused = torch.tensor(losses(method, a.device, True))
        error = ((fused - plain) / plain).abs().max().item()
        graphs = counters["stats"]["unique_graphs"]
        limits = sum(counters["recompile_limit"].values()) if "recompile_limit" in counters else 0
        figures[method] = {"difference": error, "graphs": graphs, "recompile_limit": limits}
        print(method, figures[method])
    passes = all(f["difference"] <= LIMIT and not f["recompile_limit"] for f in figures.values())
    graphs = ", ".join(f"{method} {f['graphs']}" for method, f in figures.items())
    largest = max(f["difference"] for f in figures.values())
    return passes, f"largest difference of a loss {largest:.1e}; graphs in {STEPS} steps: {graphs}", figures


if __name__ == "__main__":
    run(compiled, __doc__)

"""Training steps side by side with transformers' VideoMAE: clips a second in alternation, FLOPs counted.

python tools/bench_step.py [--model vit_small] [--batch 8] [--rounds 8] [--precision fp32|bf16] [--out FILE.json]

One process, one batch of noise (16 x 224 px), forward, backward and AdamW. The contenders take turns step by step, so
that whatever else the machine does hits all alike; the median counts. FLOPs are counted by torch, of matrix products,
convolutions and attention. `share` is FLOPs a second over what the same machine reaches in a 4096 x 4096 product of the
same precision, which is measured between the rounds too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vidssl import config
from vidssl.draws import Draws
from vidssl.errors import UserError, run_cli
from vidssl.model.vit import MODELS
from vidssl.objective.targets import Ema
from vidssl.optim import Optim, make_optimizer
from vidssl.train import SCHEMA, make_objective

ROOT = Path(__file__).parents[1]
DECODERS = {
    "vit_small": (192, 4, 3),
    "vit_base": (384, 4, 6),
    "vit_large": (512, 12, 8),
}  # VideoMAE: width, depth, heads
Step = Callable[[Tensor, int], None]


def ours(method: str, model: str, device: str, *options: str) -> tuple[Step, nn.Module]:
    """A step of a configuration in configs/."""
    files = [str(ROOT / f"configs/{name}.yaml") for name in (f"method/{method}", f"model/{model}", "data/clips_16x4")]
    cfg = config.load([*files, "run.out=x", "run.steps=1000", "run.batch=1", *options], SCHEMA)
    objective = make_objective(cfg).to(device)
    optimizer = make_optimizer(objective, config.build(cfg["optim"], Optim))

    def step(video: Tensor, number: int) -> None:
        positions = torch.arange(len(video), device=device) + number * len(video)
        optimizer.zero_grad()
        objective(video, Draws(0, number, positions))["loss"].backward()
        optimizer.step()
        if isinstance(objective.target, Ema):
            objective.target.update(objective.encoder, 0.999)

    return step, objective


def theirs(model: str, device: str) -> tuple[Step, nn.Module]:
    """VideoMAEForPreTraining of the same sizes, tube mask of 90 %, torch's fused attention, AdamW."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    width, depth, heads = DECODERS[model]
    size = MODELS[model].keywords  # type: ignore[attr-defined]
    net = VideoMAEForPreTraining(
        VideoMAEConfig(
            hidden_size=size["dim"],
            num_hidden_layers=size["depth"],
            num_attention_heads=size["heads"],
            intermediate_size=4 * size["dim"],
            decoder_hidden_size=width,
            decoder_num_hidden_layers=depth,
            decoder_num_attention_heads=heads,
            decoder_intermediate_size=4 * width,
            layer_norm_eps=1e-6,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)

    def step(video: Tensor, number: int) -> None:
        places = torch.rand(len(video), 196, generator=generator).argsort(1) < 176  # as many hidden as ours
        optimizer.zero_grad()
        net(video.transpose(1, 2), bool_masked_pos=places.repeat(1, 8).to(device)).loss.backward()
        optimizer.step()

    return step, net


def timed(action: Callable[[], Any], device: str) -> float:
    """Seconds, all work on the device done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def count_flops(action: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=sorted(DECODERS), default="vit_small")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--out", type=Path)
    a = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if a.precision == "fp32" else torch.bfloat16
    width, depth, heads = DECODERS[a.model]
    size = MODELS[a.model].keywords  # type: ignore[attr-defined]
    decoder = [f"method.predictor.{k}={v}" for k, v in (("width", width), ("depth", depth), ("heads", heads))]
    contenders = {
        "vidssl videomae": ours("videomae", a.model, device, *decoder),
        "vidssl vjepa": ours("vjepa", a.model, device, f"method.predictor.heads={size['heads']}"),
    }
    try:
        contenders["transformers VideoMAE"] = theirs(a.model, device)
    except ImportError:
        raise UserError("transformers is not installed: pip install 'vidssl[hf]'") from None
    video = torch.randn(a.batch, 3, 16, 224, 224, device=device)
    square = torch.randn(4096, 4096, device=device, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    products: list[float] = []
    flops: dict[str, int] = {}
    with torch.autocast(device, torch.bfloat16, enabled=dtype != torch.float32):
        for name, (step, _) in contenders.items():  # the first step of each also warms up
            flops[name] = count_flops(partial(step, video, 0))
        for number in range(1, a.rounds + 1):
            products.append(timed(lambda: square @ square, device))
            for name, (step, _) in contenders.items():
                seconds[name].append(timed(partial(step, video, number), device))
    rate = 2 * 4096**3 / statistics.median(products)
    report: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    report |= {"model": a.model, "batch": a.batch, "precision": a.precision, "matmul_gflops_per_s": rate / 1e9}
    print(f"{a.model}, 16 x 224 px, batch {a.batch}, {a.precision}, {device}; 4096^2 product {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':24s}{'clips/s':>9s}{'(spread)':>16s}{'GFLOP/clip':>12s}{'share':>8s}{'M params':>10s}")
    for name, (_, net) in contenders.items():
        median, each = statistics.median(seconds[name]), flops[name] / a.batch
        row = {
            "clips_per_s": a.batch / median,
            "spread": [a.batch / max(seconds[name]), a.batch / min(seconds[name])],
            "gflop_per_clip": each / 1e9,
            "share_of_matmul": flops[name] / median / rate,
            "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        }
        report[name] = row
        low, high = row["spread"]
        print(
            f"{name:24s}{row['clips_per_s']:9.2f}{f'{low:.2f} .. {high:.2f}':>16s}{each / 1e9:12.1f}"
            f"{row['share_of_matmul']:8.2f}{row['parameters'] / 1e6:10.1f}"
        )
    if a.out:
        a.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_cli(main)

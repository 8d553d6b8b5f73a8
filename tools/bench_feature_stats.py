"""Measures the cost of the feature statistics relative to the training steps between them.

python tools/bench_feature_stats.py [--model vit_small] [--batch 8] [--size 224] [--every 100] [--steps 3]

For VideoMAE and V-JEPA, on noise: FLOPs as torch counts them (matrix products, convolutions, attention) and
seconds (which also hold the spectra), of one measurement and of `every` steps; best of a few. Seconds are of
this process's CPU; on a GPU, where both run in bf16, of the clock.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from vidssl import config
from vidssl.config import load_config
from vidssl.core.errors import run_cli
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.training.feature_stats import FeatureStats
from vidssl.training.optim import build_optimizer
from vidssl.training.perf import count_flops
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[1]


def now_s(device: torch.device) -> float:
    """Seconds: CPU time of this process; on a GPU the clock, once all its work is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def cost(action: Callable[[], object], times: int, device: torch.device) -> tuple[int, float]:
    """Returns FLOPs and the least seconds of `times` calls."""
    with count_flops() as total:
        action()
    seconds = []
    for _ in range(times):
        start_s = now_s(device)
        action()
        seconds.append(now_s(device) - start_s)
    return total(), min(seconds)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="vit_small")
    p.add_argument("--batch", type=int, default=8, help="clips of one process")
    p.add_argument("--size", type=int, default=224, help="pixels")
    p.add_argument(
        "--every", type=int, default=100, help="steps between measurements (run.feature_stats_every)"
    )
    p.add_argument("--steps", type=int, default=3, help="calls of which the fastest counts")
    a = p.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    u8 = torch.randint(0, 256, (a.batch, 3, 16, a.size, a.size), dtype=torch.uint8, device=device)
    print(
        f"{a.model}, 16 x {a.size} px, {a.batch} clips, {device}, torch {torch.__version__}, every "
        f"{a.every} steps"
    )
    print(
        f"{'':12s}{'GFLOP step':>12s}{'measure':>10s}{'share':>8s}"
        f"{'s step':>12s}{'measure':>10s}{'share':>8s}"
    )
    for method in ("videomae", "vjepa"):
        files = [str(ROOT / f"configs/{n}.yaml") for n in (f"method/{method}", "data/clips_16x4")]
        files += [f"model.kind={a.model}", "data.train=x"]
        sizes = [f"augment.size={a.size}", f"run.batch={a.batch}", "run.out=x", "run.steps=1000"]
        heads = config.merge([*files, *sizes])[0]["method"]["predictor"]["heads"]
        width = config.merge([*files, *sizes])[0]["method"]["predictor"]["width"]
        sizes += [f"method.predictor.heads={heads if width % heads == 0 else width // 64}"]
        cfg = load_config([*files, *sizes], TrainConfig)
        objective = cfg.build_objective().to(device)
        stats = FeatureStats()
        autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type != "cpu")
        optimizer = build_optimizer(objective, cfg.optim)

        def step(objective=objective, optimizer=optimizer, autocast=autocast) -> None:
            optimizer.zero_grad()
            with autocast():
                loss = objective(normalise(u8), KeyedRNG(0, 0, torch.arange(a.batch)))["loss"]
            loss.backward()
            optimizer.step()
            objective.update(0.5)

        stats.add_clips(u8)
        # type: ignore[misc]
        (f, s) = cost(step, a.steps, device)
        (fm, sm) = cost(lambda s=stats, o=objective, a=autocast: s.measure(o, a), a.steps, device)
        shares = [x / (a.every * y + x) for x, y in ((fm, f), (sm, s))]
        print(
            f"{method:12s}{f / 1e9:12.1f}{fm / 1e9:10.1f}{shares[0]:8.2%}{s:12.2f}{sm:10.2f}{shares[1]:8.2%}",
            flush=True,
        )


if __name__ == "__main__":
    run_cli(main)

"""Compares training steps with transformers' models and the published loop: clips per second.

python tools/bench_step.py [--model vit_small] [--batch 8] [--rounds 8] [--precision fp32|bf16] [--compile]
    [--tune-malloc ours|all|none]

One batch of noise (16 x 224 px), forward, backward and AdamW, each contender in a process of its own, ours
with efficiency.tune_malloc as train.py has it. The two of a pair take turns step by step, so that whatever
else the machine does hits both alike; the median counts. They have the same weights and masks, and their
first losses (of V-JEPA 2 the features) must agree:

- vidssl's VideoMAE, and transformers' VideoMAEForPreTraining, read from our export;
- vidssl's V-JEPA, and the published loop written plainly (plain_vjepa.py);
- forward and backward through vidssl's V-JEPA 2 encoder and transformers' VJEPA2Model, the whole clip.

FLOPs are those of matrix products, convolutions and attention. `share` is FLOPs a second over what the same
machine reaches in a 4096 x 4096 product of the same precision, measured between the rounds. `kept` are the
bytes that a forward pass keeps for the backward pass, each storage once, weights left out (not their casts);
`peak` is what the process has held at most, torch and weights included. Then come, of both our methods, where
a step's time goes, and of V-JEPA what is beyond encoder and predictor: its share of time and FLOPs.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench.contenders import DECODERS, MOMENTUM, PAIRS, Contender, make, rng_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vidssl.core.errors import UserError, run_cli
from vidssl.objective.objective import Objective
from vidssl.training import perf
from vidssl.training.malloc import tune_malloc

KINDS = {  # of operations, by parts of their names
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution"),
    "attention": ("scaled_dot_product",),
    "optimizer and momentum": ("adamw", "AdamW", "lerp", "addcdiv", "addcmul"),
    "norms and activations": ("layer_norm", "gelu", "silu"),
    "copies": ("copy_", "aten::cat", "gather", "index"),
}


class Row(NamedTuple):
    """The measurements of one contender."""

    seconds: list[float]  # of each round
    flops: int  # of a step
    kept: int  # bytes, for the backward pass
    peak: float  # bytes of its process


@contextlib.contextmanager
def keeping(model: nn.Module) -> Iterator[dict[int, int]]:
    """Collects the storages (address: bytes) saved for backward inside this context, without weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # else what a node has made would keep that node

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def where_time_goes(contender: Contender, video: Tensor) -> dict[str, float]:
    """Returns the share of a step's time for each kind of operation."""
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if video.is_cuda else [])]
    ) as seen:
        contender.step(video, 1)
    cuda = video.device.type == "cuda"
    shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in seen.key_averages():
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        shares[
            next((kind for kind, parts in KINDS.items() if any(p in event.key for p in parts)), "the rest")
        ] += took
    total = sum(shares.values())
    return {kind: took / total for kind, took in shares.items()}


def beyond(objective: Objective, video: Tensor, device: str, rounds: int) -> dict[str, tuple[float, int]]:
    """Returns (seconds, FLOPs) of the parts of a V-JEPA step besides encoder and predictor."""
    target: Any = objective.target
    grid = objective.encoder.grid_of(video)
    parts: dict[str, Callable[[], Any]] = {
        "target pass": lambda: target(video),
        "masks": lambda: objective.mask(video, grid, rng_of(video, 1)),
        "momentum update": lambda: target.update(objective.encoder, MOMENTUM),
    }
    return {
        name: (statistics.median(timed(part, device) for _ in range(rounds + 1)), count_flops(part))
        for name, part in parts.items()
    }


def timed(action: Callable[[], Any], device: str) -> float:
    """Returns the seconds of an action, device work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def count_flops(action: Callable[[], Any]) -> int:
    with perf.count_flops() as total:
        action()
    return total()


def check_equal(first: str, second: str, losses: dict[str, float]) -> None:
    a, b = losses[first], losses[second]
    print(f"first losses of {first} and {second}: {a:.7f}, {b:.7f}")
    if abs(a - b) > 1e-5 * max(1.0, abs(a)):
        raise UserError(f"{first} and {second} do not compute the same: {a} and {b}")


def serve(pipe: Connection, name: str, a: argparse.Namespace, device: str) -> None:
    """Runs a contender in its own process: answers requests from the pipe until it receives None."""
    if a.tune_malloc == "all" or (a.tune_malloc == "ours" and name.startswith("vidssl")):
        tune_malloc()
    contender, objective = make(name, a.model, device, a.compile)
    contender = contender._replace(bf16=a.precision == "bf16")
    video = torch.randn(a.batch, 3, 16, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    with keeping(contender.model) as storages:
        loss = float(contender.loss(video, 0).detach())
    if name != PAIRS[1][0]:  # the one of which more is asked
        del objective
    for number in range(2):  # this warms up; in the second one there are moments, too
        contender.step(video, number)
    peak = perf.peak_memory(torch.device(device))
    pipe.send((loss, count_flops(partial(contender.step, video, 0)), sum(storages.values()), peak))
    does: dict[str, Callable[[int], Any]] = {
        "step": lambda number: timed(partial(contender.step, video, number), device),
        "where": lambda _: where_time_goes(contender, video),
        "beyond": lambda rounds: beyond(objective, video, device, rounds),
    }
    while (order := pipe.recv()) is not None:
        what, number = order
        pipe.send(does[what](number))


class ContenderProcess:
    """The parent's end of a process that runs `serve`."""

    def __init__(self, name: str, a: argparse.Namespace, device: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, a, device), daemon=True)
        self.process.start()
        theirs.close()
        self.loss, self.flops, self.kept, self.peak = self.pipe.recv()

    def __call__(self, what: str, number: int = 0) -> Any:
        self.pipe.send((what, number))
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def print_table(
    rows: dict[str, Row], pairs: list[tuple[str, str]], rate: float, batch: int
) -> dict[str, Any]:
    """Prints a line for each contender and each pair; returns the figures."""
    report: dict[str, Any] = {}
    print(
        f"{'':26s}{'clips/s':>9s}{'(spread)':>16s}{'GFLOP/clip':>12s}"
        f"{'share':>8s}{'kept MB/clip':>14s}{'peak MB':>10s}"
    )
    for name, r in rows.items():
        median = statistics.median(r.seconds)
        each = r.flops / batch
        low, high = batch / max(r.seconds), batch / min(r.seconds)
        row = {"clips_per_s": batch / median, "spread": [low, high], "gflop_per_clip": each / 1e9}
        row |= {"share_of_matmul": r.flops / median / rate, "kept_mb_per_clip": r.kept / batch / 1e6}
        report[name] = row | {"peak_mb": r.peak / 1e6}
        print(
            f"{name:26s}{row['clips_per_s']:9.2f}{f'{low:.2f} .. {high:.2f}':>16s}{each / 1e9:12.1f}"
            f"{row['share_of_matmul']:8.2f}{row['kept_mb_per_clip']:14.0f}{r.peak / 1e6:10.0f}"
        )
    for first, second in pairs:
        ratio = statistics.median(
            b / a for a, b in zip(rows[first].seconds, rows[second].seconds, strict=True)
        )
        report[f"{first} / {second}"] = ratio
        print(f"{first} over {second}: {ratio:.2f} x the clips/s (median of the rounds)")
    return report


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=sorted(DECODERS), default="vit_small")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--compile", action="store_true", help="our blocks by torch.compile")
    p.add_argument(
        "--tune-malloc", choices=("ours", "all", "none"), default="ours", help="for which contenders"
    )
    p.add_argument("--only", default="", help="pairs with these words in the name, such as VideoMAE")
    p.add_argument("--out", type=Path)
    a = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed: pip install 'vidssl[hf]'")
    square = torch.randn(
        4096, 4096, device=device, dtype=torch.float32 if a.precision == "fp32" else torch.bfloat16
    )
    products = []
    shares = {}
    rest = {}
    rows: dict[str, Row] = {}
    pairs = [pair for pair in PAIRS if a.only in " ".join(pair)]
    for pair in pairs:
        servers = {name: ContenderProcess(name, a, device) for name in pair}
        if a.precision == "fp32":
            check_equal(*pair, {name: s.loss for name, s in servers.items()})
        seconds: dict[str, list[float]] = {name: [] for name in pair}
        for number in range(1, a.rounds + 1):
            products.append(timed(lambda: square @ square, device))
            for name, server in servers.items():
                seconds[name].append(server("step", number))
        for name, s in servers.items():
            rows[name] = Row(seconds[name], s.flops, s.kept, s.peak)
        if pair != PAIRS[2]:
            shares[pair[0]] = servers[pair[0]]("where")
        if pair == PAIRS[1]:
            rest = servers[pair[0]]("beyond", a.rounds)
        for server in servers.values():
            server.end()
    rate = 2 * 4096**3 / statistics.median(products)
    report: dict[str, Any] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    report |= {k: getattr(a, k) for k in ("model", "batch", "precision", "compile", "tune_malloc")}
    report |= {"matmul_gflops_per_s": rate / 1e9, "where_time_goes": shares}
    print(
        f"{a.model}, 16 x 224 px, batch {a.batch}, {a.precision}, {device}; 4096^2 product "
        f"{rate / 1e9:.0f} GFLOP/s"
    )
    report |= print_table(rows, pairs, rate, a.batch)
    for name, kinds in shares.items():
        print(f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items()))
    for name, (took, count) in rest.items():
        step = rows["vidssl V-JEPA"]
        report[name] = {"time": took / statistics.median(step.seconds), "flops": count / step.flops}
        time_of, flops_of = report[name].values()
        print(f"V-JEPA's {name}: {time_of:.1%} of the step's time, {flops_of:.1%} of its FLOPs")
    if a.out:
        a.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_cli(main)

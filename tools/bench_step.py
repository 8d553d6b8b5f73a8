"""Compares training steps with transformers' models and the published loop: clips per second.

python tools/bench_step.py [--model vit_small] [--batch 8] [--rounds 8] [--precision fp32|bf16]
    [--pairs videomae vjepa vjepa2] [--compile no|yes|both] [--tune-malloc ours|all|none] [--details]
    [--cudnn] [--out FILE.json]
On a GPU, within 100 s: --pairs videomae --model vit_large --batch 128 --precision bf16 --compile both

One batch of noise (16 x 224 px), forward, backward and AdamW, each contender in a process of its own, ours
with efficiency.tune_malloc as train.py has it. Those of a pair take turns, so that whatever else the machine
does hits all alike; the median counts. They have the same weights and masks, and their first losses (of
V-JEPA 2 the features) must agree:

- vidssl's VideoMAE, and transformers' VideoMAEForPreTraining, read from our export;
- vidssl's V-JEPA, and the published loop written plainly (plain_vjepa.py);
- forward and backward through vidssl's V-JEPA 2 encoder and transformers' VJEPA2Model, the whole clip.

On a CPU a turn is a step, on a GPU a few of them in a row, as in training, up to a synchronisation; all masks
that are timed are used once before, since kernels are planned for new shapes.

GFLOP/clip are those of matrix products, convolutions and attention in the first step. `share` is, of all
contenders of a pair, the model FLOPs of the masks drawn (training/flops.py) a second, over the device's
published dense peak (then it is the MFU), or over what the machine reaches in a square product of the same
precision, measured between the rounds. `kept` are the bytes that a forward pass keeps for the backward pass,
each storage once, weights left out (not their casts); `peak` is what the process has held at most, torch and
weights included (on a GPU: what is allocated there). With --details (on a CPU always) then come, of both our
methods, where a step's time goes, and of V-JEPA what is beyond encoder and predictor: its share of time and
FLOPs.
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
from bench.contenders import COMPILED, DECODERS, MOMENTUM, PAIRS, Contender, make, rng_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder
from vidssl.objective.objective import Objective
from vidssl.training import perf
from vidssl.training.flops import ModelFlops, published_peak
from vidssl.training.malloc import tune_malloc

KINDS = {  # of operations, by parts of their names
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution"),
    "attention": ("scaled_dot_product",),
    "optimizer and momentum": ("adamw", "AdamW", "lerp", "addcdiv", "addcmul"),
    "norms and activations": ("layer_norm", "gelu", "silu"),
    "copies": ("copy_", "aten::cat", "gather", "index"),
}


STEPS_IN_A_TURN = {"cpu": 1, "cuda": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


class Row(NamedTuple):
    """The measurements of one contender."""

    seconds: list[float]  # a step, of each round
    flops: int  # of a step
    kept: int  # bytes, for the backward pass
    peak: float  # bytes of its process
    model_flops: list[int]  # of the steps of each round, of those of the pair that are ours


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


def check_equal(losses: dict[str, float], precision: str) -> None:
    print("first losses: " + ", ".join(f"{name} {loss:.7f}" for name, loss in losses.items()))
    first = next(iter(losses.values()))
    for name, loss in losses.items():
        if abs(loss - first) > LOSS_TOLERANCE[precision] * max(1.0, abs(first)):
            raise UserError(f"{next(iter(losses))} and {name} do not compute the same: {first} and {loss}")


def take_turn(contender: Contender, video: Tensor, meter: ModelFlops, number: int) -> tuple[float, int]:
    """Takes the steps of a turn. Returns (seconds, model FLOPs) of a step, on average."""
    device = video.device.type
    steps = STEPS_IN_A_TURN[device]
    total = 0

    def turn() -> None:
        nonlocal total
        for step in range(number * steps, (number + 1) * steps):
            with meter.counting():
                contender.step(video, step)
            total += meter.total

    seconds = timed(turn, device)
    return seconds / steps, total // steps


def serve(pipe: Connection, name: str, a: argparse.Namespace, device: str) -> None:
    """Runs a contender in its own process: answers requests from the pipe until it receives None."""
    if a.tune_malloc == "all" or (a.tune_malloc == "ours" and name.startswith("vidssl")):
        tune_malloc()
    contender, objective = make(name, a.model, device, a.cudnn)
    contender = contender._replace(bf16=a.precision == "bf16")
    video = torch.randn(a.batch, 3, 16, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    compiled = name.endswith(COMPILED)
    with contextlib.nullcontext({}) if compiled else keeping(contender.model) as storages:
        loss = float(contender.loss(video, 0).detach())
    if name != PAIRS["vjepa"][0]:  # the one of which more is asked
        del objective
    flops = 0 if compiled else count_flops(partial(contender.step, video, 0))
    meter = ModelFlops(contender.model if name.startswith("vidssl") else nn.Identity())
    for number in range(2 if device == "cpu" else a.rounds + 1):  # this warms up
        take_turn(contender, video, meter, number)
    peak = perf.peak_memory(torch.device(device))
    pipe.send((loss, flops, sum(storages.values()), peak))
    does: dict[str, Callable[[int], Any]] = {
        "step": lambda number: take_turn(contender, video, meter, number),
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

    def wait(self) -> None:
        """Waits until it can take steps."""
        self.loss, self.flops, self.kept, self.peak = self.pipe.recv()

    def __call__(self, what: str, number: int = 0) -> Any:
        self.pipe.send((what, number))
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def names_of(pair: str, compile: str) -> list[str]:
    """The contenders of a pair: ours, ours compiled, the other."""
    ours, other = PAIRS[pair]
    return [
        *([ours] if compile != "yes" else []),
        *([ours + COMPILED] if compile != "no" else []),
        other,
    ]


def measure(
    pair: str, a: argparse.Namespace, device: str, rates: list[float]
) -> tuple[dict[str, Row], dict[str, Any]]:
    """Returns the rows of the contenders of a pair, and its details."""
    names = names_of(pair, a.compile)
    servers = {name: ContenderProcess(name, a, device) for name in names}
    for server in servers.values():
        server.wait()
    check_equal({name: s.loss for name, s in servers.items()}, a.precision)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    model_flops: list[int] = []
    for number in range(1, a.rounds + 1):
        if device == "cpu":
            rates.append(perf.matmul_rate(torch.device(device), DTYPES[a.precision], repeats=1))
        for name, server in servers.items():
            took, flops = server("step", number)
            seconds[name].append(took)
            if name == names[0]:
                model_flops.append(flops)
    rows = {n: Row(seconds[n], s.flops, s.kept, s.peak, model_flops) for n, s in servers.items()}
    details: dict[str, Any] = {}
    if a.details and pair != "vjepa2":
        details["where"] = servers[names[0]]("where")
    if a.details and pair == "vjepa" and a.compile != "yes":
        details["beyond"] = servers[names[0]]("beyond", a.rounds)
    for server in servers.values():
        server.end()
    return rows, details


def print_rows(rows: dict[str, Row], rate: float, batch: int) -> dict[str, Any]:
    """Prints a line for each contender of a pair and how the first ones compare with the last; returns the
    figures."""
    report: dict[str, Any] = {}
    for name, r in rows.items():
        median = statistics.median(r.seconds)
        each = r.flops / batch
        low, high = batch / max(r.seconds), batch / min(r.seconds)
        row = {"clips_per_s": batch / median, "spread": [low, high], "gflop_per_clip": each / 1e9}
        row |= {"share": sum(r.model_flops) / sum(r.seconds) / rate, "kept_mb_per_clip": r.kept / batch / 1e6}
        report[name] = row | {"peak_mb": r.peak / 1e6}
        print(
            f"{name:26s}{row['clips_per_s']:9.2f}{f'{low:.2f} .. {high:.2f}':>18s}{each / 1e9:12.1f}"
            f"{row['share']:8.3f}{row['kept_mb_per_clip']:14.0f}{r.peak / 1e6:10.0f}"
        )
    *ours, other = rows
    for name in ours:
        ratio = statistics.median(b / a for a, b in zip(rows[name].seconds, rows[other].seconds, strict=True))
        report[f"{name} / {other}"] = ratio
        print(f"{name} over {other}: {ratio:.2f} x the clips/s (median of the rounds)", flush=True)
    return report


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=sorted(DECODERS), default="vit_small")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--pairs", choices=list(PAIRS), nargs="+", default=list(PAIRS))
    p.add_argument(
        "--compile", choices=("no", "yes", "both"), default="no", help="our blocks by torch.compile"
    )
    p.add_argument(
        "--tune-malloc", choices=("ours", "all", "none"), default="ours", help="for which contenders"
    )
    p.add_argument("--details", action="store_true", default=not torch.cuda.is_available())
    p.add_argument(
        "--cudnn", action="store_true", help="ours may use cuDNN's attention where counts vary, too"
    )
    p.add_argument("--out", type=Path)
    return p.parse_args(argv)


def main(argv: list[str]) -> None:
    a = parse(argv)
    if a.out:
        check_writable(a.out.parent)
        make_folder(a.out.parent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed: pip install 'vidssl[hf]'")
    rates: list[float] = []
    if device == "cuda":
        name = torch.cuda.get_device_name()
        peak = published_peak(name, a.precision)
        rates.append(peak or perf.matmul_rate(torch.device(device), DTYPES[a.precision]))
        what = f"{name}; its {'published peak' if peak else 'square product'}"
    else:
        what = "cpu; its 1024 x 1024 product"
    report: dict[str, Any] = {"device": device, "threads": torch.get_num_threads()}
    report |= {"torch": str(torch.__version__)}
    report |= {k: getattr(a, k) for k in ("model", "batch", "precision", "compile", "tune_malloc")}
    print(f"{a.model}, 16 x 224 px, batch {a.batch}, {a.precision}, {what}")
    for pair in a.pairs:
        rows, details = measure(pair, a, device, rates)
        print(
            f"{'':26s}{'clips/s':>9s}{'(spread)':>18s}{'GFLOP/clip':>12s}"
            f"{'share':>8s}{'kept MB/clip':>14s}{'peak MB':>10s}"
        )
        report[pair] = print_rows(rows, statistics.median(rates), a.batch) | print_details(rows, details)
        report["gflops_per_s"] = statistics.median(rates) / 1e9
        if a.out:
            a.out.write_text(json.dumps(report, indent=1))
    print(f"rate of the device: {statistics.median(rates) / 1e9:.0f} GFLOP/s")


def print_details(rows: dict[str, Row], details: dict[str, Any]) -> dict[str, Any]:
    """Prints where the time of the first contender goes; returns the figures."""
    name, row = next(iter(rows.items()))
    report: dict[str, Any] = {}
    if "where" in details:
        report["where_time_goes"] = details["where"]
        print(f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in details["where"].items()))
    for part, (took, flops) in details.get("beyond", {}).items():
        report[part] = {"time": took / statistics.median(row.seconds), "flops": flops / row.flops}
        time_of, flops_of = report[part].values()
        print(f"V-JEPA's {part}: {time_of:.1%} of the step's time, {flops_of:.1%} of its FLOPs")
    return report


if __name__ == "__main__":
    run_cli(main)

"""Training steps side by side with transformers' models and the published loop: clips a second in alternation.

python tools/bench_step.py [--model vit_small] [--batch 8] [--rounds 8] [--precision fp32|bf16] [--compile]

One process, one batch of noise (16 x 224 px), forward, backward and AdamW. The contenders take turns step by step, so
that whatever else the machine does hits all alike; the median counts. Pairs have the same weights and masks, and their
first losses (of V-JEPA 2 the features) must agree:

- vidssl's VideoMAE, and transformers' VideoMAEForPreTraining, read from our export;
- vidssl's V-JEPA, and the published loop written plainly (plain_vjepa.py);
- forward and backward through vidssl's V-JEPA 2 encoder and transformers' VJEPA2Model, the whole clip.

FLOPs are counted by torch, of matrix products, convolutions and attention. `share` is FLOPs a second over what the same
machine reaches in a 4096 x 4096 product of the same precision, measured between the rounds. `kept` are the bytes that a
forward pass keeps for the backward pass, each storage once, weights left out (not their casts). Then come, of both our
methods, where a step's time goes, and of V-JEPA what is beyond encoder and predictor: its share of time and FLOPs.
"""

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plain_vjepa import PlainLoop
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vidssl import config
from vidssl.draws import Draws
from vidssl.errors import UserError, run_cli
from vidssl.exchange import as_checkpoint
from vidssl.model.vit import MODELS, Blocks
from vidssl.objective.objective import Objective
from vidssl.objective.targets import Ema
from vidssl.optim import Optim, make_optimizer
from vidssl.train import SCHEMA, make_objective
from vidssl.zoo.export import save_hf

ROOT = Path(__file__).parents[1]
DECODERS = {
    "vit_small": (192, 4, 3),
    "vit_base": (384, 4, 6),
    "vit_large": (512, 12, 8),
}  # VideoMAE: width, depth, heads
MOMENTUM = 0.999
KINDS = {  # of operations, by parts of their names
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution"),
    "attention": ("scaled_dot_product",),
    "optimiser and momentum": ("adamw", "AdamW", "lerp", "addcdiv", "addcmul"),
    "norms and activations": ("layer_norm", "gelu", "silu"),
    "copies": ("copy_", "aten::cat", "gather", "index"),
}


class Contender(NamedTuple):
    forward: Callable[[Tensor, int], Tensor]  # (video, number of the step) -> loss
    finish: Callable[[], None]  # after the backward pass
    net: nn.Module  # whose parameters are trained
    bf16: bool = False

    def loss(self, video: Tensor, number: int) -> Tensor:
        """In bf16, if that was asked for; weights are cast anew, as they are in training."""
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.bf16):
            return self.forward(video, number)

    def step(self, video: Tensor, number: int) -> None:
        self.net.zero_grad()
        self.loss(video, number).backward()
        self.finish()


def draws(video: Tensor, number: int) -> Draws:
    return Draws(0, number, torch.arange(len(video), device=video.device) + number * len(video))


def build(method: str, model: str, device: str, *options: str) -> tuple[Objective, dict[str, Any]]:
    """A configuration in configs/, and its objective."""
    files = [str(ROOT / f"configs/{name}.yaml") for name in (f"method/{method}", f"model/{model}", "data/clips_16x4")]
    cfg = config.load([*files, "run.out=x", "run.steps=1000", "run.batch=1", *options], SCHEMA)
    return make_objective(cfg).to(device), cfg


def ours(objective: Objective, cfg: dict[str, Any], compiled: bool) -> Contender:
    """A step as train.py takes it."""
    objective = copy.deepcopy(objective)
    for module in objective.modules():
        for block in module if isinstance(module, Blocks) and compiled else ():
            block.compile(dynamic=True)
    optimizer = make_optimizer(objective, config.build(cfg["optim"], Optim), fused=True)

    def finish() -> None:
        optimizer.step()
        if isinstance(objective.target, Ema):
            objective.target.update(objective.encoder, MOMENTUM)

    return Contender(lambda video, number: objective(video, draws(video, number))["loss"], finish, objective)


def plain_loop(objective: Objective) -> Contender:
    loop = PlainLoop(copy.deepcopy(objective))
    optimizer = torch.optim.AdamW([p for p in loop.parameters() if p.requires_grad], lr=1e-4)

    def finish() -> None:
        optimizer.step()
        loop.update(MOMENTUM)

    return Contender(lambda video, number: loop(video, draws(video, number)), finish, loop)


def from_transformers(kind: str, objective: Objective, cfg: dict[str, Any], device: str) -> nn.Module:
    """A model of transformers with our weights."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder), as_checkpoint(objective, cfg, objective.state_dict()))
        return getattr(transformers, kind).from_pretrained(folder).to(device)


def their_videomae(objective: Objective, cfg: dict[str, Any], device: str) -> Contender:
    net = from_transformers("VideoMAEForPreTraining", objective, cfg, device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def forward(video: Tensor, number: int) -> Tensor:
        grid = objective.encoder.grid_of(video)
        (mask,) = objective.mask(video, grid, draws(video, number))
        hidden = torch.ones(len(video), grid.n, dtype=torch.bool, device=video.device)
        hidden.scatter_(1, mask.context, False)
        return net(video.transpose(1, 2), bool_masked_pos=hidden).loss

    return Contender(forward, optimizer.step, net)


def encoders(model: str, device: str) -> dict[str, Contender]:
    """Forward and backward through V-JEPA 2's encoder, ours and theirs."""
    objective, cfg = build("vjepa2", model, device, f"method.predictor.heads={MODELS[model].keywords['heads']}")  # type: ignore[attr-defined]
    mine = objective.evaluated.requires_grad_(True)
    net: Any = from_transformers("VJEPA2Model", objective, cfg, device).train()
    look: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
        "vidssl V-JEPA 2 encoder": (mine, mine),
        "transformers VJEPA2Model": (
            lambda video: net(video.transpose(1, 2), skip_predictor=True).last_hidden_state,
            net.encoder,
        ),
    }
    return {
        name: Contender(lambda video, number, f=f: f(video).square().mean(), lambda: None, part)  # type: ignore[misc]
        for name, (f, part) in look.items()
    }


@contextlib.contextmanager
def keeping(net: nn.Module) -> Iterator[dict[int, int]]:
    """Storages (address -> bytes) that are kept for a backward pass in here, weights left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def where_time_goes(contender: Contender, video: Tensor) -> dict[str, float]:
    """Kind of operation -> share of a step's time on the CPU or device."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if video.is_cuda else [])]) as seen:
        contender.step(video, 1)
    cuda = video.device.type == "cuda"
    shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in seen.key_averages():
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        shares[next((kind for kind, parts in KINDS.items() if any(p in event.key for p in parts)), "the rest")] += took
    total = sum(shares.values())
    return {kind: took / total for kind, took in shares.items()}


def beyond(objective: Objective, video: Tensor, device: str, rounds: int) -> dict[str, tuple[float, int]]:
    """Of V-JEPA: what is done besides encoder and predictor -> (seconds, FLOPs)."""
    target: Any = objective.target
    grid = objective.encoder.grid_of(video)
    parts: dict[str, Callable[[], Any]] = {
        "target pass": lambda: target(video),
        "masks": lambda: objective.mask(video, grid, draws(video, 1)),
        "momentum update": lambda: target.update(objective.encoder, MOMENTUM),
    }
    return {
        name: (statistics.median(timed(part, device) for _ in range(rounds + 1)), count_flops(part))
        for name, part in parts.items()
    }


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


def check_equal(first: str, second: str, losses: dict[str, float]) -> None:
    a, b = losses[first], losses[second]
    print(f"first losses of {first} and {second}: {a:.7f}, {b:.7f}")
    if abs(a - b) > 1e-5 * max(1.0, abs(a)):
        raise UserError(f"{first} and {second} do not compute the same: {a} and {b}")


def make_contenders(model: str, device: str, compiled: bool) -> tuple[dict[str, Contender], Objective]:
    """In pairs; and V-JEPA's objective."""
    width, depth, heads = DECODERS[model]
    decoder = [f"method.predictor.{k}={v}" for k, v in (("width", width), ("depth", depth), ("heads", heads))]
    mae, mae_cfg = build("videomae", model, device, *decoder)
    jepa, cfg = build("vjepa", model, device, f"method.predictor.heads={MODELS[model].keywords['heads']}")  # type: ignore[attr-defined]
    try:
        theirs = {"transformers VideoMAE": their_videomae(mae, mae_cfg, device)}
        seen = encoders(model, device)
    except ImportError:
        raise UserError("transformers is not installed: pip install 'vidssl[hf]'") from None
    found = {"vidssl VideoMAE": ours(mae, mae_cfg, compiled), **theirs}
    found |= {"vidssl V-JEPA": ours(jepa, cfg, compiled), "plain V-JEPA loop": plain_loop(jepa), **seen}
    return found, jepa


def tell(
    seconds: dict[str, list[float]], flops: dict[str, int], kept: dict[str, int], rate: float, batch: int
) -> dict[str, Any]:
    """A line for each contender and each pair."""
    report: dict[str, Any] = {}
    print(f"{'':26s}{'clips/s':>9s}{'(spread)':>16s}{'GFLOP/clip':>12s}{'share':>8s}{'kept MB/clip':>14s}")
    for name, took in seconds.items():
        median, each = statistics.median(took), flops[name] / batch
        low, high = batch / max(took), batch / min(took)
        row = {"clips_per_s": batch / median, "spread": [low, high], "gflop_per_clip": each / 1e9}
        row |= {"share_of_matmul": flops[name] / median / rate, "kept_mb_per_clip": kept[name] / batch / 1e6}
        report[name] = row
        print(
            f"{name:26s}{row['clips_per_s']:9.2f}{f'{low:.2f} .. {high:.2f}':>16s}{each / 1e9:12.1f}"
            f"{row['share_of_matmul']:8.2f}{row['kept_mb_per_clip']:14.0f}"
        )
    names = list(seconds)
    for first, second in zip(names[::2], names[1::2], strict=True):
        ratio = statistics.median(b / a for a, b in zip(seconds[first], seconds[second], strict=True))
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
    p.add_argument("--out", type=Path)
    a = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if a.precision == "fp32" else torch.bfloat16
    contenders, jepa = make_contenders(a.model, device, a.compile)
    contenders = {name: c._replace(bf16=dtype != torch.float32) for name, c in contenders.items()}
    video = torch.randn(a.batch, 3, 16, 224, 224, device=device)
    square = torch.randn(4096, 4096, device=device, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    products, losses, flops, kept = [], {}, {}, {}
    for name, c in contenders.items():
        with keeping(c.net) as storages:
            losses[name] = float(c.loss(video, 0).detach())
        kept[name] = sum(storages.values())
        flops[name] = count_flops(partial(c.step, video, 0))  # this warms up, too
    names = list(contenders)
    for pair in zip(names[::2], names[1::2], strict=True) if dtype == torch.float32 else ():
        check_equal(*pair, losses)
    for number in range(1, a.rounds + 1):
        products.append(timed(lambda: square @ square, device))
        for name, c in contenders.items():
            seconds[name].append(timed(partial(c.step, video, number), device))
    shares = {name: where_time_goes(contenders[name], video) for name in ("vidssl VideoMAE", "vidssl V-JEPA")}
    rest = beyond(jepa, video, device, a.rounds)
    rate = 2 * 4096**3 / statistics.median(products)
    report: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    report |= {"model": a.model, "batch": a.batch, "precision": a.precision, "compile": a.compile}
    report |= {"matmul_gflops_per_s": rate / 1e9, "where_time_goes": shares}
    print(f"{a.model}, 16 x 224 px, batch {a.batch}, {a.precision}, {device}; 4096^2 product {rate / 1e9:.0f} GFLOP/s")
    report |= tell(seconds, flops, kept, rate, a.batch)
    for name, kinds in shares.items():
        print(f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items()))
    step = statistics.median(seconds["vidssl V-JEPA"])
    for name, (took, count) in rest.items():
        report[name] = {"time": took / step, "flops": count / flops["vidssl V-JEPA"]}
        time_of, flops_of = report[name].values()
        print(f"V-JEPA's {name}: {time_of:.1%} of the step's time, {flops_of:.1%} of its FLOPs")
    if a.out:
        a.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_cli(main)

"""Holds the plan of a probe (--dry-run) against what it takes: an encoder with random weights on rendered
videos.

    python tools/bench_probe_plan.py [--model vit_large] [--videos 200] [--size 224] [KEY=VALUE ...]

Renders and packs the videos, plans, encodes them and trains the grid of configs/probe/attentive_vjepa2.yaml
(20 heads, three self-attention blocks each) for one epoch; KEY=VALUE as for vidssl/probe.py, such as
probe.epochs=2 or probe.recompute=always. Prints planned and measured seconds, FLOP rates and memory. Device
memory is measured on GPUs only.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator

from data_prep import pack
from data_prep.synthetic import make_corpus
from vidssl.config import load_config
from vidssl.core.errors import run_cli
from vidssl.evaluation.evaluate import LabelledFeatures, evaluate
from vidssl.evaluation.extractor import FeaturePlan, extract_features, make_extractor, plan_features
from vidssl.evaluation.plan import ProbePlan, plan_probe
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probe_data import ProbeSplits, make_view, open_probe_splits
from vidssl.evaluation.probing import probe_runs
from vidssl.model.vit import MODELS
from vidssl.pretrained.load import LoadedEncoder

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {"probe.epochs": "1", "data.labels": "[appearance]", "data.stride": "1", "probe.memory_gb": "32"}


def render_shards(folder: Path, videos: int) -> Path:
    """A fifth of the videos is test."""
    workers = os.cpu_count() or 1
    test = max(6, videos // 5)
    make_corpus(folder / "corpus", train=videos - test, test=test, workers=workers)
    pack.main([str(folder / "corpus"), str(folder / "shards"), "--workers", str(workers)])
    return folder / "shards"


def random_encoder(model: str, frames: int, size: int) -> LoadedEncoder:
    encoder = MODELS[model](frames=frames, height=size, width=size).eval()
    heads = encoder.blocks[0].attn.heads
    options = {"frames": frames, "height": size, "width": size, "heads": heads}
    options |= {"tubelet": encoder.tubelet, "patch": encoder.patch}
    return LoadedEncoder(encoder, {"model": options, "pixels": {"mean": [0.5] * 3, "std": [0.25] * 3}})


def measured(action: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """The result, seconds, and peak bytes on the device (0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0.0
    return result, time.perf_counter() - start, peak


def measure(plan: FeaturePlan, expected: ProbePlan, splits: ProbeSplits) -> dict[str, dict[str, float]]:
    """Planned and measured seconds, and bytes on the device, of encoding and of heads."""
    device = plan.loaders["train"].device
    (features, _), encode_s, encode_peak = measured(lambda: extract_features(plan), device)
    (label_set,) = splits.label_sets.values()
    train, test = (
        LabelledFeatures(
            features[name].source,
            split.samples,
            label_set.labels[name],
            features[name].unreadable,
        )
        for name, split in splits.splits.items()
    )
    _, heads_s, heads_peak = measured(
        lambda: evaluate(plan.protocol, label_set.task, train, test, None, device), device
    )
    memory = expected.memory
    streamed = plan.where == "recompute"
    return {
        "encode_s": {"planned": 0.0 if streamed else expected.encode_s, "measured": encode_s},
        "heads_s": {
            "planned": expected.heads_s + (expected.encode_s if streamed else 0.0),
            "measured": heads_s,
        },
        "encode_gb": {"planned": (memory.encoder + memory.encoding) / 1e9, "measured": encode_peak / 1e9},
        "peak_gb": {"planned": memory.peak / 1e9, "measured": heads_peak / 1e9},
        "heads_gb": {
            "planned": (memory.encoder + memory.heads + memory.activations) / 1e9,
            "measured": heads_peak / 1e9,
        },
    }


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=[name for name in MODELS if name != "vit"], default="vit_large")
    p.add_argument("--videos", type=int, default=200)
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--size", type=int, default=224, help="pixels")
    p.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as for vidssl/probe.py")
    a = p.parse_args(argv)
    given = {s.split("=")[0] for s in a.settings}
    defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in given]
    with TemporaryDirectory() as folder:
        shards = render_shards(Path(folder), a.videos)
        files = [str(ROOT / "configs/probe/attentive_vjepa2.yaml"), "encoder=random", "out=unused"]
        data = [f"data.{part}={shards / part}" for part in ("train", "test")]
        cfg = load_config([*files, *data, *defaults, *a.settings], ProbeConfig)
        protocol = cfg.probe.build().resolved()
        loaded = random_encoder(a.model, a.frames, a.size)
        splits = open_probe_splits(cfg.data)
        precision = "bf16" if protocol.product_precision == "bf16" else "no"
        accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
        view = make_view(cfg.data, protocol, loaded, "none")
        extractor = make_extractor(lambda seed: loaded, loaded, "none", protocol.seed, accelerator)
        heads = loaded.metadata["model"]["heads"]
        plan = plan_features(protocol, extractor, view, splits.splits, accelerator, "none", heads)
        runs = probe_runs(cfg, splits, ["none"])
        expected, plan_s, _ = measured(lambda: plan_probe(plan, runs, splits), accelerator.device)
        print("\n".join([f"planned in {plan_s:.3g} s:", *expected.lines()]), flush=True)
        report = measure(plan, expected, splits)
    for name, row in report.items():
        ratio = (
            f", {row['measured'] / row['planned']:.2f} of it" if row["planned"] and row["measured"] else ""
        )
        print(f"{name}: planned {row['planned']:.4g}, measured {row['measured']:.4g}{ratio}")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    figures = {"device": where, "model": a.model, "flops": expected.head_flops, **report}
    print(json.dumps(figures, default=float))


if __name__ == "__main__":
    run_cli(main)

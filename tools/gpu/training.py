"""Short training runs of check_gpu.py: a small corpus, and what a run has logged."""

import json
import os
import subprocess
import sys
from pathlib import Path

from data_prep import pack
from data_prep.synthetic import make_corpus
from vidssl.core.cpus import available_cpus

ROOT = Path(__file__).resolve().parents[2]
BATCH = 16
FILES = ["model/vit_micro", "data/quickstart"]


def make_shards(work: Path) -> Path:
    """Renders and packs a few videos, unless that is done. Returns the folder of the training shards."""
    shards = work / "shards"
    if not (shards / "train/index.json").exists():
        make_corpus(work / "corpus", 64, 8, 64, workers=available_cpus())
        pack.main([str(work / "corpus"), str(shards)])
    return shards / "train"


def train_command(method: str, shards: Path, out: Path, steps: int, *options: str) -> list[str]:
    """Arguments of vidssl/train.py for a run of a tiny method."""
    files = [str(ROOT / f"configs/{name}.yaml") for name in (f"method/{method}", *FILES)]
    settings = [f"data.train={shards}", f"run.out={out}", f"run.steps={steps}", f"run.batch={BATCH}"]
    return [str(ROOT / "vidssl/train.py"), *files, *settings, "optim.warmup=5", *options]


def environment(device: str) -> dict[str, str]:
    """Of a process that trains on the device."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **hidden}


def train(arguments: list[str], device: str, launcher: list[str] | None = None) -> subprocess.Popen:
    """Starts a run. launcher: in place of the plain interpreter."""
    return subprocess.Popen([sys.executable, *(launcher or []), *arguments], env=environment(device))


def losses(out: Path) -> dict[int, float]:
    """The loss of each step that a run has logged."""
    log = out / "log.jsonl"
    if not log.exists():
        return {}
    rows = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    """Largest relative difference of two runs' losses; inf if they have not logged the same steps."""
    if a.keys() != b.keys() or not a:
        return float("inf")
    return max(abs(a[step] - b[step]) / abs(b[step]) for step in a)

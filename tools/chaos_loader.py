"""Kills a loading run repeatedly, with changing numbers of processes and workers, and looks for lost or
repeated samples.

python tools/chaos_loader.py SHARDS [kills=300] [seed=0]

A run is `world` processes that load their parts of the same global batches and write the positions and keys
of each step as a line. All are killed (SIGKILL) at a random moment; the next run starts, as training would,
after the last step that every process has written. Exit status 1 if a sample is lost or repeated.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from vidssl.core.errors import UserError, run_cli
from vidssl.data.augment import RandomCrop
from vidssl.data.dataset import MultiStreamDataset, TrainClips
from vidssl.data.loader import train_steps
from vidssl.data.order import Order
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards

BATCH, LANES = 16, 8
SETTINGS = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 2)]
StepLog = list[tuple[int, str]]  # (position, key) of every example of a step


def make_clips(folder: Path, seed: int) -> TrainClips:
    shards = Shards([str(folder)])
    order = Order(shards.counts, seed, LANES, window=16)
    return TrainClips(shards, order, DataConfig([str(folder)], frames=2, stride=2), RandomCrop(16))


def load(clips: TrainClips, start: int, rank: int, world: int, workers: int, out: Path) -> None:
    """Loads until it is killed."""
    with open(out, "w", buffering=1) as file:
        for (batch,) in train_steps(
            MultiStreamDataset([clips]), start, 10**9, [BATCH], rank, world, workers, isolate=True
        ):
            examples = list(zip(batch.position.tolist(), batch.key, strict=True))
            file.write(json.dumps(examples) + "\n")


def whole_steps(paths: list[Path]) -> list[StepLog]:
    """Returns the steps that all processes have written completely, in order."""
    parts = []
    for path in paths:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        parts.append([json.loads(line) for line in lines])
    return [[tuple(s) for part in step for s in part] for step in zip(*parts, strict=False)]


def check(steps: list[StepLog], clips: TrainClips) -> list[str]:
    """Returns the steps that differ from Order, and the epochs that are no permutation of the samples."""
    wrong = []
    for number, step in enumerate(steps):
        positions = range(number * BATCH, (number + 1) * BATCH)
        expected = {g: clips.shards.sample(*clips.order.locate(g)).key for g in positions}
        if len(step) != BATCH or dict(step) != expected:
            wrong.append(f"step {number}: {sorted(step)[:3]}...")
    keys = [key for step in steps for _, key in sorted(step)]
    n = clips.shards.n
    for epoch in range(len(keys) // n):
        if set(Counter(keys[epoch * n : (epoch + 1) * n]).values()) != {1}:
            wrong.append(f"epoch {epoch}: not every sample exactly once")
    return wrong


def run(folder: Path, kills: int, seed: int, min_epochs: int = 0) -> dict[str, Any]:
    """Starts and kills `kills` runs; returns the settings used, the counts, and what is wrong.

    min_epochs: the last run is killed only once this many epochs have been read.
    """
    fork = multiprocessing.get_context("fork")
    rng = np.random.default_rng(seed)
    clips = make_clips(folder, seed)
    steps: list[StepLog] = []
    used = Counter[str]()
    with tempfile.TemporaryDirectory() as out:
        for kill in range(kills):
            world, workers = SETTINGS[int(rng.integers(len(SETTINGS)))]
            paths = [Path(out) / f"{kill}-{rank}.jsonl" for rank in range(world)]
            ranks = [
                fork.Process(target=load, args=(clips, len(steps), rank, world, workers, path))
                for rank, path in enumerate(paths)
            ]
            for process in ranks:
                process.start()
            # some are killed before their first step
            steps_to_wait = int(rng.integers(3))
            if kill == kills - 1:
                steps_to_wait = max(steps_to_wait, -(-min_epochs * clips.shards.n // BATCH) - len(steps))
            until = time.monotonic() + 60
            while len(whole_steps(paths)) < steps_to_wait and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
            steps += whole_steps(paths)
            used[f"{world} processes x {workers} workers"] += 1
    samples = len(steps) * BATCH
    return {"kills": kills, "settings": dict(used), "steps": len(steps), "samples": samples,
            "epochs": samples // clips.shards.n, "wrong": check(steps, clips)}  # fmt: skip


def main(argv: list[str]) -> None:
    settings = dict(a.split("=", 1) for a in argv[1:])
    if not argv or settings.keys() - {"kills", "seed"}:
        raise UserError("expected: SHARDS [kills=300] [seed=0]")
    report = run(Path(argv[0]), int(settings.get("kills", 300)), int(settings.get("seed", 0)))
    print(json.dumps(report, indent=2))
    if report["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main, __doc__)

"""A short training under random kills, signals, full disks and damaged files, against the same one undisturbed.

python tools/chaos.py [--faults 100] [--minutes 60] [--processes 1] [--seed 0] [--out runs/chaos]

Rounds of one training are disturbed until both so many faults or minutes have been; each round is continued by the same
command until it is done. Its weights, optimiser state and log must equal the undisturbed ones bit for bit; exit status
1 if they do not. Processes are forked from this one, so that a start costs no imports.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_prep import pack
from data_prep.synthetic import make_corpus
from vidssl import train
from vidssl.core.errors import run_cli
from vidssl.training.checkpoint import list_checkpoints
from vidssl.training.preemption import EXIT_REQUEUE

ROOT = Path(__file__).resolve().parents[1]
EVERY, PATIENCE = 8, 120  # steps between checkpoints; seconds without a step that count as a hang
VOLATILE = ("clips_per_s", "wait", "memory", "mfu")
FILES = [
    f"configs/{name}.yaml"
    for name in ("method/vjepa_tiny", "model/vit_micro", "data/quickstart", "run/smoke")
]
SMALL = ["model.dim=32", "model.depth=1", "method.predictor.width=16", "augment.size=16"]
SMALL += [f"run.save_every={EVERY}", "run.feature_stats_every=20", "optim.warmup=10"]
SMALL += ["efficiency.cache_mb=256", "efficiency.decode_in_subprocess=false", "efficiency.peer_timeout_s=6"]
FORK = multiprocessing.get_context("fork")


class Life:
    """The processes of one start of the training in `out`, and what they say in `out`.txt."""

    def __init__(self, out: Path, shards: Path, processes: int, steps: int):
        self.out, self.blocked = out, False
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        argv = [*FILES, *SMALL, f"run.steps={steps}", f"run.out={out}", f"data.train={shards / 'train'}"]
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            {**world, "RANK": str(r), "LOCAL_RANK": str(r)} if processes > 1 else {} for r in range(processes)
        ]
        self.all = [FORK.Process(target=live, args=(argv, env, out.with_suffix(".txt"))) for env in ranks]
        for p in self.all:
            p.start()
        self.began = self.step()

    def step(self) -> int:
        """The last step in the log."""
        with (
            contextlib.suppress(OSError, ValueError, IndexError, KeyError),
            open(self.out / "log.jsonl", "rb") as f,
        ):
            f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
            return json.loads(f.read().split(b"\n")[-2])["step"]
        return 0

    def alive(self) -> bool:
        return any(p.is_alive() for p in self.all)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until it is ready or has ended; an error if it no longer moves."""
        last, since = self.step(), time.time()
        while self.alive() and not ready():
            time.sleep(0.002)
            if (now := self.step()) != last:
                last, since = now, time.time()
            if time.time() - since > PATIENCE:
                self.end(signal.SIGKILL)
                sys.exit(f"hangs at step {last}: {self.out.with_suffix('.txt').read_text()[-2000:]}")

    def past(self, steps: int) -> None:
        """Until so many more steps are in the log."""
        goal = self.step() + steps
        self.wait(lambda: self.step() >= goal)

    def end(self, number: int | None) -> list[int | None]:
        """Send all a signal (None: none) -> how each ended."""
        for p in self.all:
            if number is not None and p.is_alive():
                os.kill(p.pid or 0, number)
        for p in self.all:
            p.join(PATIENCE)
        return [p.exitcode for p in self.all]


def live(argv: list[str], env: dict[str, str], said: Path) -> None:
    """A training process: the entry that the command line has."""
    os.environ.update(env)
    number = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.argv = ["train.py", *argv]
    run_cli(train.main)


def kill(life: Life, rng: random.Random) -> None:
    life.end(signal.SIGKILL)


def kill_while_saving(life: Life, rng: random.Random) -> None:
    folder = life.out / "checkpoints"
    life.wait(lambda: any(folder.glob("*.tmp")) or any(life.out.glob("*.tmp")))
    life.end(signal.SIGKILL)


def terminate(life: Life, rng: random.Random) -> None:
    ended = life.end(signal.SIGTERM)
    if not set(ended) <= {EXIT_REQUEUE, 0}:
        sys.exit(f"SIGTERM ended in status {ended}: {life.out.with_suffix('.txt').read_text()[-2000:]}")


def suspend(life: Life, rng: random.Random) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for p in life.all:
            with contextlib.suppress(ProcessLookupError):
                os.kill(p.pid or 0, number)
        time.sleep(rng.uniform(0, 0.3))


def limit_files(life: Life, size: int) -> None:
    """The kernel refuses to let a file of the run grow over so many bytes, as it does on a full disk."""
    life.blocked = True
    for p in life.all:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(p.pid or 0, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(life: Life, rng: random.Random) -> None:
    """No file may grow over some size for a while: less than the log has, than a checkpoint, or than a part of it."""
    limit_files(life, rng.choice([0, 2000, 20_000, 100_000]))
    time.sleep(rng.uniform(0, 1.5))
    limit_files(life, resource.RLIM_INFINITY)


def full_disk_and_kill(life: Life, rng: random.Random) -> None:
    limit_files(life, rng.choice([0, 20_000]))
    time.sleep(rng.uniform(0, 1))
    life.end(signal.SIGKILL)


def unwritable(life: Life, rng: random.Random) -> None:
    """The folder of the checkpoints cannot be entered for some steps."""
    folder, away, life.blocked = life.out / "checkpoints", life.out / "away", True
    folder.rename(away)
    folder.write_text("no folder")
    life.past(rng.randint(EVERY, 2 * EVERY))
    folder.unlink()
    away.rename(folder)


def damage(life: Life, rng: random.Random) -> None:
    """A file of the last checkpoint is cut, changed or gone; the one before is whole."""
    life.wait(lambda: len(list_checkpoints(life.out / "checkpoints")) > 1)
    life.end(signal.SIGKILL)
    found = list_checkpoints(life.out / "checkpoints")
    if len(found) < 2:
        return
    path = found[-1] / rng.choice(["model.safetensors", "optimizer.safetensors", "state.json"])
    data, how = bytearray(path.read_bytes()), rng.choice(["cut", "changed", "gone"])
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:place] if how == "cut" else data)


def half_written(life: Life, rng: random.Random) -> None:
    """What a kill may leave: half a line, half a file, half a checkpoint."""
    life.end(signal.SIGKILL)
    with open(life.out / "log.jsonl", "a") as f:
        f.write('{"step": 11, "los')
    (life.out / "encoder.safetensors.tmp").write_bytes(b"half")
    half = life.out / "checkpoints" / f"step-{EVERY:08d}.tmp"
    half.mkdir(parents=True, exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")


def lose_one(life: Life, rng: random.Random) -> None:
    """One of several processes dies or hangs: the others end by themselves."""
    victim = rng.choice(life.all)
    number = rng.choice([signal.SIGKILL, signal.SIGSTOP])
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim.pid or 0, number)
    others = [p for p in life.all if p is not victim]
    for p in others:
        p.join(30)  # efficiency.peer_timeout_s, and some
    ended = [p.exitcode for p in others]
    life.end(signal.SIGKILL)
    if not set(ended) <= {EXIT_REQUEUE, 0}:
        sys.exit(
            f"without {victim.pid} the others ended in {ended}: {life.out.with_suffix('.txt').read_text()[-3000:]}"
        )


ENDING = [kill, kill_while_saving, terminate, full_disk_and_kill, damage, half_written]
PASSING = [suspend, full_disk, unwritable]


def differences(whole: Path, other: Path, steps: int) -> list[str]:
    """Where two finished runs are not the same, bit for bit."""
    wrong = []
    last = Path("checkpoints") / f"step-{steps:08d}"
    names = sorted(
        p.relative_to(whole) for p in (*whole.glob("*.safetensors"), *(whole / last).glob("*.safetensors"))
    )
    for name in names:
        a, b = load_file(whole / name), load_file(other / name)
        wrong += [f"{name}: {k}" for k in a if k not in b or not a[k].equal(b[k])]
    logs = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (whole, other)]
    rows = [[{k: v for k, v in row.items() if k not in VOLATILE} for row in log] for log in logs]
    wrong += [f"log.jsonl: step {a['step']}" for a, b in zip(*rows, strict=False) if a != b]
    states = [json.loads((p / last / "state.json").read_text()) for p in (whole, other)]
    wrong += [k for k in ("guard", "feature_stats", "scaler") if states[0][k] != states[1][k]]
    return wrong + (["log.jsonl: length"] if len(rows[0]) != len(rows[1]) else [])


def disturbed(
    out: Path,
    start: Callable[[Path], Life],
    steps: int,
    rng: random.Random,
    enough: Callable[[], bool],
    n: Counter,
) -> int:
    """One round -> how often it was started."""
    starts = 0
    while not (out / "checkpoints" / f"step-{steps:08d}").exists():
        life = start(out)
        starts += 1
        while life.alive():
            life.past(rng.randint(1, 3 * EVERY))
            if not life.alive() or life.step() == steps:
                break
            faults = [*ENDING, *PASSING, *([lose_one] * 3 if len(life.all) > 1 else [])]
            if enough():
                break
            fault = rng.choice(faults)
            if fault in (unwritable, damage) and not list_checkpoints(out / "checkpoints"):
                continue
            n[fault.__name__] += 1
            fault(life, rng)
        allowed = {
            0,
            EXIT_REQUEUE,
            -signal.SIGKILL,
            *((1, 2) if life.blocked else ()),
        }  # at its end while nothing can be written
        if not set(life.end(None)) <= allowed:
            sys.exit(f"ended in {life.end(None)}: {out.with_suffix('.txt').read_text()[-3000:]}")
    return starts


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--faults", type=int, default=100)
    p.add_argument("--minutes", type=float, default=0, help="go on until then")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--steps", type=int, default=240, help="of a round")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--shards", type=Path, help="packed data with `train`; none: some are rendered")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "chaos")
    a = p.parse_args(argv)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    until, rng, faults = time.time() + 60 * a.minutes, random.Random(a.seed), Counter[str]()
    out, shards = a.out.resolve(), a.shards.resolve() if a.shards else a.out.resolve() / "shards"
    out.mkdir(parents=True, exist_ok=True)
    if not a.shards and not (shards / "train" / "index.json").exists():
        make_corpus(out / "corpus", train=24, test=6, workers=1)
        pack.main([str(out / "corpus"), str(shards), "--workers", "1"])
    for old in (*out.glob("round_*"), *out.glob("whole*")):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    start = partial(Life, shards=shards, processes=a.processes, steps=a.steps)
    if any(start(out / "whole").end(None)):
        sys.exit((out / "whole.txt").read_text())
    rounds, starts, wrong = 0, 0, []
    while faults.total() < a.faults or time.time() < until:
        enough = lambda: faults.total() >= a.faults and time.time() >= until  # noqa: E731
        starts += disturbed(out / f"round_{rounds}", start, a.steps, rng, enough, faults)
        wrong += [
            f"round {rounds}: {w}" for w in differences(out / "whole", out / f"round_{rounds}", a.steps)
        ]
        rounds += 1
    for name, count in sorted(faults.items()):
        print(f"{name:20s}{count:6d}")
    print(
        f"{'faults':20s}{faults.total():6d}\n{'starts':20s}{starts:6d}\n{f'rounds of {a.steps}':20s}{rounds:6d}"
    )
    print(
        "weights, optimiser states and logs equal the undisturbed run's"
        if not wrong
        else "\n".join(wrong[:20])
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_cli(main)

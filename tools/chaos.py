"""Injects faults into a short training run and compares it with the same run undisturbed.

python tools/chaos.py [--faults 100] [--minutes 60] [--processes 1] [--log-every 1] [--out runs/chaos]

Faults are kills, signals, full disks, unwritable folders and damaged files. Rounds of the run are disturbed
until --faults faults and --minutes minutes are reached; a round is continued by the same command until it is
finished. Its weights, optimizer state and log must equal the undisturbed ones bit for bit, else the exit
status is 1. With --log-every 4 the log of a round has a row for four steps, fewer where it was cut off, which
must sum up the undisturbed run's rows of these steps. Processes are forked from this one, so that a start
costs no imports.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from data_prep import pack
from data_prep.synthetic import make_corpus
from vidssl import train
from vidssl.core.errors import EXIT_REQUEUE, run_cli
from vidssl.core.io import last_json_row
from vidssl.core.launch import free_port
from vidssl.training.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 8  # steps between checkpoints
HANG_S = 120  # seconds without a step that count as a hang
VOLATILE = ("clips_per_s", "wait", "memory", "mfu", "matmul_utilization", "diagnostics_s", "save_s")
FILES = [
    f"configs/{name}.yaml"
    for name in ("method/vjepa_tiny", "model/vit_micro", "data/quickstart", "run/smoke")
]
SMALL = ["model.dim=32", "model.depth=1", "method.predictor.width=16", "augment.size=16"]
SMALL += [f"run.save_every={SAVE_EVERY}", "run.feature_stats_every=20", "optim.warmup=10"]
SMALL += ["data.cache=host", "efficiency.decode_in_subprocess=false", "efficiency.peer_timeout_s=6"]
FORK = multiprocessing.get_context("fork")


class RunningTraining:
    """The processes of one start of the run in `out`; their output goes to `out`.txt."""

    def __init__(self, out: Path, shards: Path, processes: int, steps: int, log_every: int = 1):
        self.out = out
        self.write_blocked = False
        argv = [*FILES, *SMALL, f"run.steps={steps}", f"run.out={out}", f"data.train={shards / 'train'}"]
        argv.append(f"run.log_every={log_every}")
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [
            {**world, "RANK": str(r), "LOCAL_RANK": str(r)} if processes > 1 else {} for r in range(processes)
        ]
        self.processes = [
            FORK.Process(target=train_process, args=(argv, env, out.with_suffix(".txt"))) for env in ranks
        ]
        for p in self.processes:
            p.start()
        self.began = self.step()

    def step(self) -> int:
        """Returns the last logged step."""
        # A fault may have damaged or removed the log
        with contextlib.suppress(OSError, ValueError):
            return last_json_row(self.out / "log.jsonl").get("step", 0)
        return 0

    def alive(self) -> bool:
        return any(p.is_alive() for p in self.processes)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready` or the end of the run; exits if no step is logged for HANG_S seconds."""
        last = self.step()
        since = time.time()
        while self.alive() and not ready():
            time.sleep(0.002)
            if (now := self.step()) != last:
                last = now
                since = time.time()
            if time.time() - since > HANG_S:
                self.end(signal.SIGKILL)
                sys.exit(f"hangs at step {last}: {self.out.with_suffix('.txt').read_text()[-2000:]}")

    def advance(self, steps: int) -> None:
        """Waits for `steps` more logged steps."""
        goal = self.step() + steps
        self.wait(lambda: self.step() >= goal)

    def end(self, number: int | None) -> list[int | None]:
        """Sends a signal to all processes (None: no signal) and returns their exit codes."""
        for p in self.processes:
            if number is not None and p.is_alive():
                os.kill(p.pid or 0, number)
        for p in self.processes:
            p.join(HANG_S)
        return [p.exitcode for p in self.processes]


def train_process(argv: list[str], env: dict[str, str], output: Path) -> None:
    """Runs the command line's entry point in this process."""
    os.environ.update(env)
    number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.argv = ["train.py", *argv]
    run_cli(train.main)


def kill(training: RunningTraining, rng: random.Random) -> None:
    training.end(signal.SIGKILL)


def kill_while_saving(training: RunningTraining, rng: random.Random) -> None:
    folder = training.out / "checkpoints"
    training.wait(lambda: any(folder.glob("*.tmp")) or any(training.out.glob("*.tmp")))
    training.end(signal.SIGKILL)


def terminate(training: RunningTraining, rng: random.Random) -> None:
    ended = training.end(signal.SIGTERM)
    if not set(ended) <= {EXIT_REQUEUE, 0}:
        sys.exit(f"SIGTERM ended in status {ended}: {training.out.with_suffix('.txt').read_text()[-2000:]}")


def suspend(training: RunningTraining, rng: random.Random) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for p in training.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(p.pid or 0, number)
        time.sleep(rng.uniform(0, 0.3))


def limit_files(training: RunningTraining, size: int) -> None:
    """Lets no file of the run grow over `size` bytes, like a full disk."""
    training.write_blocked = True
    for p in training.processes:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(p.pid or 0, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(training: RunningTraining, rng: random.Random) -> None:
    """Limits the size of files for a while: below that of the log, of a checkpoint, or of a part of one."""
    limit_files(training, rng.choice([0, 2000, 20_000, 100_000]))
    time.sleep(rng.uniform(0, 1.5))
    limit_files(training, resource.RLIM_INFINITY)


def full_disk_and_kill(training: RunningTraining, rng: random.Random) -> None:
    limit_files(training, rng.choice([0, 20_000]))
    time.sleep(rng.uniform(0, 1))
    training.end(signal.SIGKILL)


def unwritable(training: RunningTraining, rng: random.Random) -> None:
    """Makes the folder of checkpoints unusable for some steps."""
    folder = training.out / "checkpoints"
    away = training.out / "away"
    training.write_blocked = True
    folder.rename(away)
    folder.write_text("no folder")
    training.advance(rng.randint(SAVE_EVERY, 2 * SAVE_EVERY))
    folder.unlink()
    away.rename(folder)


def damage(training: RunningTraining, rng: random.Random) -> None:
    """Cuts, changes or deletes a file of the last checkpoint; the one before stays intact."""
    training.wait(lambda: len(list_checkpoints(training.out / "checkpoints")) > 1)
    training.end(signal.SIGKILL)
    found = list_checkpoints(training.out / "checkpoints")
    if len(found) < 2:
        return
    path = found[-1] / rng.choice(["model.safetensors", "optimizer.safetensors", "state.json"])
    data = bytearray(path.read_bytes())
    damage_kind = rng.choice(["cut", "changed", "deleted"])
    offset = rng.randrange(len(data))
    data[offset] ^= 1 << rng.randrange(8)
    if damage_kind == "deleted":
        path.unlink()
    else:
        path.write_bytes(data[:offset] if damage_kind == "cut" else data)


def half_written(training: RunningTraining, rng: random.Random) -> None:
    """Leaves half a log line, half a file and half a checkpoint, as a kill may."""
    training.end(signal.SIGKILL)
    with open(training.out / "log.jsonl", "a") as f:
        f.write('{"step": 11, "los')
    (training.out / "encoder.safetensors.0123abcd.tmp").write_bytes(b"half")
    half = training.out / "checkpoints" / f"step-{SAVE_EVERY:08d}.tmp"
    half.mkdir(parents=True, exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")


def lose_one(training: RunningTraining, rng: random.Random) -> None:
    """Kills or stops one of several processes; the others must end by themselves."""
    victim = rng.choice(training.processes)
    number = rng.choice([signal.SIGKILL, signal.SIGSTOP])
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim.pid or 0, number)
    others = [p for p in training.processes if p is not victim]
    for p in others:
        p.join(30)  # longer than efficiency.peer_timeout_s
    ended = [p.exitcode for p in others]
    training.end(signal.SIGKILL)
    if not set(ended) <= {EXIT_REQUEUE, 0}:
        sys.exit(
            f"without {victim.pid} the others ended in {ended}: "
            f"{training.out.with_suffix('.txt').read_text()[-3000:]}"
        )


FATAL_FAULTS = [kill, kill_while_saving, terminate, full_disk_and_kill, damage, half_written]
PASSING_FAULTS = [suspend, full_disk, unwritable]


def differences(undisturbed: Path, other: Path, steps: int) -> list[str]:
    """Returns the places where two finished runs differ in a bit."""
    wrong = []
    last = Path("checkpoints") / f"step-{steps:08d}"
    names = sorted(
        p.relative_to(undisturbed)
        for p in (*undisturbed.glob("*.safetensors"), *(undisturbed / last).glob("*.safetensors"))
    )
    for name in names:
        a, b = load_file(undisturbed / name), load_file(other / name)
        wrong += [f"{name}: {k}" for k in a if k not in b or not a[k].equal(b[k])]
    wrong += log_differences(*(p / "log.jsonl" for p in (undisturbed, other)))
    states = [json.loads((p / last / "state.json").read_text()) for p in (undisturbed, other)]
    wrong += [k for k in ("guard", "feature_stats", "scaler") if states[0][k] != states[1][k]]
    return wrong


def log_differences(undisturbed: Path, other: Path) -> list[str]:
    """Returns what is wrong in the rows of `other`. Each must sum up the undisturbed rows of its steps, of
    which there is one for each step; a row of one step must equal it."""
    logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in (undisturbed, other)]
    steps = {row["step"]: row for row in logs[0]}
    wrong = []
    end = 0  # of the row before
    for row in logs[1]:
        begin = row["step"] - row.get("steps", 1)
        if begin != end:
            wrong.append(f"log.jsonl: steps {begin + 1} to {row['step']} after step {end}")
        end = row["step"]
        members = [steps[step] for step in range(begin + 1, end + 1)]
        wrong += [
            f"log.jsonl: {key} of step {end}"
            for key in members[-1]
            if key not in VOLATILE and not sums_up(key, row.get(key), [member.get(key) for member in members])
        ]
    return wrong + ([] if end == logs[0][-1]["step"] else [f"log.jsonl: ends with step {end}"])


def sums_up(key: str, value: Any, values: list[Any]) -> bool:
    """Whether a value of a row is right for these values of its steps: a sum of hashes or counts, the mean of
    a loss, or the last."""
    if len(values) == 1:
        return value == values[0]
    if key == "samples_hash":
        return int(value, 16) == sum(int(v, 16) for v in values) % (1 << 63)
    if key == "undecodable_samples":
        return value == sum(values)
    return value == values[-1] or math.isclose(value, sum(values) / len(values), rel_tol=1e-9)


def disturbed(
    out: Path,
    start: Callable[[Path], RunningTraining],
    steps: int,
    rng: random.Random,
    finished: Callable[[], bool],
    counts: Counter,
) -> int:
    """Runs one round to its end; returns the number of starts."""
    starts = 0
    while not (out / "checkpoints" / f"step-{steps:08d}").exists():
        training = start(out)
        starts += 1
        while training.alive():
            training.advance(rng.randint(1, 3 * SAVE_EVERY))
            if not training.alive() or training.step() == steps:
                break
            faults = [
                *FATAL_FAULTS,
                *PASSING_FAULTS,
                *([lose_one] * 3 if len(training.processes) > 1 else []),
            ]
            if finished():
                break
            fault = rng.choice(faults)
            if fault in (unwritable, damage) and not list_checkpoints(out / "checkpoints"):
                continue
            counts[fault.__name__] += 1
            fault(training, rng)
        allowed = {
            0,
            EXIT_REQUEUE,
            -signal.SIGKILL,
            *((1, 2) if training.write_blocked else ()),
        }  # at its end while nothing can be written
        if not set(training.end(None)) <= allowed:
            sys.exit(f"ended in {training.end(None)}: {out.with_suffix('.txt').read_text()[-3000:]}")
    return starts


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--faults", type=int, default=100)
    p.add_argument("--minutes", type=float, default=0, help="least duration")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--log-every", type=int, default=1, help="steps in a row of the disturbed run's log")
    p.add_argument("--steps", type=int, default=240, help="optimizer steps of a round")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--shards", type=Path, help="packed data with `train`; default: rendered here")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "chaos")
    a = p.parse_args(argv)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    until = time.time() + 60 * a.minutes
    rng = random.Random(a.seed)
    faults = Counter[str]()
    out = a.out.resolve()
    shards = a.shards.resolve() if a.shards else out / "shards"
    out.mkdir(parents=True, exist_ok=True)
    if not a.shards and not (shards / "train" / "index.json").exists():
        make_corpus(out / "corpus", train=24, test=6, workers=1)
        pack.main([str(out / "corpus"), str(shards), "--workers", "1"])
    for old in (*out.glob("round_*"), *out.glob("undisturbed*")):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    start = partial(RunningTraining, shards=shards, processes=a.processes, steps=a.steps)
    if any(start(out / "undisturbed").end(None)):
        sys.exit((out / "undisturbed.txt").read_text())
    rounds = starts = 0
    wrong: list[str] = []
    while faults.total() < a.faults or time.time() < until:
        finished = lambda: faults.total() >= a.faults and time.time() >= until  # noqa: E731
        disturb = partial(start, log_every=a.log_every)
        starts += disturbed(out / f"round_{rounds}", disturb, a.steps, rng, finished, faults)
        wrong += [
            f"round {rounds}: {w}" for w in differences(out / "undisturbed", out / f"round_{rounds}", a.steps)
        ]
        rounds += 1
    for name, count in sorted(faults.items()):
        print(f"{name:20s}{count:6d}")
    print(
        f"{'faults':20s}{faults.total():6d}\n{'starts':20s}{starts:6d}\n"
        f"{f'rounds of {a.steps}':20s}{rounds:6d}"
    )
    print(
        "weights, optimizer states and logs equal the undisturbed run's"
        if not wrong
        else "\n".join(wrong[:20])
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_cli(main)

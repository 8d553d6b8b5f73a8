"""A run of 50 steps has the losses of the same run on the CPU; killed and continued, its own losses."""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from gpu.check import run
from gpu.training import largest_difference, losses, make_shards, train, train_command

STEPS = 50
KILLED_AFTER = 20
LIMIT_CPU = 0.02  # relative difference of a loss in f32; roundings grow with the steps
LIMIT_RESUMED = 0.005  # the same; atomic additions on a GPU are not ordered


def kill_after(process, out: Path, step: int) -> None:
    """Kills a run as soon as it has logged the step."""
    while process.poll() is None and step not in losses(out):
        time.sleep(0.02)
    process.kill()
    process.wait()


def runs(a: argparse.Namespace) -> tuple[bool, str, dict[str, Any]]:
    shards = make_shards(a.work)
    options = ["efficiency.precision=fp32", "run.save_every=10", "efficiency.workers=2"]
    folders = {name: a.work / f"run-{name}" for name in ("cpu", "device", "resumed")}
    commands = {}
    for name, folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        commands[name] = train_command("vjepa_tiny", shards, folder, STEPS, *options)
    on_cpu = train(commands["cpu"], "cpu")
    straight = train(commands["device"], a.device)
    killed = train(commands["resumed"], a.device)
    kill_after(killed, folders["resumed"], KILLED_AFTER)
    resumed = train(commands["resumed"], a.device)
    failed = [p.args[-1] for p in (on_cpu, straight, resumed) if p.wait()]
    found = {name: losses(folder) for name, folder in folders.items()}
    cpu = largest_difference(found["device"], found["cpu"])
    again = largest_difference(found["resumed"], found["device"])
    text = f"losses of {STEPS} steps differ from the CPU's by {cpu:.1e}, killed and continued by {again:.1e}"
    passes = not failed and cpu <= LIMIT_CPU and again <= LIMIT_RESUMED
    return passes, text, {"cpu": cpu, "resumed": again, "losses": found["device"]}


if __name__ == "__main__":
    run(runs, __doc__)

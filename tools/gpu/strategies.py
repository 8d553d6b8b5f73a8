"""DDP (NCCL on GPUs), FSDP2 and ZeRO on all devices give the losses of one process."""

import argparse
import importlib.util
import shutil
import sys
from typing import Any

import torch
from gpu.check import run
from gpu.training import ROOT, largest_difference, losses, make_shards, train, train_command

STEPS = 6
LIMIT = 2e-3  # relative difference of a loss from that of one process


def strategies(a: argparse.Namespace) -> tuple[bool, str, dict[str, Any]]:
    shards = make_shards(a.work)
    world = torch.cuda.device_count() if a.device == "cuda" else 1
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(world)]
    launchers: dict[str, list[str] | None] = {"one process": None}
    launchers["ddp"] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    left_out = []
    if a.device == "cuda":
        launchers["fsdp2"] = [*launch, "--config_file", str(ROOT / "configs/accelerate/fsdp2.yaml")]
        if importlib.util.find_spec("deepspeed"):
            launchers["zero1"] = [*launch, "--config_file", str(ROOT / "configs/accelerate/zero1.yaml")]
        else:
            left_out.append("zero1 (no deepspeed)")
    else:
        left_out.append("fsdp2 and zero1 (no GPU)")
    found = {}
    for name, launcher in launchers.items():
        out = a.work / f"strategy-{name.split()[0]}"
        shutil.rmtree(out, ignore_errors=True)
        options = ["efficiency.precision=fp32", "efficiency.workers=2", f"efficiency.peer_timeout_s={60}"]
        status = train(train_command("vjepa_tiny", shards, out, STEPS, *options), a.device, launcher).wait()
        found[name] = losses(out)
        if status:
            print(f"{name} ended with status {status}", file=sys.stderr)
    errors = {name: largest_difference(found[name], found["one process"]) for name in launchers}
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if name != "one process")
    ends = f"; left out: {', '.join(left_out)}" if left_out else ""
    text = f"{world} process{'es' if world > 1 else ''}, largest difference of a loss: {text}{ends}"
    return all(error <= LIMIT for error in errors.values()), text, errors


if __name__ == "__main__":
    run(strategies, __doc__)

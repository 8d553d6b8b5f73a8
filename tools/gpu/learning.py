"""The quickstart with videos in the memory of the device: its probe tells trained encoders from an untrained
one."""

import argparse
import json
import subprocess
import sys
from typing import Any

from gpu.check import run
from gpu.training import ROOT

SIZES = {"cuda": ("3000", "800", "1200", "4500"), "cpu": ("200", "60", "100", "60")}


def learning(a: argparse.Namespace) -> tuple[bool, str, dict[str, Any]]:
    train, test, labelled, steps = SIZES[a.device]
    settings = [f"run.steps={steps}", f"run.save_every={steps}", "optim.warmup=50", "data.cache=device"]
    command = [sys.executable, "-m", "vidssl.cli", "quickstart", "--out", str(a.work / "quickstart")]
    command += ["--train", train, "--test", test, "--labelled", labelled]
    for setting in settings:
        command += ["--set", setting]
    status = subprocess.run(command, cwd=ROOT).returncode
    summary = a.work / "quickstart/summary.json"
    if status or not summary.exists():
        return False, f"vidssl quickstart ended with status {status}", {}
    rows = json.loads(summary.read_text())
    motion = {r["encoder"]: r for r in rows if (r["label"], r["control"]) == ("motion", "none")}
    untrained = motion.pop("random_init")
    learned = any(row["ci95"][0] > untrained["accuracy"] for row in motion.values())
    figures = [f"{name} {row['accuracy']:.1f}" for name, row in motion.items()]
    text = f"motion, per cent: {', '.join(figures)}, untrained {untrained['accuracy']:.1f}"
    # a few steps on a CPU show that it runs, not that it learns
    return learned or a.device == "cpu", text, {"rows": rows}


if __name__ == "__main__":
    run(learning, __doc__)

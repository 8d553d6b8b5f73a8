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
    command = [sys.executable, str(ROOT / "tools/quickstart.py"), "--out", str(a.work / "quickstart")]
    command += ["--train", train, "--test", test, "--labelled", labelled]
    for setting in settings:
        command += ["--set", setting]
    command += ["--probe", "probe.controls=[none]"]
    status = subprocess.run(command).returncode
    summary = a.work / "quickstart/summary.json"
    if status or not summary.exists():
        return False, f"tools/quickstart.py ended with status {status}", {}
    rows = json.loads(summary.read_text())
    print(json.dumps(rows, indent=1))
    return True, "; ".join(describe(row) for row in rows), {"rows": rows}


def describe(row: dict[str, Any]) -> str:
    return " ".join(str(value) for value in row.values() if not isinstance(value, (list, dict)))[:80]


if __name__ == "__main__":
    run(learning, __doc__)

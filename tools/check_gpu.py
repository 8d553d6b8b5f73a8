"""Checks and measures vidssl on this machine's GPUs, in order of importance, within a given time.

python tools/check_gpu.py [--minutes 8] [--out runs/check_gpu] [--only NAME ...] [--device cpu]

Every check is a program with its own processes, so a crash or a hang costs only itself; the next one starts.
Writes OUT/report.json, and OUT/NAME.txt (the output) and OUT/NAME.json (figures) of every check; prints a
table of passed, failed and skipped. Exit status 1 if a check failed. Needs no network. On a CPU it runs too,
with smaller sizes.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import atomic_write_text, check_writable

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 77  # exit status of a check that cannot run here; its last line says why
RESERVE_S = 3.0  # kept for the report
Status = Literal["passed", "failed", "skipped"]


class Check(NamedTuple):
    """A program that checks one thing: exit status 0 passed, SKIPPED skipped, anything else failed."""

    name: str
    needs_s: float  # it is not started with less time left
    limit_s: float  # after which it is ended
    command: list[str]


class Outcome(NamedTuple):
    """What came of a check."""

    name: str
    status: Status
    seconds: float
    text: str  # its last line


def gpu_checks(out: Path, device: str) -> list[Check]:
    """The checks, the most important first."""
    on_gpu = device == "cuda"

    def steps(name: str, pair: str, batch: int, compile: str) -> list[str]:
        """bench_step.py with the models of a pair. Its contenders are on the GPU at once: they fit 80 GB."""
        size = ["vit_large", str(batch), compile] if on_gpu else ["vit_small", "1", "no"]
        arguments = ["--pairs", pair, "--rounds", "8" if on_gpu else "1", "--precision", "bf16"]
        for option, value in zip(("--model", "--batch", "--compile"), size, strict=True):
            arguments += [option, value]
        return [script("bench_step.py"), *arguments, "--out", str(out / f"{name}.json")]

    def gpu(name: str, *arguments: str) -> list[str]:
        figures = ["--figures", str(out / f"{name}.json")]
        return [script(f"gpu/{name}.py"), "--device", device, *figures, *arguments]

    parity = [
        str(ROOT / "tests/parity/check_parity.py"),
        str(ROOT / "tests/parity/vectors"),
        "--device",
        device,
    ]
    data = [script("bench_data.py"), str(out / "bench_data")]
    work = ["--work", str(out / "work")]
    return [
        Check("environment", 1, 60, gpu("environment")),
        Check("methods", 15, 120, gpu("methods")),
        Check("vectors", 15, 120, parity),
        Check("vectors_bf16", 10, 60, [*parity, "--precision", "bf16"]),
        Check("runs", 30, 150, gpu("runs", *work)),
        Check("strategies", 30, 120, gpu("strategies", *work)),
        Check("compiled", 20, 120, gpu("compiled")),
        Check("steps_videomae", 40, 150, steps("steps_videomae", "videomae", 32, "both")),
        Check("steps_vjepa", 40, 150, steps("steps_vjepa", "vjepa", 24, "yes")),
        Check("data", 60, 150, [*data, "--out", str(out / "data.json")]),
        Check("learning", 120, 600, gpu("learning", *work)),
    ]


def script(name: str) -> str:
    return str(ROOT / "tools" / name)


def run_checks(checks: Sequence[Check], out: Path, seconds: float) -> Iterator[Outcome]:
    """Runs the checks one after the other for at most `seconds` in all, and yields what came of each."""
    deadline = time.monotonic() + seconds - RESERVE_S
    for check in checks:
        left = deadline - time.monotonic()
        if left < check.needs_s:
            yield Outcome(
                check.name, "skipped", 0.0, f"needs {check.needs_s:.0f} s, {max(0, left):.0f} s were left"
            )
            continue
        yield run_check(check, out / f"{check.name}.txt", min(check.limit_s, left))


def run_check(check: Check, output: Path, limit_s: float) -> Outcome:
    """Runs a check; its processes are killed after `limit_s` seconds. output: the file of its output."""
    paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    begin = time.monotonic()
    with open(output, "w") as f:
        process = subprocess.Popen(
            [sys.executable, *check.command], stdout=f, stderr=f, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # what it started must not go on beside the next check
            end_group(process)
    seconds = time.monotonic() - begin
    if status is None:
        return Outcome(check.name, "failed", seconds, f"not done after {limit_s:.0f} s: {last_line(output)}")
    if status < 0:
        return Outcome(check.name, "failed", seconds, f"{signal.Signals(-status).name}: {last_line(output)}")
    outcomes: dict[int, Status] = {0: "passed", SKIPPED: "skipped"}
    return Outcome(check.name, outcomes.get(status, "failed"), seconds, last_line(output))


def end_group(process: subprocess.Popen) -> None:
    """Kills a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):  # they have all ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(output: Path) -> str:
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def read_figures(out: Path, name: str) -> object:
    """What a check wrote into OUT/NAME.json, or None."""
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="check_gpu", description=__doc__.split("\n")[0])
    p.add_argument(
        "--minutes", type=float, default=8.0, help="for all checks; those without time are skipped"
    )
    p.add_argument("--out", type=Path, default=ROOT / "runs/check_gpu")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    a = p.parse_args(argv)
    out = a.out.resolve()
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    checks = gpu_checks(out, a.device)
    names = [check.name for check in checks]
    if unknown := sorted(set(a.only or []) - set(names)):
        raise UserError(f"--only {unknown[0]}: no such check; there are {', '.join(names)}")
    for name in names:  # an earlier report's
        (out / f"{name}.json").unlink(missing_ok=True)
    report = {"machine": platform.node(), "device": a.device, "minutes": a.minutes}
    rows: list[dict[str, object]] = []
    for outcome in run_checks([c for c in checks if c.name in (a.only or names)], out, 60 * a.minutes):
        print(f"{outcome.status:8s} {outcome.name:15s} {outcome.seconds:6.0f} s  {outcome.text}", flush=True)
        rows.append({**outcome._asdict(), "figures": read_figures(out, outcome.name)})
        text = json.dumps({**report, "checks": rows}, indent=1)
        atomic_write_text(out / "report.json", text)
    print(f"wrote {out / 'report.json'}")
    if any(row["status"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main, __doc__)

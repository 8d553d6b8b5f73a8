"""Runs the pipeline end to end: videos, shards, two pretrained encoders, frozen probes, a table, pictures.

    python tools/quickstart.py [FOLDER] [--out runs/quickstart]     (tools/quickstart.sh installs first)

Without FOLDER the corpus is rendered here. Every step is a command of the README and is skipped if its result
exists, so the same command continues an interrupted quickstart. Writes OUT/summary.json and OUT/*.png.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_prep.sources import read_source
from data_prep.synthetic import make_corpus
from vidssl import config
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import atomic_write, check_writable
from vidssl.zoo.jobs import error_of

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("videomae", "vjepa")
PYTHON = [sys.executable, "-u"]


class Job(NamedTuple):
    """A command of the README, the jobs that must end before it, and the file that it leaves (None: the
    command itself continues or ends at once)."""

    command: list[str]
    needs: tuple[str, ...]
    result: Path | None
    log: Path


def last_row(log: Path) -> dict | None:
    """Returns the last complete row of a log.jsonl that may still grow."""
    if not log.exists() or not log.stat().st_size:
        return None
    with open(log, "rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
        whole = f.read().split(b"\n")[1:-1]
    return json.loads(whole[-1]) if whole else None


def make_jobs(
    out: Path, kind: str, label: str, threads: int, extra: list[str], extra_probe: list[str]
) -> dict[str, Job]:
    """Returns two training runs that differ in the method file only, a probe of each and of an untrained
    encoder, and probes of `label` on the snapshots."""
    jobs: dict[str, Job] = {}
    shards = [f"data.{split}={out / 'shards' / split}" for split in ("train", "test")]

    def probe(name: str, trained: str, encoder: Path, *more: str) -> None:
        place = out / "probes" / name
        log = out / "logs" / f"probe_{name}.txt"
        settings = [f"encoder={encoder}", f"out={place}", *shards, *extra_probe, *more]
        command = [*PYTHON, "vidssl/probe.py", f"configs/probe/{kind}.yaml", *settings]
        jobs[f"probe {name}"] = Job(command, (trained,), place / "probe.json", log)

    for m in METHODS:
        names = (f"method/{m}_tiny", "model/vit_micro", f"data/{kind}", f"run/{kind}")
        files = [f"configs/{name}.yaml" for name in names]
        settings = [f"run.out={out / m}", shards[0], f"efficiency.threads={threads}", *extra]
        jobs[m] = Job([*PYTHON, "vidssl/train.py", *files, *settings], (), None, out / "logs" / f"{m}.txt")
    for m in METHODS:
        probe(m, m, out / m)
    probe("random_init", METHODS[0], out / METHODS[0], "random_init=true")
    run = config.merge([str(ROOT / f"configs/run/{kind}.yaml"), *extra])[0]["run"]
    for m in METHODS:
        for step in range(run["save_every"], run["steps"], run["save_every"]):
            snapshot = out / m / "snapshots" / f"step-{step:08d}.safetensors"
            probe(f"{m}@{step}", m, snapshot, "probe.controls=[none]", f"data.labels={label}")
    return jobs


def run_jobs(jobs: dict[str, Job], out: Path, at_once: int, threads: int) -> None:
    """Runs the jobs that are not done, `at_once` at a time, each with its output in a file; the first failure
    ends all."""
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": str(threads)}, "start_new_session": True}
    (out / "logs").mkdir(exist_ok=True)
    waiting = {name: job for name, job in jobs.items() if not (job.result and job.result.exists())}
    running: dict[str, subprocess.Popen] = {}
    pause = 1 if sys.stderr.isatty() else 30  # seconds between lines
    bars = {
        m: tqdm(desc=f"pre-train {m}", unit="step", position=i, mininterval=pause)
        for i, m in enumerate(METHODS)
    }
    try:
        while waiting or running:
            for name, job in list(waiting.items()):
                ready = not any(need in waiting or need in running for need in job.needs)
                if ready and len(running) < at_once:
                    with open(job.log, "w") as log:
                        running[name] = subprocess.Popen(job.command, stdout=log, stderr=log, **options)
                    del waiting[name]
            time.sleep(0.5)
            for m, bar in bars.items():
                if row := last_row(out / m / "log.jsonl"):
                    bar.set_postfix(loss=f"{row['loss']:.4f}", now="+".join(running), refresh=False)
                    bar.update(row["step"] - bar.n)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        raise UserError(f"{name} failed: {error_of(jobs[name].log)}")
    finally:  # each job is a process group of its own: a program and its workers
        for process in running.values():
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    for bar in bars.values():
        bar.close()


def summary(out: Path) -> list[dict]:
    """Returns a row for each encoder, label and control."""
    rows = []
    for name in (*METHODS, "random_init"):
        for r in json.loads((out / "probes" / name / "probe.json").read_text())["results"]:
            kept = {k: r[k] for k in ("label", "protocol", "control", "accuracy", "ci95", "n_test")}
            rows.append({"encoder": name, **kept, "chance": r["chance"]})
    return rows


def table(rows: list[dict]) -> str:
    """Formats the results, one line for each encoder and label."""
    lines = [f"{'label':12s} {'encoder':12s} {'in order':>22s} {'frames shuffled':>22s} {'chance':>7s}"]
    for label in dict.fromkeys(r["label"] for r in rows):
        for encoder in dict.fromkeys(r["encoder"] for r in rows):
            cells = []
            for control in ("none", "shuffled"):
                r = next(
                    r for r in rows if (r["label"], r["encoder"], r["control"]) == (label, encoder, control)
                )
                cells.append(f"{r['accuracy']:6.1f} [{r['ci95'][0]:5.1f}, {r['ci95'][1]:5.1f}]")
            lines.append(f"{label:12s} {encoder:12s} {cells[0]:>22s} {cells[1]:>22s} {r['chance']:7.1f}")
    return "\n".join(lines)


def accuracy_over_steps(out: Path, method: str, last: int) -> list[tuple[int, float]]:
    """Returns (step, accuracy on the label of the snapshot probes), the untrained encoder first."""
    probes = {0: "random_init", last: method}
    probes |= {int(p.name.split("@")[1]): p.name for p in (out / "probes").glob(f"{method}@*")}
    reports = {
        s: json.loads((out / "probes" / n / "probe.json").read_text())["results"] for s, n in probes.items()
    }
    label = next((r[0]["label"] for r in reports.values() if len(r) == 1), reports[0][0]["label"])
    return [(s, next(r["accuracy"] for r in reports[s] if r["label"] == label)) for s in sorted(reports)]


def draw(out: Path, rows: list[dict]) -> None:
    """Draws curves.png (losses, feature statistics, probes of snapshots) and accuracy.png (the table as
    bars)."""
    from matplotlib.figure import Figure  # imported late: it takes half a second

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for i, m in enumerate(METHODS):
        log = [json.loads(line) for line in (out / m / "log.jsonl").read_text().splitlines()]
        axes[i].plot([r["step"] for r in log], [r["loss"] for r in log], lw=0.7, color=f"C{i}")
        axes[i].set_title(f"{m}: loss")
        health = [r for r in log if "feature_std_time" in r]
        axes[2].plot(
            [r["step"] for r in health], [r["feature_std_time"] for r in health], "o-", ms=3, label=m
        )
        axes[3].plot([r["step"] for r in health], [r["feature_rank"] for r in health], "o-", ms=3, label=m)
        way = accuracy_over_steps(out, m, log[-1]["step"])
        axes[4].plot(*zip(*way, strict=True), "o-", ms=3, label=m)
    axes[2].set_title("features: deviation over time")
    axes[3].set_title("features: effective rank (RankMe)")
    axes[4].set_title("frozen probe of snapshots")
    units = ("loss", "loss", "deviation / root mean square", "directions", "accuracy on test, %")
    for i, (axis, unit) in enumerate(zip(axes, units, strict=False)):
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        if i < 2:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    handles, names = axes[4].get_legend_handles_labels()
    axes[5].axis("off")
    axes[5].legend(handles, names, loc="center", fontsize=12)
    figure.savefig(out / "curves.png", dpi=110)

    labels = list(dict.fromkeys(r["label"] for r in rows))
    encoders = list(dict.fromkeys(r["encoder"] for r in rows))
    size = (5 * len(labels), 4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(labels), squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        for k, (control, colour) in enumerate((("none", "C0"), ("shuffled", "0.75"))):
            mine = [r for r in rows if r["label"] == label and r["control"] == control]
            height = [r["accuracy"] for r in mine]
            error = [
                [max(0, r["accuracy"] - r["ci95"][0]) for r in mine],
                [max(0, r["ci95"][1] - r["accuracy"]) for r in mine],
            ]
            places = [encoders.index(r["encoder"]) + 0.4 * k - 0.2 for r in mine]
            name = "in order" if control == "none" else "frames shuffled"
            axis.bar(places, height, 0.38, yerr=error, color=colour, capsize=3, label=name)
        axis.axhline(mine[0]["chance"], color="k", ls=":", lw=1, label="chance")
        axis.set_xticks(range(len(encoders)), encoders)
        axis.set_title(f"{label}: frozen attentive probe (95 % interval)")
        axis.set_ylabel("accuracy on test, %")
        axis.set_ylim(0, 100)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(out / "accuracy.png", dpi=110)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="quickstart", description=__doc__.split("\n")[0])
    p.add_argument("folder", nargs="?", type=Path, help="your videos; none: a corpus is rendered")
    p.add_argument("--out", type=Path, help="default: runs/quickstart, or runs/quickstart_NAME for a folder")
    p.add_argument("--train", type=int, default=3000, help="videos rendered for training")
    p.add_argument("--test", type=int, default=800, help="videos rendered for testing")
    p.add_argument("--labelled", type=int, default=1200, help="of those rendered for training")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override for both trainings"
    )
    p.add_argument(
        "--probe", action="append", default=[], metavar="KEY=VALUE", help="override for the probes"
    )
    a = p.parse_args(argv)
    began = time.time()
    cores = os.cpu_count() or 1
    if a.folder is not None and not a.folder.is_dir():
        raise UserError(f"{a.folder}: no such folder")
    name = f"quickstart_{a.folder.resolve().name}" if a.folder else "quickstart"
    out = (a.out or ROOT / "runs" / name).resolve()
    source = a.folder.resolve() if a.folder else out / "corpus"
    check_writable(out)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the jobs in the background are ended, too
    if a.folder is None and not (source / "labels.csv").exists():
        make_corpus(source, a.train, a.test, a.labelled, workers=cores)
    found = read_source(source)
    if not found.label_sets:
        raise UserError(
            f"{source}: no labels, so nothing to probe; expected FOLDER/<class>/<file>, or labels.csv"
        )
    split = [] if any(item.split for item in found.items) else ["--test-fraction", "0.3"]
    packed = subprocess.run([*PYTHON, "-m", "data_prep.pack", source, out / "shards", *split], cwd=ROOT)
    if packed.returncode:
        sys.exit(packed.returncode)  # it has printed the reason
    for name in ("train", "test"):
        if not (out / "shards" / name / "index.json").exists():
            raise UserError(f"{source}: its splits must be called train and test")

    # Importing torch takes seconds: mistakes are answered before.
    import torch

    from vidssl.pictures.masks import show_runs

    at_once = (
        1 if torch.cuda.is_available() else min(2, cores)
    )  # small models use one core each better than all one
    threads = max(1, cores // at_once)
    jobs = make_jobs(
        out, "folder" if a.folder else "quickstart", found.label_sets[0], threads, a.set, a.probe
    )
    run_jobs(jobs, out, at_once, threads)
    rows = summary(out)
    atomic_write(out / "summary.json", lambda beside: beside.write_text(json.dumps(rows, indent=1)))
    draw(out, rows)
    show_runs([out / m for m in METHODS], out / "masks.png")
    print(f"\n{table(rows)}\n")
    print(
        f"wrote {out}/summary.json, masks.png, curves.png, accuracy.png in "
        f"{(time.time() - began) / 60:.1f} minutes"
    )


if __name__ == "__main__":
    run_cli(main)

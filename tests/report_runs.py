"""Run folders as training and probes leave them, made of a few numbers, for the tests of reports."""

import csv
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vidssl.evaluation.report import PredictionRow
from vidssl.report import watch

STEPS = 40
HOSTILE = "<script>alert(1)</script>"  # a class name is what users call it
CLASSES = ("clap", "run", HOSTILE)
HEALTHY = {
    "feature_clips": 16,
    "feature_std_clips": 0.8,
    "feature_std_tokens": 0.6,
    "feature_std_time": 0.3,
    "feature_rank": 40.0,
    "feature_participation": 9.0,
    "feature_channel_evenness": 0.8,
    "feature_cosine": 0.5,
}
COLLAPSED = {**HEALTHY, "feature_std_clips": 0.0001, "feature_rank": 3.0, "feature_cosine": 1.0}


def write_log(folder: Path, rows: list[dict[str, Any]], end: str = "") -> None:
    """end: what a kill left of the next line."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(text + end)


def log_rows(steps: int = STEPS, collapse_at: int | None = None, wait: float = 0.02) -> list[dict[str, Any]]:
    """The rows of a run whose loss falls."""
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 1 / step, "loss_0": 1 / step, "lr": 0.001, "grad_norm": 2 / step}
        row |= {"clips_per_s": 50.0, "wait": wait, "memory": 10**9, "flops": 10**9}
        row |= {"samples_hash": "ab", "undecodable_samples": 0, "skipped": 0, "skip_reason": None}
        if step % 5 == 0:
            row |= COLLAPSED if collapse_at is not None and step >= collapse_at else HEALTHY
        rows.append(row)
    return rows


def make_run(folder: Path, **options: Any) -> Path:
    """A finished run. options: of log_rows."""
    folder.mkdir(parents=True)
    config = {
        "method": {"mask": {"kind": "tube"}, "target": {"kind": "pixels"}},
        "model": {"kind": "vit", "dim": 48},
        "data": {"train": ["nowhere/train"], "frames": 8},
        "augment": {"size": 32},
        "run": {"steps": STEPS, "batch": 4, "seed": len(folder.name)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_log(folder, log_rows(**options))
    return folder


def make_probe(folder: Path, encoder: str, right: dict[str, int], n: int = 30) -> Path:
    """A probe of `n` test samples. right: control -> how many of them it classifies correctly."""
    folder.mkdir(parents=True)
    results, predictions = [], []
    for control, count in right.items():
        value = 100 * count / n
        results.append(
            {
                "label": "motion",
                "control": control,
                "protocol": "linear",
                "metric": "top1",
                "value": value,
                "ci95": [value - 5, value + 5],
                "chance": 33.3,
                "n_test": n,
                "n_train": 60,
            }
        )
        for i in range(n):
            truth = CLASSES[i % 3]
            predicted = truth if i < count else CLASSES[(i + 1) % 3]
            predictions.append(
                PredictionRow("motion", control, "", "", f"clip {i}", "", truth, predicted, "1 0 0")
            )
    report = {"results": results, "encoder": {"path": encoder}, "trained": {"step": STEPS}, "data": {}}
    (folder / "probe.json").write_text(json.dumps(report))
    with open(folder / "predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows([PredictionRow._fields, *predictions])
    return folder


@contextmanager
def serving(live: watch.LiveContents) -> Iterator[str]:
    """The address of a page that is served."""
    with watch.open_server(live, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()

"""The results of a quickstart, from the files that its programs wrote."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidssl.core.io import atomic_write_text, read_json_object
from vidssl.quickstart.programs import METHODS, NOT_TRAINED, Quickstart

KEPT = ("label", "protocol", "control", "accuracy", "ci95", "n_test", "chance")
Result = dict[str, Any]


def probe_results(folder: Path) -> list[Result]:
    return read_json_object(folder / "probe.json", f"remove {folder}")["results"]


def summary(quick: Quickstart) -> list[Result]:
    """A row for each encoder, label and control."""
    return [
        {"encoder": name, **{key: row[key] for key in KEPT}}
        for name in (*METHODS, NOT_TRAINED)
        for row in probe_results(quick.probe(name))
    ]


def write_results_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1)
    atomic_write_text(path, text)


def add_times(path: Path, seconds: Mapping[str, float]) -> None:
    """Adds the seconds of what this call has done to those of earlier ones."""
    known = read_json_object(path, "remove it") if path.exists() else {}
    write_results_json(path, {**known, **{name: round(took, 1) for name, took in seconds.items()}})


def result_table(rows: Sequence[Result]) -> str:
    """A line for each label and encoder."""
    lines = [f"{'label':12s} {'encoder':12s} {'in order':>22s} {'frames shuffled':>22s} {'chance':>7s}"]
    for label in dict.fromkeys(row["label"] for row in rows):
        for encoder in dict.fromkeys(row["encoder"] for row in rows):
            own = {r["control"]: r for r in rows if (r["label"], r["encoder"]) == (label, encoder)}
            cells = [with_interval(own[control]) for control in ("none", "shuffled")]
            chance = own["none"]["chance"]
            lines.append(f"{label:12s} {encoder:12s} {cells[0]:>22s} {cells[1]:>22s} {chance:7.1f}")
    return "\n".join(lines)


def with_interval(row: Result) -> str:
    low, high = row["ci95"]
    return f"{row['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def accuracy_over_steps(quick: Quickstart, method: str, last: int) -> list[tuple[int, float]]:
    """(step, accuracy on the label of the snapshots' probes), the untrained encoder first."""
    names = {0: NOT_TRAINED, last: method}
    names |= {int(p.name.split("@")[1]): p.name for p in (quick.out / "probes").glob(f"{method}@*")}
    found = {step: probe_results(quick.probe(name)) for step, name in names.items()}
    # Those of snapshots are of one label alone
    label = min(found.values(), key=len)[0]["label"]
    in_order = {
        step: next(r["accuracy"] for r in rows if (r["label"], r["control"]) == (label, "none"))
        for step, rows in found.items()
    }
    return sorted(in_order.items())

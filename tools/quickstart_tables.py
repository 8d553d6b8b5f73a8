"""Prints what the documentation says of a quickstart, from the files of its folder.

python tools/quickstart_tables.py [runs/quickstart]

The table of README.md and docs/experiments.md, the accuracy of snapshots, the seconds of docs/quickstart.md.
"""

import json
from pathlib import Path
from typing import Any

from vidssl.core.errors import run_cli
from vidssl.quickstart.results import with_interval

ENCODERS = {
    "videomae": "VideoMAE-style: pixels",
    "vjepa": "V-JEPA-style: EMA features",
    "random_init": "untrained, same architecture",
}
LABELS = ("motion", "appearance")
PARTS = {  # of times.json -> a line of the table
    "render": ("render",),
    "pack": ("pack",),
    "train, both at once": ("videomae", "vjepa"),
    "probe": ("probe",),
    "pictures and report": ("pictures",),
}


def result_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table in markdown."""
    found = {(row["encoder"], row["label"], row["control"]): row for row in rows}
    lines = []
    for encoder, name in ENCODERS.items():
        keys = [(encoder, label, control) for label in LABELS for control in ("none", "shuffled")]
        lines.append(f"| {name} | {' | '.join(with_interval(found[key]) for key in keys)} |")
    for encoder in ("videomae", "vjepa"):
        for label in LABELS:
            own, untrained = (found[name, label, "none"]["accuracy"] for name in (encoder, "random_init"))
            lines.append(f"{encoder} less untrained, {label}: {own - untrained:+.1f}")
    return lines


def snapshot_lines(folder: Path) -> list[str]:
    """Accuracy on the snapshots' label, by step."""
    lines = []
    for path in sorted((folder / "probes").glob("*@*/probe.json")):
        result = json.loads(path.read_text())["results"][0]
        lines.append(f"{path.parent.name}: {result['label']} {with_interval(result)}")
    return lines


def time_lines(seconds: dict[str, float]) -> list[str]:
    """Seconds of each part, of two programs at once: those of the longer one (training), half (probes)."""
    lines = []
    for title, names in PARTS.items():
        own = [took for name, took in seconds.items() if name.split()[0] in names]
        took = max(own) if "both" in title else sum(own) / (2 if title == "probe" else 1)
        lines.append(f"| {title} | {took:.0f} |")
    return lines


def main(argv: list[str]) -> None:
    folder = Path(argv[0] if argv else "runs/quickstart")
    rows = json.loads((folder / "summary.json").read_text())
    seconds = json.loads((folder / "times.json").read_text())
    for lines in (result_lines(rows), snapshot_lines(folder), time_lines(seconds)):
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    run_cli(main)

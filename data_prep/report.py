"""What is in a data set and what was left out: report.json and report.png, `python -m data_prep.report FOLDER`.

Histograms of frame rate, duration, short side and bytes of the samples, their codecs, reasons of rejection, bytes in
(of the source's files) and out (of the shards). Where samples were re-encoded, "original" holds the same of the files
that they were cut from.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.index import read_lines, write_lines
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import atomic_write
from vidssl.data.format import dumps, read_index

BINS = 24


def histogram(values: list[float]) -> dict:
    """counts [n] between edges [n+1], with least, median and largest; one bin where all values are the same."""
    if not values:
        return {"counts": [], "edges": []}
    least, most = min(values), max(values)
    edges = np.linspace(least, most, BINS + 1) if most > least else np.array([least - 0.5, least + 0.5])
    counts = np.histogram(values, edges)[0]
    facts = {"least": least, "median": float(np.median(values)), "most": most}
    return {"counts": counts.tolist(), "edges": edges.round(6).tolist(), **facts}


def make_report(folder: Path) -> dict:
    """All that the picture shows, from index.json, the shards' jsonl and rejected.jsonl."""
    index = read_index(folder)
    lines = [
        json.loads(line)
        for shard in index["shards"]
        for line in read_lines((folder / shard["name"]).with_suffix(".jsonl"))
    ]
    metas = [line["meta"] for line in lines]
    measured = [m for m in metas if "frames" in m]
    originals = [m["original"] for m in metas if "original" in m]
    left_out = folder / "rejected.jsonl"
    reasons = (
        Counter(json.loads(line)["reason"] for line in read_lines(left_out))
        if left_out.exists()
        else Counter()
    )
    return {
        "samples": len(lines),
        "files": len({m.get("source", i) for i, m in enumerate(metas)}),
        "shards": len(index["shards"]),
        "seconds": round(sum(m["duration"] for m in measured), 3),
        "frames": sum(m["frames"] for m in measured),
        "bytes_in": index["pack"].get("bytes_in"),
        "bytes_out": sum(shard["bytes"] for shard in index["shards"]),
        "rejected": dict(reasons.most_common()),
        "codec": dict(Counter(m["codec"] for m in measured).most_common()),
        "fps": histogram([m["fps"] for m in measured if m["frames"] > 1]),
        "duration": histogram([m["duration"] for m in measured]),
        "short_side": histogram([min(m["height"], m["width"]) for m in measured]),
        "bytes": histogram([line["size"] for line in lines]),
        "original": {
            "codec": dict(Counter(m["codec"] for m in originals).most_common()),
            "fps": histogram([m["fps"] for m in originals]),
            "short_side": histogram([min(m["height"], m["width"]) for m in originals]),
        },
    }


def draw(report: dict, file: Path) -> None:
    """The report as one picture."""
    from matplotlib.figure import Figure  # here, because pack's child processes import this module

    figure = Figure(figsize=(12, 7), dpi=80, layout="constrained")
    axes = figure.subplots(2, 3)
    panels = (("fps", "frames a second"), ("duration", "seconds"), ("short_side", "short side, pixels"))
    packed: dict = {"fill": True, "edgecolor": "C0", "linewidth": 2, "label": "packed"}
    before: dict = {"fill": False, "edgecolor": "black", "label": "original files"}
    for ax, (name, label) in zip(
        (*axes[0], axes[1, 0]), (*panels, ("bytes", "kilobytes a sample")), strict=True
    ):
        scale = 1e-3 if name == "bytes" else 1.0
        for facts, style in ((report, packed), (report["original"], before)):
            if facts.get(name, {}).get("counts"):
                ax.stairs(facts[name]["counts"], np.array(facts[name]["edges"]) * scale, **style)
        ax.set(xlabel=label, ylabel="samples")
        if report["original"].get(name, {}).get("counts"):
            ax.legend()
    codecs = {f"{k} (original)": n for k, n in report["original"]["codec"].items()}
    _bars(axes[1, 1], codecs | report["codec"], "codec")
    _bars(axes[1, 2], report["rejected"], "rejected")
    size_in = "" if report["bytes_in"] is None else f"{report['bytes_in'] / 1e6:,.1f} MB in, "
    size = f"{size_in}{report['bytes_out'] / 1e6:,.1f} MB out"
    counts = (
        f"{report['samples']:,} samples of {report['files']:,} files, {report['seconds'] / 3600:,.2f} hours"
    )
    figure.suptitle(f"{counts}; {size}; {sum(report['rejected'].values()):,} rejected")
    figure.savefig(file, format="png", metadata={"Software": None})


def _bars(ax: Any, counts: dict[str, int], label: str) -> None:
    """Horizontal bars with their numbers."""
    ax.set(xlabel=label)
    if not counts:
        ax.text(0.5, 0.5, "none", ha="center", va="center")
        return
    ax.bar_label(ax.barh(list(counts), list(counts.values()), alpha=0.8), padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.2)


def write_report(folder: Path) -> dict:
    """report.png and then report.json beside index.json."""
    report = make_report(folder)
    atomic_write(folder / "report.png", lambda beside: draw(report, beside))
    write_lines(folder / "report.json", [json.dumps(report, indent=1)])
    return report


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.report", description="What is in packed data sets."
    )
    parser.add_argument("folder", type=Path, help="a folder with index.json in it or below it")
    args = parser.parse_args(argv)
    folders = sorted(p.parent for p in args.folder.rglob("index.json"))
    if not folders:
        raise UserError(
            f"{args.folder}: no index.json in it or below it; shards of others need: data_prep.scan"
        )
    for folder in folders:
        report = write_report(folder)
        print(f"{folder / 'report.png'}: {report['samples']} samples, {dumps(report['rejected'])} rejected")


if __name__ == "__main__":
    run_cli(main)

"""Reports the contents of a data set and what was rejected: `python -m data_prep.report FOLDER`.

Writes report.json and report.png: histograms of frame rate, duration, short side and bytes of the samples,
their codecs, reasons of rejection, bytes in (of the source's files) and out (of the shards). If samples were
re-encoded, "original" holds the same for the files from which they were cut.
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
    """Returns counts [n] between edges [n+1], minimum, median and maximum; one bin if all values are
    equal."""
    if not values:
        return {"counts": [], "edges": []}
    low, high = min(values), max(values)
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    counts = np.histogram(values, edges)[0]
    summary = {"min": low, "median": float(np.median(values)), "max": high}
    return {"counts": counts.tolist(), "edges": edges.round(6).tolist(), **summary}


def make_report(folder: Path) -> dict:
    """Returns the contents of report.json, from index.json, the shards' .jsonl and rejected.jsonl."""
    index = read_index(folder)
    records = [
        json.loads(line)
        for shard in index["shards"]
        for line in read_lines((folder / shard["name"]).with_suffix(".jsonl"))
    ]
    metas = [record["meta"] for record in records]
    measured = [m for m in metas if "frames" in m]
    originals = [m["original"] for m in metas if "original" in m]
    rejected = folder / "rejected.jsonl"
    rejections = read_lines(rejected) if rejected.exists() else []
    reasons = Counter(json.loads(line)["reason"] for line in rejections)
    return {
        "samples": len(records),
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
        "bytes": histogram([record["size"] for record in records]),
        "original": {
            "codec": dict(Counter(m["codec"] for m in originals).most_common()),
            "fps": histogram([m["fps"] for m in originals]),
            "short_side": histogram([min(m["height"], m["width"]) for m in originals]),
        },
    }


def draw(report: dict, file: Path) -> None:
    """Draws the report as a PNG file."""
    from matplotlib.figure import Figure  # imported late, because pack's child processes import this module

    figure = Figure(figsize=(12, 7), dpi=80, layout="constrained")
    axes = figure.subplots(2, 3)
    panels = {
        "fps": "frames a second",
        "duration": "seconds",
        "short_side": "short side, pixels",
        "bytes": "kilobytes a sample",
    }
    packed_style: dict = {"fill": True, "edgecolor": "C0", "linewidth": 2, "label": "packed"}
    original_style: dict = {"fill": False, "edgecolor": "black", "label": "original files"}
    for ax, (name, label) in zip((*axes[0], axes[1, 0]), panels.items(), strict=True):
        scale = 1e-3 if name == "bytes" else 1.0
        for histograms, style in ((report, packed_style), (report["original"], original_style)):
            if histograms.get(name, {}).get("counts"):
                ax.stairs(histograms[name]["counts"], np.array(histograms[name]["edges"]) * scale, **style)
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
    """Draws horizontal bars with their counts."""
    ax.set(xlabel=label)
    if not counts:
        ax.text(0.5, 0.5, "none", ha="center", va="center")
        return
    ax.bar_label(ax.barh(list(counts), list(counts.values()), alpha=0.8), padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.2)


def write_dataset_report(folder: Path) -> dict:
    """Writes report.png and then report.json beside index.json. Returns the report."""
    report = make_report(folder)
    atomic_write(folder / "report.png", lambda temporary: draw(report, temporary))
    write_lines(folder / "report.json", [json.dumps(report, indent=1)])
    return report


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.report", description="Report the contents of packed data sets."
    )
    parser.add_argument("folder", type=Path, help="a folder with index.json in it or below it")
    args = parser.parse_args(argv)
    folders = sorted(p.parent for p in args.folder.rglob("index.json"))
    if not folders:
        raise UserError(
            f"{args.folder}: no index.json in it or below it; other WebDataset shards need data_prep.scan"
        )
    for folder in folders:
        report = write_dataset_report(folder)
        print(f"{folder / 'report.png'}: {report['samples']} samples, {dumps(report['rejected'])} rejected")


if __name__ == "__main__":
    run_cli(main)

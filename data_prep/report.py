"""Reports the contents of a data set and what was rejected, as `vidssl pack` writes it beside the shards.

report.json and report.png: histograms of frame rate, duration, short side and bytes of the samples,
samples per class, codecs, reasons of rejection, bytes in (of the source's files) and out (of the shards). If
samples were re-encoded, "original" holds the same for the files from which they were cut.
"""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.index import Contents, write_lines
from data_prep.summary import make_summary
from vidssl.core.io import atomic_write
from vidssl.core.suggestions import counted

BINS = 24
OUTLIER_SPREADS = 3  # outliers lie this many distances from the 5 % to the 95 % quantile beyond these
SAME_VALUE = 0.01  # relative difference: rates such as 29.97 and 30 are rounded by containers
MAX_BARS = 16  # classes; of more a curve is drawn
SHOWN_NAME = 24  # characters of a class name


def histogram(values: list[float]) -> dict:
    """Returns counts [n] between edges [n+1], minimum, median and maximum; one bin if all values are equal
    but for rounding.

    Outliers do not stretch the edges: they are counted in the first and the last bin, and as `outliers`.
    """
    if not values:
        return {"counts": [], "edges": [], "outliers": 0}
    low, high = usual_range(np.array(values))
    is_one_value = high - low <= SAME_VALUE * abs(high)
    edges = np.array([low - 0.5, high + 0.5]) if is_one_value else np.linspace(low, high, BINS + 1)
    inside = np.clip(values, edges[0], edges[-1])
    counts = np.histogram(inside, edges)[0]
    return {
        "counts": counts.tolist(),
        "edges": edges.round(6).tolist(),
        "outliers": int((inside != values).sum()),
        "min": min(values),
        "median": float(np.median(values)),
        "max": max(values),
    }


def usual_range(values: np.ndarray) -> tuple[float, float]:
    """Returns the least and the greatest value that is no outlier. values: f64 [n]."""
    lower, upper = np.quantile(values, [0.05, 0.95])
    margin = OUTLIER_SPREADS * max(upper - lower, SAME_VALUE * abs(upper))
    usual = values[(values >= lower - margin) & (values <= upper + margin)]
    return float(usual.min()), float(usual.max())


def make_report(contents: Contents) -> dict:
    """Returns the contents of report.json."""
    index, records, rejected = contents
    metas = [record["meta"] for record in records]
    measured = [m for m in metas if "frames" in m]
    videos = [m for m in measured if m["frames"] > 1]
    originals = [m["original"] for m in metas if "original" in m]
    reasons = Counter(record["reason"] for record in rejected)
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
        "classes": make_summary(records, index["classes"], {})["classes"],
        "fps": histogram([m["fps"] for m in videos]),
        "duration": histogram([m["duration"] for m in videos]),
        "short_side": histogram([min(m["height"], m["width"]) for m in measured]),
        "bytes": histogram([record["size"] for record in records]),
        "original": {
            "codec": dict(Counter(m["codec"] for m in originals).most_common()),
            "fps": histogram([m["fps"] for m in originals]),
            "short_side": histogram([min(m["height"], m["width"]) for m in originals]),
        },
    }


PANELS = {  # entry of the report -> (label, factor)
    "fps": ("frames a second", 1.0),
    "duration": ("seconds", 1.0),
    "short_side": ("short side, pixels", 1.0),
    "bytes": ("kilobytes a sample", 1e-3),
}


def draw(report: dict, file: Path) -> None:
    """Draws the report as a PNG file."""
    make_figure(report).savefig(file, format="png", metadata={"Software": None})


def make_figure(report: dict) -> Any:
    """Returns a matplotlib figure with a panel for each fact that there is."""
    from matplotlib.figure import Figure  # imported late, because pack's child processes import this module

    figure = Figure(figsize=(15, 7), dpi=80, layout="constrained")
    panels: list[Callable[[Any], None]] = [
        partial(_draw_histogram, report=report, name=name) for name in PANELS if report[name]["counts"]
    ]
    for label_set, sizes in report["classes"].items():
        if any(sizes.values()):
            panels.append(partial(_draw_classes, sizes=sizes, label_set=label_set))
    codecs = {f"{k} (original)": n for k, n in report["original"]["codec"].items()} | report["codec"]
    if codecs:
        panels.append(partial(_bars, counts=codecs, label="codec"))
    if report["rejected"]:
        panels.append(partial(_bars, counts=report["rejected"], label="rejected"))
    rows = 1 if len(panels) <= 3 else 2
    axes = figure.subplots(rows, -(-len(panels) // rows), squeeze=False).ravel()
    for ax, draw_panel in zip(axes, panels, strict=False):
        draw_panel(ax)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.suptitle(_title(report))
    return figure


def _title(report: dict) -> str:
    size_in = "" if report["bytes_in"] is None else f"{report['bytes_in'] / 1e6:,.1f} MB in, "
    size = f"{size_in}{report['bytes_out'] / 1e6:,.1f} MB out"
    hours = f", {report['seconds'] / 3600:,.2f} hours" if report["duration"]["counts"] else ""
    counts = f"{report['samples']:,} samples of {report['files']:,} files{hours}"
    return f"{counts}; {size}; {sum(report['rejected'].values()):,} rejected"


def _draw_histogram(ax: Any, report: dict, name: str) -> None:
    """Draws the histogram of an entry, over that of the original files if they were re-encoded."""
    label, scale = PANELS[name]
    packed_style: dict = {"fill": True, "edgecolor": "C0", "linewidth": 2, "label": "packed"}
    original_style: dict = {"fill": False, "edgecolor": "black", "label": "original files"}
    original = report["original"].get(name, {"counts": []})
    for found, style in ((report[name], packed_style), (original, original_style)):
        if found["counts"]:
            ax.stairs(found["counts"], np.array(found["edges"]) * scale, **style)
    if beyond := report[name]["outliers"]:
        extremes = f"{report[name]['min'] * scale:.4g} to {report[name]['max'] * scale:.4g}"
        label += f"\n{counted(beyond, 'outlier')} at the ends ({extremes} in all)"
    ax.set(xlabel=label, ylabel="samples")
    if original["counts"]:
        ax.legend()


def _draw_classes(ax: Any, sizes: dict[str, int], label_set: str) -> None:
    """Draws samples per class, the largest class first: bars, or a curve of many classes."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    shown = {_short(name): n for name, n in ordered}
    label = f"samples per class ({label_set}, {len(ordered)} classes)"
    if len(shown) == len(ordered) <= MAX_BARS:
        _bars(ax, shown, label)
        return
    counts = [n for _, n in ordered]
    ax.stairs(counts, np.arange(len(counts) + 1), fill=True)
    ax.set(xlabel=f"{label}, the largest first", ylabel="samples", ylim=(0, None))
    ends = (
        f"largest: {_short(ordered[0][0])} ({counts[0]})\nsmallest: {_short(ordered[-1][0])} ({counts[-1]})"
    )
    ax.text(0.97, 0.97, ends, transform=ax.transAxes, ha="right", va="top")


def _short(name: str) -> str:
    # a dollar sign would start a formula
    text = name if len(name) <= SHOWN_NAME else name[: SHOWN_NAME - 3] + "..."
    return text.replace("$", r"\$")


def _bars(ax: Any, counts: dict[str, int], label: str) -> None:
    """Draws horizontal bars with their counts."""
    ax.set(xlabel=label)
    ax.bar_label(ax.barh(list(counts), list(counts.values()), alpha=0.8), padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.2)


def write_dataset_report(folder: Path, contents: Contents) -> dict:
    """Writes report.png and then report.json beside index.json. Returns the report."""
    report = make_report(contents)
    atomic_write(folder / "report.png", lambda temporary: draw(report, temporary))
    write_lines(folder / "report.json", [json.dumps(report, indent=1)])
    return report

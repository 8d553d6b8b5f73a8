"""The plots of a zoo: accuracy and RankMe against FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidssl.core.io import atomic_write
from vidssl.evaluation.comparison import Row
from vidssl.zoo.config import UNTRAINED
from vidssl.zoo.results import as_points, merged, panels_of

COLUMNS = 3  # panels beside one another


def draw_accuracy(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each label of each probe; untrained, pixels and chance as lines."""
    panels = {f"{panel.title}\n{panel.unit}": members for panel, members in panels_of(rows).items()}

    def draw(axis: Any, members: Sequence[Row]) -> None:
        draw_runs(axis, members, "value")
        untrained = [row for row in members if row["run"] == UNTRAINED]
        for control, style, name in (("none", "-", UNTRAINED), ("pixels", "--", "pixels")):
            if of_control := [row for row in untrained if row["control"] == control]:
                axis.axhline(merged(of_control, "value")["value"], color="0.5", ls=style, lw=1, label=name)
        axis.axhline(members[0]["chance"], color="k", ls=":", lw=1, label="chance")

    draw_panels(path, panels, draw)


def draw_rankme(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each probe, whose training samples RankMe is of."""
    panels: dict[str, list[Row]] = {}
    for panel, members in panels_of(rows).items():
        panels.setdefault(f"{panel.probe}\nRankMe of train", list(members))

    def draw(axis: Any, members: Sequence[Row]) -> None:
        draw_runs(axis, members, "rankme")
        plain = [r for r in members if (r["run"], r["control"]) == (UNTRAINED, "none") and "rankme" in r]
        if plain:
            axis.axhline(plain[0]["rankme"], color="0.5", lw=1, label=UNTRAINED)

    draw_panels(path, panels, draw)


def draw_runs(axis: Any, rows: Sequence[Row], key: str) -> None:
    """The snapshots of each run on unchanged clips, with intervals; of several seeds mean and deviation."""
    names = [name for name in dict.fromkeys(row["run"] for row in rows) if name != UNTRAINED]
    for i, name in enumerate(names):
        mine = [row for row in rows if row["run"] == name and row["control"] == "none"]
        points = as_points(mine, key)
        if not points:
            continue
        flops, values = zip(*points, strict=True)
        value, low, high = (np.array([found[part] for found in values]) for part in ("value", "low", "high"))
        errors = np.stack([value - low, high - value]).clip(min=0)
        marker = "osv^D"[i // 10 % 5]
        axis.errorbar(
            flops, value, errors, marker=marker, color=f"C{i % 10}", ms=4, lw=1, capsize=2, label=name
        )


def draw_panels(path: Path, panels: Mapping[str, Sequence[Row]], draw: Any) -> None:
    """panels: title -> rows; draw: called with the axis and the rows of each."""
    from matplotlib.figure import Figure  # imported late: it takes half a second

    columns = min(len(panels), COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines + 0.9), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, members) in zip(axes.flat, panels.items(), strict=False):
        draw(axis, members)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("model FLOPs of training")
    handles = {
        name: handle
        for axis in figure.axes
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=5, frameon=False, fontsize=8
    )
    atomic_write(path, lambda beside: figure.savefig(beside, dpi=120, format="png"))

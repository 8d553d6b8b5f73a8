"""The plots of a quickstart: curves of both runs, and the table as bars."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from vidssl.core.io import atomic_write, read_json_rows
from vidssl.quickstart.programs import METHODS, Quickstart
from vidssl.quickstart.results import Result, accuracy_over_steps

PANEL_TITLES = (  # title, unit
    *((f"{method}: loss", "loss") for method in METHODS),
    ("features: deviation over time", "deviation / root mean square"),
    ("features: effective rank (RankMe)", "directions"),
    ("frozen probe of snapshots", "accuracy on test, %"),
)
CONTROL_NAMES = {"none": ("in order", "C0"), "shuffled": ("frames shuffled", "0.75")}  # name, colour


def draw_curves(quick: Quickstart) -> None:
    """curves.png: losses, feature statistics, probes of snapshots."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for i, method in enumerate(METHODS):
        log = read_json_rows(quick.run(method) / "log.jsonl")
        axes[i].plot([row["step"] for row in log], [row["loss"] for row in log], lw=0.7, color=f"C{i}")
        axes[i].set_yscale("log")
        measured = [row for row in log if "feature_std_time" in row]
        steps = [row["step"] for row in measured]
        for axis, key in zip(axes[2:4], ("feature_std_time", "feature_rank"), strict=True):
            axis.plot(steps, [row[key] for row in measured], "o-", ms=3, label=method)
        found = accuracy_over_steps(quick, method, log[-1]["step"])
        axes[4].plot(*zip(*found, strict=True), "o-", ms=3, label=method)
    for axis, (title, unit) in zip(axes, PANEL_TITLES, strict=False):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
    for axis in axes[2:5]:
        axis.set_ylim(bottom=0)
    axes[5].axis("off")
    axes[5].legend(*axes[4].get_legend_handles_labels(), loc="center", fontsize=12)
    save_figure(figure, quick, "curves.png")


def draw_bar_table(quick: Quickstart, rows: Sequence[Result]) -> None:
    """accuracy.png: the table as bars."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure = Figure(figsize=(5 * len(labels), 4), layout="constrained")
    axes = figure.subplots(1, len(labels), squeeze=False)[0]
    protocol = rows[0]["protocol"]
    for axis, label in zip(axes, labels, strict=True):
        draw_label(axis, [row for row in rows if row["label"] == label])
        axis.set_title(f"{label}: frozen {protocol} probe (95 % interval)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    save_figure(figure, quick, "accuracy.png")


def draw_label(axis: Any, rows: Sequence[Result]) -> None:
    """The bars of a label set, with its chance."""
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    for k, (control, (name, colour)) in enumerate(CONTROL_NAMES.items()):
        own = [row for row in rows if row["control"] == control]
        height = [row["accuracy"] for row in own]
        below = [max(0, row["accuracy"] - row["ci95"][0]) for row in own]
        above = [max(0, row["ci95"][1] - row["accuracy"]) for row in own]
        places = [encoders.index(row["encoder"]) + 0.4 * k - 0.2 for row in own]
        axis.bar(places, height, 0.38, yerr=[below, above], color=colour, capsize=3, label=name)
    axis.axhline(rows[0]["chance"], color="k", ls=":", lw=1, label="chance")
    axis.set_xticks(range(len(encoders)), encoders)
    axis.set_ylabel("accuracy on test, %")
    axis.set_ylim(0, 100)


def save_figure(figure: Figure, quick: Quickstart, name: str) -> None:
    atomic_write(quick.out / name, lambda beside: figure.savefig(beside, dpi=110, format="png"))

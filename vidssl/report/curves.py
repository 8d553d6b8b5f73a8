"""Curves of a run's log: which columns belong together, and fewer points than there are steps."""

import re
from itertools import pairwise
from typing import Any, NamedTuple

from vidssl.report.run_files import Row, number

POINTS = 1200  # of a curve, where there are few runs
TOTAL_POINTS = 12_000  # of a column, over all runs
DIGITS = 6  # significant digits of a value


class CurvePanel(NamedTuple):
    """A chart: the columns of the log that it offers, the first one shown."""

    title: str
    pattern: str  # of the names of its columns
    unit: str
    about: str
    log: bool = False


PANELS = (
    CurvePanel(
        "Loss", r"loss|epoch_loss", "loss", "What is minimised, mean of the step's or epoch's clips.", True
    ),
    CurvePanel(
        "Parts of the loss",
        r"(?:\w+_)?loss_\w+|aux_.*|clustering.*|terms?_.*|\w+_\d+",
        "value",
        "The loss of each mask, further losses, and the parts of all tokens that masks show and hide.",
    ),
    CurvePanel(
        "Online probe",
        r"online_probe_.*|val_.*|accuracy.*",
        "accuracy, %",
        "k-NN and ridge regression on labelled clips while the run trains.",
    ),
    CurvePanel(
        "Accuracy on held-out train",
        r"held_out_accuracy",
        "accuracy, %",
        "Of each epoch of a fine-tuning: the middle clips of videos of train that it does not see. It "
        "selects the epoch.",
    ),
    CurvePanel("Gradient norm", r"grad_norm", "L2 norm", "Of all gradients, before they are clipped.", True),
    CurvePanel("Learning rate", r"lr|weight_decay|ema", "value", "The schedules."),
    CurvePanel("Clips a second", r"clips_per_s", "clips/s", "Over all processes."),
    CurvePanel(
        "Waiting for data", r"wait", "part of the step", "Part of each step in which it waited for clips."
    ),
    CurvePanel(
        "Memory",
        r"memory",
        "bytes",
        "Peak of the first process: on the GPU, or resident where there is none.",
    ),
    CurvePanel(
        "Utilization",
        r"mfu|matmul_utilization|flops",
        "part",
        "Rate of model FLOPs over the device's peak, or over that of a measured matrix product.",
    ),
    CurvePanel(
        "Rank of the features",
        r"feature_rank|feature_rank_slice",
        "directions",
        "RankMe of the tokens of some training clips. It falls towards 1 when few directions vary.",
    ),
    CurvePanel(
        "Spread over clips",
        r"feature_std_clips|feature_std_clips_min|feature_std_channel_min",
        "deviation / root mean square",
        "How much features differ between clips. It falls to 0 when all clips become alike.",
    ),
    CurvePanel(
        "Spread within a clip",
        r"feature_std_time|feature_std_tokens",
        "deviation / root mean square",
        "How much features differ over the time and the tokens of a clip.",
    ),
    CurvePanel(
        "Directions that hold the variance",
        r"feature_participation|feature_channel_evenness|feature_alpha",
        "value",
        "Participation ratio of the covariance; evenness of the channels; alpha-ReQ.",
    ),
    CurvePanel(
        "Likeness",
        r"feature_cosine|feature_cosine_time",
        "cosine",
        "Mean cosine of two clips, and of two times of a clip. 1 in a collapse.",
    ),
    CurvePanel(
        "Target and EMA encoder",
        r"feature_target_var|feature_drift_weights|feature_drift_features",
        "value",
        "Variance of what is predicted; distance of the trained encoder from its average.",
    ),
    CurvePanel(
        "Seconds beside the steps", r".*_s", "seconds", "Measurements and checkpoints, which no step counts."
    ),
    CurvePanel(
        "Counts", r"skipped|undecodable_samples", "number", "Steps that were skipped; samples replaced."
    ),
)
WITH_EXTREMES = {"loss", "grad_norm", "wait"}
NOT_DRAWN = {"step", "steps", "epoch", "feature_clips"}


def columns_by_panel(rows: list[Row]) -> dict[str, list[str]]:
    """Title of a panel -> its columns, of all rows; columns that no panel knows are in "Others"."""
    columns = dict.fromkeys(
        key
        for row in rows
        for key, value in row.items()
        if number(value) is not None and key not in NOT_DRAWN
    )
    found: dict[str, list[str]] = {panel.title: [] for panel in PANELS}
    for column in columns:
        titles = [panel.title for panel in PANELS if re.fullmatch(panel.pattern, column)]
        found.setdefault(titles[0] if titles else "Others", []).append(column)
    for panel in PANELS:
        # In the order of the pattern's alternatives, which names the most telling one first
        order = panel.pattern.split("|")
        found[panel.title].sort(key=lambda name: order.index(name) if name in order else len(order))
    return {title: names for title, names in found.items() if names}


def curves_of(rows: list[Row], runs: int = 1) -> dict[str, Any]:
    """The columns of a log as points: {"rows", "flops": cumulative, "x": lists of steps, "columns": {name:
    {"x": which of these lists, "y": values}}}.

    A column of more than POINTS rows is cut into as many equal parts; a point is the mean of its part, at
    the last step of it, and "low" and "high" are its extremes, of the columns WITH_EXTREMES. runs: number of
    runs that share a page.
    """
    points = max(100, min(POINTS, TOTAL_POINTS // max(1, runs)))
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in NOT_DRAWN and (found := number(value)) is not None:
                steps, values = columns.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(found)
    drawn = {name: thinned(*found, points) for name, found in columns.items()}
    # Most columns have a value for each step: their steps are kept once
    places = {x: i for i, x in enumerate(dict.fromkeys(tuple(column["x"]) for column in drawn.values()))}
    for name, column in drawn.items():
        column["x"] = places[tuple(column["x"])]
        if name not in WITH_EXTREMES:
            column.pop("low", None)
            column.pop("high", None)
    return {
        "rows": len(rows),
        "flops": cumulative_flops(rows, points),
        "x": list(map(list, places)),
        "columns": drawn,
    }


def thinned(steps: list[int], values: list[float], points: int) -> dict[str, Any]:
    """A column as at most `points` points."""
    if len(values) <= points:
        return {"x": steps, "y": [rounded(value) for value in values]}
    edges = [len(values) * i // points for i in range(points + 1)]
    parts = [values[low:high] for low, high in pairwise(edges)]
    return {
        "x": [steps[high - 1] for high in edges[1:]],
        "y": [rounded(sum(part) / len(part)) for part in parts],
        "low": [rounded(min(part)) for part in parts],
        "high": [rounded(max(part)) for part in parts],
        "mean_of": round(len(values) / points, 1),
    }


def cumulative_flops(rows: list[Row], points: int) -> dict[str, list[float]] | None:
    """Steps and the model FLOPs until then; None if no row counts them."""
    total = 0.0
    steps, sums = [], []
    for row in rows:
        total += row.get("steps", 1) * (number(row.get("flops")) or 0.0)
        steps.append(row["step"])
        sums.append(total)
    if not total:
        return None
    kept = range(0, len(steps), max(1, len(steps) // points))
    chosen = sorted({*kept, len(steps) - 1})
    return {"x": [steps[i] for i in chosen], "y": [rounded(sums[i]) for i in chosen]}


def rounded(value: float) -> float:
    """A value of few digits, which keeps the page small."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")

"""Probes side by side: their rows, differences with paired intervals, label-free scores, and a plot."""

import csv
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from vidssl.config.signatures import fields_in_source
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write
from vidssl.core.tables import read_table
from vidssl.evaluation.controls import CONTROLS, control_name
from vidssl.evaluation.metrics import bootstrap_ci

RUN_KEYS = ("label", "control", "train_fraction", "seed")
SCORES = ("rankme", "alpha", "learnability", "dimension")
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
CONDITION_SECTIONS = ("data", "probe", "head", "optim", "tune", "augment")
# Encoders of other clips can be ranked: an image model has no frames of its own.
CLIP_KEYS = ("data.frames", "data.size", "data.stride", "data.fps")
# The data are compared by hash and the rows name fraction and list; how features are kept changes nothing.
NO_CONDITIONS = {f"data.{key}" for key in ("train", "test", "label", "labels", "cache_dir", "cache_gb")}
NO_CONDITIONS |= {"data.train_fractions", "data.seeds", "probe.controls", "tune.trackers", "tune.lanes"}
NO_CONDITIONS |= {
    f"probe.{name}" for name in fields_in_source("vidssl.evaluation.features", "FeatureStorage")
}
NO_CONDITIONS -= {"probe.cache_dtype"}
COLUMNS = (
    *("name", "label", "control", "protocol", "train_fraction", "seed", "metric", "value", "low", "high"),
    *("chance", "n_test", "difference", "difference_low", "difference_high", *SCORES, "conditions"),
)
Row = dict[str, Any]
Hits = dict[tuple[str, int], tuple[float, str]]  # (key, occurrence of this key) -> (correct, group)


def read_probe(path: Path, name: str) -> tuple[str, list[Row], Row]:
    """Returns the hash of the test data, the rows of the report (see `make_row`) and its conditions."""
    try:
        report = json.loads(path.read_text())
        with open(path.with_name("predictions.csv"), newline="") as f:
            predictions = list(read_table(f))
        rows = [make_row(name, result, predictions) for result in report["results"]]
        scores = report.get("label_free", {})
        rows = [row | scores.get(row["control"], {}) for row in rows]
        return report["data"]["test"], rows, conditions_of(report)
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}; give the probe.json of a probe's folder") from None
    except csv.Error as e:
        raise UserError(f"{path.with_name('predictions.csv')}: damaged ({e}); run the probe again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a probe.json of this version ({e})") from None


def conditions_of(report: Row) -> Row:
    """Everything beside the encoder that decides the figures of a report, as dotted keys."""
    found = {"train data": report.get("data", {}).get("train", "")[:8]}
    for section in CONDITION_SECTIONS:
        for key, value in report.get("config", {}).get(section, {}).items():
            if f"{section}.{key}" not in NO_CONDITIONS:
                found[f"{section}.{key}"] = value
    return found


def setting_of(report: Row) -> str:
    """Tells reports apart whose rows may not be compared: those of other data or conditions."""
    return repr((report.get("data"), conditions_of(report)))


def differing_conditions(conditions: dict[str, Row]) -> dict[str, Row]:
    """Key -> name of a probe -> value, of the conditions that the probes do not share."""
    keys = list(dict.fromkeys(key for found in conditions.values() for key in found))
    values = {key: {name: found.get(key, "-") for name, found in conditions.items()} for key in keys}
    return {key: row for key, row in values.items() if len({repr(value) for value in row.values()}) > 1}


def make_row(name: str, result: Row, predictions: list[dict[str, str]]) -> Row:
    """The columns of a result, and `hits`: (key, occurrence of this key) -> (correct, group) of each test
    sample."""
    fraction, seed = (f"{result[k]:g}" if k in result else "" for k in ("train_fraction", "list_seed"))
    run = dict(zip(RUN_KEYS, (result["label"], result["control"], fraction, seed), strict=True))
    hits: Hits = {}
    if result["metric"] == "top1":
        hits = hits_of(p for p in predictions if all(p[k] == v for k, v in run.items()))
    low, high = result["ci95"]
    copied = {k: result[k] for k in ("protocol", "metric", "value", "chance", "n_test")}
    return {"name": name, **run, **copied, "low": low, "high": high, "hits": hits}


def hits_of(predictions: Iterable[Row]) -> Hits:
    """(key, occurrence of this key) -> (correct, group) of the rows of predictions.csv of one result."""
    hits: Hits = {}
    occurrences: Counter[str] = Counter()
    for p in predictions:
        number = occurrences[p["key"]]
        # shards of other tools may repeat the key of another sample
        alone = f"sample {p['key']}" + (f" {number}" if number else "")
        hits[p["key"], number] = (p["truth"] == p["predicted"], p["group"] or alone)
        occurrences[p["key"]] += 1
    return hits


def paired_difference(hits: Hits, base: Hits) -> tuple[float, float, float]:
    """The difference to `base` in percentage points with its 95 % interval, over the same test samples."""
    values = np.array([float(hits[key][0]) - float(hit) for key, (hit, _) in base.items()])
    low, high = bootstrap_ci(values, [group for _, group in base.values()])
    return round(100 * float(values.mean()), 2), low, high


def add_differences(rows: list[Row]) -> None:
    """Adds the difference to the first row of the same run, in percentage points, with a 95 % interval."""
    first: dict[tuple, Row] = {}
    for row in rows:
        base = first.setdefault(tuple(row[k] for k in (*RUN_KEYS, "metric")), row)
        if base is row or not row["hits"]:
            continue
        if base["hits"].keys() != row["hits"].keys():
            raise UserError(f"{row['name']} and {base['name']}: other test samples of '{row['label']}'")
        difference, low, high = paired_difference(row["hits"], base["hits"])
        row |= {"difference": difference, "difference_low": low, "difference_high": high}


def decimals_of(metric: str) -> int:
    """Decimals with which a table shows a metric: R2 is a part of 1, the others are percent."""
    return 3 if metric == "R2" else 1


def format_table(rows: list[Row]) -> str:
    width = max(len(row["name"]) for row in rows)
    head = f"{'label':12s} {'control':11s} {'train':>6s} {'':5s} {'value':>7s} {'95 %':>17s}"
    lines = [f"{'':{width}s}  {head}   difference to the first"]
    for r in rows:
        train = f"{r['train_fraction']}/{r['seed']}" if r["train_fraction"] else "all"
        digits = decimals_of(r["metric"]) + 1
        interval = f"[{r['low']:.{digits}f}, {r['high']:.{digits}f}]"
        control = "" if r["control"] == "none" else r["control"]
        run = f"{r['label']:12s} {control:11s} {train:>6s} {r['metric']:5s}"
        line = f"{r['name']:{width}s}  {run} {r['value']:7.{digits}f} {interval:>17s}"
        if "difference" in r:
            line += f"   {r['difference']:+.2f} [{r['difference_low']:+.2f}, {r['difference_high']:+.2f}]"
        lines.append(line)
    return "\n".join(lines)


def centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks f64 [n] about their mean; equal values share their mean rank."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2 - (len(values) - 1) / 2


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation of x and y [n]; nan if one of them is constant."""
    a, b = (centred_ranks(values) for values in (x, y))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def spearman(x: list[float], y: list[float]) -> tuple[float, float]:
    """Returns (rho, p). Permutations give p = 1/3 for any three points in order, where an asymptotic test
    gives 0."""
    try:
        from scipy.stats import permutation_test
    except ImportError:
        raise UserError("--rank needs scipy: pip install scipy") from None
    a, b = (centred_ranks(np.array(values)) for values in (x, y))
    norm = np.sqrt((a @ a) * (b @ b))
    if norm == 0:  # all values are equal
        return 0.0, 1.0

    def correlation(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return (values * b).sum(axis) / norm

    test = permutation_test((a,), correlation, permutation_type="pairings", vectorized=True, rng=0)
    return float(test.statistic), float(test.pvalue)


def rank_lines(rows: list[Row]) -> list[str]:
    """A line for each label-free score and each run without a control. Raises UserError for fewer than three
    probes."""
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["control"] == "none":
            runs.setdefault(tuple(row[k] for k in ("label", "train_fraction", "seed", "metric")), []).append(
                row
            )
    lines = []
    for (label, fraction, seed, metric), members in runs.items():
        run = f"{label} {fraction}/{seed}" if fraction else label
        for score in SCORES:
            scored = [r for r in members if score in r]
            if len(scored) < 3:
                raise UserError(
                    f"--rank needs three probes or more with {score}; of '{run}' there are {len(scored)}"
                )
            if len({r["samples"] for r in scored}) > 1:
                raise UserError(
                    f"--rank: {score} depends on the number of training videos, and these probes' differ"
                )
            rho, p = spearman([r[score] for r in scored], [r["value"] for r in scored])
            lines.append(
                f"{score:6s} against {metric} of {run}: rho {rho:+.3f}, p {p:.3g}, {len(scored)} probes"
            )
    return lines


def merge_lists(members: list[Row]) -> dict[str, float]:
    """Value and interval of a result; of several low-shot lists of one probe, mean and sample deviation."""
    if len(members) == 1:
        return {key: float(members[0][key]) for key in ("value", "low", "high")}
    values = np.array([row["value"] for row in members])
    mean = float(values.mean())
    deviation = float(values.std(ddof=1))
    return {"value": mean, "low": mean - deviation, "high": mean + deviation}


def common_lists(rows: list[Row]) -> list[Row]:
    """Rows of the low-shot lists that every probe has; all rows if there is none."""
    seeds = [{r["seed"] for r in rows if r["name"] == name} for name in {r["name"] for r in rows}]
    common = set.intersection(*seeds)
    return [r for r in rows if r["seed"] in common] or rows


def draw_bars(axis: Any, rows: list[Row], names: list[str], controls: Sequence[str]) -> None:
    """For each probe a bar per control, of rows of one label, metric and fraction of train."""
    rows = common_lists(rows)
    width = 0.8 / len(controls)
    lists = 1
    for k, control in enumerate(controls):
        places, bars = [], []
        for i, name in enumerate(names):
            members = [r for r in rows if (r["control"], r["name"]) == (control, name)]
            if members:
                lists = max(lists, len(members))
                bars.append([merge_lists(members)[key] for key in ("value", "low", "high")])
                places.append(i + width * (k - (len(controls) - 1) / 2))
        if bars:
            value, low, high = np.array(bars).T
            errors = np.stack([value - low, high - value]).clip(min=0)
            label = control_name(control)
            axis.bar(places, value, 0.94 * width, yerr=errors, capsize=2, color=f"C{k}", label=label)
    for chance in {r["chance"] for r in rows}:
        axis.axhline(chance, color="k", ls=":", lw=1)
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    first = rows[0]
    axis.set_ylabel(first["metric"] if first["metric"] == "R2" else f"{first['metric']}, %")
    train = f"{first['train_fraction']} of train" if first["train_fraction"] else "all of train"
    shown = f"mean and deviation of {lists} lists" if lists > 1 else "95 % interval"
    axis.set_title(f"{first['label']}, {train}\n{shown}; dotted: chance", fontsize=9)


def draw_comparison(rows: list[Row], path: Path, conditions: str) -> None:
    """A panel for each label, metric and fraction of train: rows of different conditions share no bar.
    conditions: what differs between the probes, written below."""
    from matplotlib.figure import Figure  # imported late: it takes half a second

    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        panels.setdefault((row["label"], row["metric"], row["train_fraction"]), []).append(row)
    names = list(dict.fromkeys(r["name"] for r in rows))
    controls = [c for c in CONTROLS if any(r["control"] == c for r in rows)]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    width = max(3.2, 1.2 + 0.25 * len(names) * (1 + len(controls)))
    figure = Figure(figsize=(width * columns, 3.6 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, members in zip(axes.flat, panels.values(), strict=False):
        draw_bars(axis, members, names, controls)
    handles = {
        text: handle
        for axis in figure.axes
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    if conditions:
        figure.supxlabel("\n".join(textwrap.wrap(conditions, int(16 * width * columns))), fontsize=7)
    atomic_write(path, lambda beside: figure.savefig(beside, dpi=120, format=path.suffix[1:]))


def short_names(paths: list[Path]) -> list[str]:
    """For each folder of a probe.json the fewest parts of its path, in order, that tell it from the others:
    the part in which all differ, else what is left without the parts that all share."""
    parts = [path.resolve().parent.parts for path in paths]
    if len({len(p) for p in parts}) == 1:
        for column in reversed(list(zip(*parts, strict=True))):
            if len(set(column)) == len(column):
                return list(column)
        columns = [c for c in zip(*parts, strict=True) if len(set(c)) > 1]
        return ["/".join(row) for row in zip(*columns, strict=True)] if columns else [p[-1] for p in parts]
    start = shared_parts(parts)
    end = shared_parts([p[start:][::-1] for p in parts])
    return ["/".join(p[start : len(p) - end] or p[-1:]) for p in parts]


def shared_parts(paths: list[tuple[str, ...]]) -> int:
    """Number of leading parts that all paths share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False)))

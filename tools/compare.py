r"""Compares probes: a table, differences with paired intervals, and a plot.

    python tools/compare.py A/probe.json B/probe.json ... \
        [--csv OUT.csv] [--plot OUT.png] [--names a b ...] [--rank]

The folder of each probe.json holds its predictions.csv. A difference is to the first probe's row of the same
label, control and fraction of train, sample by sample: groups of test samples are resampled for both
together, so that what is hard for both does not widen the interval. Rows of numbers or tags have no hits and
get no difference.

--rank: Spearman's correlation, over the probes, of each label-free score (RankMe, alpha-ReQ of the mean
tokens of train) with the metric on test; p: two-sided, by all permutations of up to 7 probes, of more by
9,999 random ones. """

import argparse
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from vidssl.core.errors import UserError, run_cli
from vidssl.evaluation.metrics import bootstrap_ci
from vidssl.evaluation.views import CONTROLS

RUN_KEYS = ("label", "control", "train_fraction", "seed")
SCORES = ("rankme", "alpha")
COLUMNS = ("name", "label", "control", "protocol", "train_fraction", "seed", "metric", "value", "low", "high")
COLUMNS = (*COLUMNS, "chance", "n_test", "difference", "difference_low", "difference_high", *SCORES)
Row = dict[str, Any]


def read_probe(path: Path, name: str) -> tuple[str, list[Row]]:
    """Returns the hash of the test data, and the rows of the report; see `make_row`."""
    try:
        report = json.loads(path.read_text())
        with open(path.with_name("predictions.csv"), newline="") as f:
            predictions = list(csv.DictReader(f))
        rows = [make_row(name, result, predictions) for result in report["results"]]
        scores = report.get("label_free", {})
        return report["data"]["test"], [row | scores.get(row["control"], {}) for row in rows]
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}; give the probe.json of a probe's folder") from None
    except (ValueError, KeyError) as e:
        raise UserError(f"{path}: not a probe.json of this version ({e})") from None


def make_row(name: str, result: Row, predictions: list[dict[str, str]]) -> Row:
    """The columns of a result, and `hits`: (key, occurrence of this key) -> (correct, group) of each test
    sample."""
    fraction, seed = (f"{result[k]:g}" if k in result else "" for k in ("train_fraction", "list_seed"))
    run = dict(zip(RUN_KEYS, (result["label"], result["control"], fraction, seed), strict=True))
    hits = {}
    if result["metric"] == "top1":
        occurrences: Counter[str] = Counter()
        for p in predictions:
            if all(p[k] == v for k, v in run.items()):
                group = p["group"] or f"sample {p['key']}"
                hits[p["key"], occurrences[p["key"]]] = (p["truth"] == p["predicted"], group)
                occurrences[p["key"]] += 1
    low, high = result["ci95"]
    copied = {k: result[k] for k in ("protocol", "metric", "value", "chance", "n_test")}
    return {"name": name, **run, **copied, "low": low, "high": high, "hits": hits}


def add_differences(rows: list[Row]) -> None:
    """Adds the difference to the first row of the same run, in percentage points, with a 95 % interval."""
    first: dict[tuple, Row] = {}
    for row in rows:
        base = first.setdefault(tuple(row[k] for k in (*RUN_KEYS, "metric")), row)
        if base is row or not row["hits"]:
            continue
        if base["hits"].keys() != row["hits"].keys():
            raise UserError(f"{row['name']} and {base['name']}: other test samples of '{row['label']}'")
        values = np.array([float(row["hits"][key][0]) - float(hit) for key, (hit, _) in base["hits"].items()])
        row["difference"] = round(100 * float(values.mean()), 2)
        groups = [group for _, group in base["hits"].values()]
        row["difference_low"], row["difference_high"] = bootstrap_ci(values, groups)


def format_table(rows: list[Row]) -> str:
    width = max(len(row["name"]) for row in rows)
    head = f"{'label':12s} {'control':11s} {'train':>6s} {'':5s} {'value':>7s} {'95 %':>17s}"
    lines = [f"{'':{width}s}  {head}   difference to the first"]
    for r in rows:
        train = f"{r['train_fraction']}/{r['seed']}" if r["train_fraction"] else "all"
        interval = f"[{r['low']:.2f}, {r['high']:.2f}]"
        run = f"{r['label']:12s} {r['control']:11s} {train:>6s} {r['metric']:5s}"
        line = f"{r['name']:{width}s}  {run} {r['value']:7.2f} {interval:>17s}"
        if "difference" in r:
            line += f"   {r['difference']:+.2f} [{r['difference_low']:+.2f}, {r['difference_high']:+.2f}]"
        lines.append(line)
    return "\n".join(lines)


def spearman(x: list[float], y: list[float]) -> tuple[float, float]:
    """Returns (rho, p). Permutations give p = 1/3 for any three points in order, where an asymptotic test
    gives 0."""
    try:
        from scipy.stats import permutation_test, rankdata
    except ImportError:
        raise UserError("--rank needs scipy: pip install scipy") from None
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
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


def draw_bars(axis: Any, rows: list[Row], names: list[str], controls: list[str]) -> None:
    """For each probe a bar per control (of several low-shot lists the mean)."""
    width = 0.8 / len(controls)
    for k, control in enumerate(controls):
        places, bars = [], []
        for i, name in enumerate(names):
            members = [r for r in rows if (r["control"], r["name"]) == (control, name)]
            if members:
                bars.append([float(np.mean([r[key] for r in members])) for key in ("value", "low", "high")])
                places.append(i + width * (k - (len(controls) - 1) / 2))
        if bars:
            value, low, high = np.array(bars).T
            errors = np.stack([value - low, high - value]).clip(min=0)
            axis.bar(places, value, 0.94 * width, yerr=errors, capsize=2, color=f"C{k}", label=control)
    axis.axhline(rows[0]["chance"], color="k", ls=":", lw=1)
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axis.set_title(f"{rows[0]['label']}: {rows[0]['metric']}, 95 % interval", fontsize=9)


def plot(rows: list[Row], path: Path) -> None:
    """A panel per label."""
    labels, names = (list(dict.fromkeys(r[k] for r in rows)) for k in ("label", "name"))
    controls = [c for c in CONTROLS if any(r["control"] == c for r in rows)]
    size = (2 + 1.1 * len(names) * len(labels), 3.6)
    figure, axes = plt.subplots(1, len(labels), figsize=size, squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        draw_bars(axis, [r for r in rows if r["label"] == label], names, controls)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    legend = axes[0][0].get_legend_handles_labels()
    figure.legend(*legend, loc="upper center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="compare", description=__doc__.split("\n")[0])
    p.add_argument("probes", nargs="+", type=Path)
    p.add_argument("--names", nargs="+", help="default: the folders' names")
    p.add_argument("--csv", type=Path)
    p.add_argument("--plot", type=Path)
    p.add_argument("--rank", action="store_true", help="correlate label-free scores with the metric on test")
    a = p.parse_args(argv)
    paths = [path / "probe.json" if path.is_dir() else path for path in a.probes]
    names = a.names or [path.resolve().parent.name for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UserError(f"{len(paths)} probes need as many different --names, not {names}")
    probes = [read_probe(path, name) for path, name in zip(paths, names, strict=True)]
    if len({data for data, _ in probes}) > 1:
        raise UserError("these probes were tested on different data (data.test differs): nothing to compare")
    rows = [row for _, probe_rows in probes for row in probe_rows]
    rows.sort(key=lambda r: (r["label"], r["train_fraction"], r["seed"], CONTROLS.index(r["control"])))
    add_differences(rows)
    print(format_table(rows))
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if a.plot:
        plot(rows, a.plot)
    if a.rank:
        print("\n" + "\n".join(rank_lines(rows)))


if __name__ == "__main__":
    run_cli(main)

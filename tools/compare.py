"""Probes side by side: a table, differences with paired intervals, and a plot.

    python tools/compare.py A/probe.json B/probe.json ... [--csv OUT.csv] [--plot OUT.png] [--names a b ...]
    [--rank]

The folder of each probe.json holds its predictions.csv. A difference is to the first probe's row of the same
label, control and share, sample by sample: groups of test samples are drawn anew for both together, so that
what is hard for both does not widen the interval. Rows of numbers or tags have no right or wrong and get no
difference.

--rank: Spearman's correlation, over the probes, of each score that needs no labels (RankMe, alpha-ReQ of the
mean tokens of train) with the figure on test; p: two-sided, by all permutations of up to 7 probes, of more by
9,999 random.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from vidssl.core.errors import UserError, run_cli
from vidssl.evaluation.metrics import bootstrap_ci
from vidssl.evaluation.views import CONTROLS

COLUMNS = (
    "name",
    "label",
    "control",
    "protocol",
    "share",
    "seed",
    "metric",
    "value",
    "low",
    "high",
    "chance",
)
SCORES = ("rankme", "alpha")
COLUMNS = (*COLUMNS, "n_test", "difference", "difference_low", "difference_high", *SCORES)


def read_probe(path: Path, name: str) -> tuple[str, list[dict[str, Any]]]:
    """-> (hash of the test data, rows with `right`: (key, number of the line with this key) -> (right,
    group))."""
    try:
        report = json.loads(path.read_text())
        with open(path.with_name("predictions.csv"), newline="") as f:
            told = list(csv.DictReader(f))
        rows = [as_row(name, result, told) for result in report["results"]]
        return report["data"]["test"], [
            row | report.get("label_free", {}).get(row["control"], {}) for row in rows
        ]
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}; give the probe.json of a probe's folder") from None
    except (ValueError, KeyError) as e:
        raise UserError(f"{path}: not a probe.json of this version ({e})") from None


def as_row(name: str, result: dict[str, Any], told: list[dict[str, str]]) -> dict[str, Any]:
    share, seed = (f"{result[k]:g}" if k in result else "" for k in ("share", "list_seed"))
    which = {"label": result["label"], "control": result["control"], "share": share, "seed": seed}
    right = {}
    if result["metric"] == "top1":
        mine = [t for t in told if all(t[k] == v for k, v in which.items())]
        copies: dict[str, int] = {}
        for t in mine:
            copies[t["key"]] = number = copies.get(t["key"], -1) + 1
            right[t["key"], number] = t["truth"] == t["predicted"], t["group"] or f"sample {t['key']}"
    low, high = result["ci95"]
    kept = {k: result[k] for k in ("protocol", "metric", "value", "chance", "n_test")}
    return {"name": name, **which, **kept, "low": low, "high": high, "right": right}


def add_differences(rows: list[dict[str, Any]]) -> None:
    """Of each row to the first of its kind, in percentage points, with a 95 % interval."""
    first: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        base = first.setdefault(tuple(row[k] for k in ("label", "control", "share", "seed", "metric")), row)
        if base is row or not row["right"]:
            continue
        if base["right"].keys() != row["right"].keys():
            raise UserError(f"{row['name']} and {base['name']}: other test samples of '{row['label']}'")
        pairs = [(row["right"][key][0], base["right"][key]) for key in base["right"]]
        values = np.array([float(mine) - float(theirs) for mine, (theirs, _) in pairs])
        row["difference"] = round(100 * float(values.mean()), 2)
        row["difference_low"], row["difference_high"] = bootstrap_ci(
            values, [group for _, (_, group) in pairs]
        )


def table(rows: list[dict[str, Any]]) -> str:
    wide = max(len(row["name"]) for row in rows)
    head = f"{'label':12s} {'control':11s} {'share':>6s} {'':5s} {'value':>7s} {'95 %':>17s}   difference to the first"
    lines = [f"{'':{wide}s}  {head}"]
    for r in rows:
        share = f"{r['share']}/{r['seed']}" if r["share"] else "all"
        span = f"[{r['low']:.2f}, {r['high']:.2f}]"
        what = f"{r['label']:12s} {r['control']:11s} {share:>6s} {r['metric']:5s}"
        line = f"{r['name']:{wide}s}  {what} {r['value']:7.2f} {span:>17s}"
        if "difference" in r:
            line += f"   {r['difference']:+.2f} [{r['difference_low']:+.2f}, {r['difference_high']:+.2f}]"
        lines.append(line)
    return "\n".join(lines)


def spearman(x: list[float], y: list[float]) -> tuple[float, float]:
    """-> (rho, p). A test that assumes many points gives p = 0 for any three in order; permutations give 1/3."""
    try:
        from scipy.stats import permutation_test, rankdata
    except ImportError:
        raise UserError("--rank needs scipy: pip install scipy") from None
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    size = np.sqrt((a @ a) * (b @ b))
    if size == 0:  # all are equal
        return 0.0, 1.0
    found = permutation_test(
        (a,), lambda v, axis=-1: (v * b).sum(axis) / size, permutation_type="pairings", vectorized=True, rng=0
    )
    return float(found.statistic), float(found.pvalue)


def ranking(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each score and each kind of row without a control; at least three probes must have them."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["control"] == "none":
            kinds.setdefault(tuple(row[k] for k in ("label", "share", "seed", "metric")), []).append(row)
    lines = []
    for (label, share, seed, metric), mine in kinds.items():
        which = f"{label} {share}/{seed}" if share else label
        for score in SCORES:
            some = [r for r in mine if score in r]
            if len(some) < 3:
                raise UserError(
                    f"--rank needs three probes or more with {score}; of '{which}' there are {len(some)}"
                )
            if len({r["samples"] for r in some}) > 1:
                raise UserError(
                    f"--rank: {score} depends on the number of training videos, and these probes' differ"
                )
            rho, p = spearman(*([r[key] for r in some] for key in (score, "value")))
            lines.append(
                f"{score:6s} against {metric} of {which}: rho {rho:+.3f}, p {p:.3g}, {len(some)} probes"
            )
    return lines


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a label; for each probe a bar a control (of several lists the mean)."""
    labels, names = (list(dict.fromkeys(r[k] for r in rows)) for k in ("label", "name"))
    controls = [c for c in CONTROLS if any(r["control"] == c for r in rows)]
    figure, axes = plt.subplots(
        1, len(labels), figsize=(2 + 1.1 * len(names) * len(labels), 3.6), squeeze=False
    )
    for axis, label in zip(axes[0], labels, strict=True):
        for k, control in enumerate(controls):
            places, heights, errors = [], [], []
            for i, name in enumerate(names):
                mine = [r for r in rows if (r["label"], r["control"], r["name"]) == (label, control, name)]
                if mine:
                    value, low, high = (
                        float(np.mean([r[key] for r in mine])) for key in ("value", "low", "high")
                    )
                    places.append(i + 0.8 * (k - (len(controls) - 1) / 2) / len(controls))
                    heights.append(value)
                    errors.append((max(0, value - low), max(0, high - value)))
            if places:
                spans = np.array(errors).T
                axis.bar(
                    places, heights, 0.75 / len(controls), yerr=spans, capsize=2, color=f"C{k}", label=control
                )
        first = next(r for r in rows if r["label"] == label)
        axis.axhline(first["chance"], color="k", ls=":", lw=1)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set_title(f"{label}: {first['metric']}, 95 % interval", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=7, frameon=False
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="compare", description=__doc__.split("\n")[0])
    p.add_argument("probes", nargs="+", type=Path)
    p.add_argument("--names", nargs="+", help="default: the folders' names")
    p.add_argument("--csv", type=Path)
    p.add_argument("--plot", type=Path)
    p.add_argument("--rank", action="store_true", help="scores without labels against the figures on test")
    a = p.parse_args(argv)
    paths = [path / "probe.json" if path.is_dir() else path for path in a.probes]
    names = a.names or [path.resolve().parent.name for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UserError(f"{len(paths)} probes need as many different --names, not {names}")
    found = [read_probe(path, name) for path, name in zip(paths, names, strict=True)]
    if len({data for data, _ in found}) > 1:
        raise UserError("these probes were tested on different data (data.test differs): nothing to compare")
    rows = [row for _, part in found for row in part]
    rows.sort(key=lambda r: (r["label"], r["share"], r["seed"], CONTROLS.index(r["control"])))
    add_differences(rows)
    print(table(rows))
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if a.plot:
        plot(rows, a.plot)
    if a.rank:
        print("\n" + "\n".join(ranking(rows)))


if __name__ == "__main__":
    run_cli(main)

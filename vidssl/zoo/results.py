"""The results of a zoo, read from the files that its programs wrote: results.csv and table.md."""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, read_json_rows
from vidssl.core.tables import write_csv
from vidssl.evaluation.comparison import SCORES, Row, decimals_of, merge_lists, read_probe
from vidssl.evaluation.controls import CONTROLS, control_name
from vidssl.evaluation.metrics import bootstrap_seeds_ci
from vidssl.zoo.config import UNTRAINED, ZooConfig
from vidssl.zoo.jobs import Outcome
from vidssl.zoo.plan import PlannedRun
from vidssl.zoo.scores import correlation_table

COLUMNS = (
    *("run", "seed", "step", "clips", "flops", "probe", "label", "control", "protocol", "metric"),
    *("train_fraction", "list_seed", "accuracy", "low", "high", "chance", "n_test", *SCORES),
)


class Panel(NamedTuple):
    """What is compared in one table: a label set in one probe, learned from one fraction of its train."""

    probe: str
    label: str
    train_fraction: str  # "": all of train
    metric: str

    @property
    def title(self) -> str:
        train = f", {self.train_fraction} of train" if self.train_fraction else ""
        return f"{self.probe}: {self.label}{train}"

    @property
    def unit(self) -> str:
        return "R2" if self.metric == "R2" else f"{self.metric}, %"


def read_results(zoo: ZooConfig, runs: Mapping[str, PlannedRun]) -> list[Row]:
    """The rows of all finished probes of the plan, one for each label, control and list."""
    rows: list[Row] = []
    flops = {
        (name, seed): flops_by_step(zoo.run_folder(name, seed) / "log.jsonl")
        for name in runs
        for seed in zoo.seeds
    }
    for probe in zoo.probes:
        where = {"run": UNTRAINED, "run_seed": "", "step": 0, "clips": 0, "flops": 0}
        rows += probe_rows(zoo.untrained_folder(probe), {"probe": probe, **where})
        for (name, seed), spent in flops.items():
            for step in runs[name].snapshot_steps:
                where = {"run": name, "run_seed": seed, "step": step, "clips": step * runs[name].batch}
                where["flops"] = spent.get(step, "")
                rows += probe_rows(zoo.probe_folder(probe, name, seed, step), {"probe": probe, **where})
    return rows


def probe_rows(folder: Path, where: Row) -> list[Row]:
    """The rows of a probe with the columns of its encoder; none if it is not finished."""
    report = folder / "probe.json"
    return [row | where for row in read_probe(report, where["run"])[1]] if report.exists() else []


def flops_by_step(log: Path) -> dict[int, int]:
    """Step -> model FLOPs of the run up to it, by the rows of its log.jsonl."""
    if not log.exists():
        return {}
    spent: dict[int, int] = {}
    total = 0
    for row in read_json_rows(log):
        # of a step, on average over those of the row
        total += row.get("steps", 1) * row["flops"]
        spent[row["step"]] = total
    return spent


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """Writes results.csv."""
    named = (
        row | {"seed": row["run_seed"], "list_seed": row["seed"], "accuracy": row["value"]} for row in rows
    )
    write_csv(path, COLUMNS, ([row.get(name) for name in COLUMNS] for row in named))


def panels_of(rows: Iterable[Row]) -> dict[Panel, list[Row]]:
    found: dict[Panel, list[Row]] = {}
    for row in rows:
        panel = Panel(row["probe"], row["label"], row["train_fraction"], row["metric"])
        found.setdefault(panel, []).append(row)
    return found


def final_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last probed snapshot of each run."""
    last: dict[str, int] = {}
    for row in rows:
        last[row["run"]] = max(last.get(row["run"], 0), row["step"])
    return [row for row in rows if row["step"] == last[row["run"]]]


def cell(rows: Sequence[Row]) -> str:
    """Value and 95 % interval; of several seeds or lists mean, sample deviation and number."""
    if not rows:
        return ""
    found = merge_lists(list(rows))
    n = decimals_of(rows[0]["metric"])
    if len(rows) == 1:
        return f"{found['value']:.{n}f} [{found['low']:.{n}f}, {found['high']:.{n}f}]"
    return f"{found['value']:.{n}f} ± {found['high'] - found['value']:.{n}f} ({len(rows)})"


def mean_text(rows: Sequence[Row], key: str, form: str) -> str:
    """The mean of a column over the rows that have it."""
    values = [row[key] for row in rows if row.get(key, "") != ""]
    return format(sum(values) / len(values), form) if values else ""


def accuracy_table(rows: Sequence[Row]) -> list[str]:
    """A line for each encoder of a panel: final figures on unchanged clips and under the controls."""
    controls = [c for c in CONTROLS if any(r["control"] == c for r in rows)]
    head = ["encoder", *map(control_name, controls), "chance", "RankMe", "steps", "clips", "FLOPs"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    names = sorted({row["run"]: None for row in rows}, key=lambda name: name == UNTRAINED)
    for name in names:
        mine = [row for row in rows if row["run"] == name]
        plain = [row for row in mine if row["control"] == "none"]
        cells = [name, *(cell([r for r in mine if r["control"] == c]) for c in controls)]
        cells += [mean_text(plain, "chance", ".1f"), mean_text(plain, "rankme", ".1f")]
        cells += [f"{mine[0]['step']:,d}", f"{mine[0]['clips']:,d}", mean_text(plain, "flops", ".3g")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


class Pair(NamedTuple):
    """Two encoders of a panel, the one with the higher mean accuracy first."""

    better: str
    other: str
    difference: float  # of the means, percentage points
    low: float  # 95 % interval
    high: float

    @property
    def order(self) -> str:
        return f"{self.better} is better" if self.low > 0 else "undecided"


def hits_by_seed(rows: Sequence[Row], samples: Sequence[tuple[str, int]]) -> np.ndarray:
    """f64 [seeds, samples]: hits of the runs of one method, each the mean over its low-shot lists."""
    seeds: dict[Any, list[list[float]]] = {}
    for row in rows:
        if row["hits"].keys() != set(samples):
            raise UserError(f"{row['run']}: other test samples of '{row['label']}' than another run")
        seeds.setdefault(row["run_seed"], []).append([float(row["hits"][key][0]) for key in samples])
    return np.array([np.mean(lists, axis=0) for lists in seeds.values()])


def ordered_pairs(rows: Sequence[Row]) -> list[Pair]:
    """For each two encoders of a panel their difference on unchanged clips. Its interval is paired by test
    sample, and of several seeds holds how the runs of a method differ, too (bootstrap_seeds_ci). Metrics
    without hits have none."""
    plain = [row for row in rows if row["control"] == "none" and row["hits"]]
    if not plain:
        return []
    samples = list(plain[0]["hits"])
    groups = [plain[0]["hits"][key][1] for key in samples]
    hits = {
        name: hits_by_seed([row for row in plain if row["run"] == name], samples)
        for name in dict.fromkeys(row["run"] for row in plain)
    }
    ranked = sorted(hits, key=lambda name: hits[name].mean(), reverse=True)
    pairs = []
    for better, other in combinations(ranked, 2):
        difference = round(100 * float(hits[better].mean() - hits[other].mean()), 2)
        interval = bootstrap_seeds_ci(hits[better], hits[other], groups)
        pairs.append(Pair(better, other, difference, *interval))
    return pairs


def pair_table(rows: Sequence[Row]) -> list[str]:
    """A line for each two encoders of a panel."""
    pairs = ordered_pairs(rows)
    if not pairs:
        return []
    lines = ["| pair | difference, points | 95 % | order |", "|---|---|---|---|"]
    for pair in pairs:
        interval = f"[{pair.low:+.1f}, {pair.high:+.1f}]"
        lines.append(f"| {pair.better} - {pair.other} | {pair.difference:+.1f} | {interval} | {pair.order} |")
    return lines


def write_table(path: Path, zoo: ZooConfig, rows: Sequence[Row], outcomes: Mapping[str, Outcome]) -> str:
    """Writes table.md: final figures and ordered pairs of each label. Returns its text."""
    same = "clips seen" if zoo.equal == "clips" else "counted FLOPs"
    seeds = ", ".join(map(str, zoo.seeds))
    between_seeds = (
        "pairs over seeds, too"
        if len(zoo.seeds) > 1
        else "one training each, and another seed may differ by more"
    )
    lines = [
        f"# {os.path.basename(zoo.folder.resolve())}",
        "",
        f"Frozen encoders at equal {same}; seeds {seeds}. In brackets: 95 % interval over groups of test",
        f"samples, of {between_seeds}; after ±: sample deviation over seeds and lists (their number).",
        "",
    ]
    panels = panels_of(rows)
    for panel, members in panels.items():
        final = final_rows(members)
        tests = ", ".join(str(n) for n in dict.fromkeys(row["n_test"] for row in final))
        lines += [
            f"## {panel.title}",
            "",
            f"{panel.unit}, of {tests} test samples.",
            "",
            *accuracy_table(final),
            "",
        ]
        pairs = pair_table(final)
        lines += [*pairs, ""] if pairs else []
    correlations = correlation_table({panel.title: found for panel, found in panels.items()})
    if correlations:
        lines += ["## Scores without labels against accuracy", "", *correlations, ""]
    problems = [
        (name, outcome) for name, outcome in outcomes.items() if outcome.status not in ("done", "skipped")
    ]
    if problems:
        lines += ["## Not done", "", *(f"- {name}: {o.status}: {o.text}" for name, o in problems), ""]
    text = "\n".join(lines)
    atomic_write_text(path, text)
    return text


def as_points(rows: Sequence[Row], key: str) -> list[tuple[float, dict[str, float]]]:
    """(FLOPs, value with its interval) of a run's snapshots in order: `key` of the rows merged over seeds and
    lists."""
    steps: dict[int, list[Row]] = {}
    for row in rows:
        if row.get(key, "") != "" and row["flops"] != "":
            steps.setdefault(row["step"], []).append(row)
    points = []
    for _, members in sorted(steps.items()):
        spent = sum(row["flops"] for row in members) / len(members)
        points.append((spent, merged(members, key)))
    return points


def merged(rows: Sequence[Row], key: str) -> dict[str, float]:
    """merge_lists of a column; one value of a column without an interval has none."""
    if key == "value":
        return merge_lists(list(rows))
    plain: list[dict[str, Any]] = [{"value": row[key], "low": row[key], "high": row[key]} for row in rows]
    return merge_lists(plain)

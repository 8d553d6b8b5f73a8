"""Probes and dense evaluations of a run: found by the encoder that they name, read from what they wrote."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from vidssl.core.tables import read_table
from vidssl.evaluation.comparison import setting_of
from vidssl.evaluation.controls import CONTROLS
from vidssl.report.run_files import Row, number, read_json

REPORTS = ("probe.json", "dense.json")
MAX_CLASSES = 64  # of a confusion matrix that is drawn
MAX_PAIRS = 40  # of the most frequent confusions that are listed
RowKey = tuple[str, str, str, str]  # label, control, fraction of train, seed of the list


@dataclass
class Evaluation:
    """A probe.json, a fine-tuning's probe.json, or a dense.json."""

    name: str
    path: Path
    report: Row
    step: int | None  # of the encoder
    is_untrained: bool
    predictions: dict[RowKey, list[Row]] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        return self.path.name == "dense.json"

    @property
    def setting(self) -> str:
        """Tells probes apart whose figures may not be compared; see setting_of."""
        try:
            return setting_of(self.report)
        except (AttributeError, KeyError, TypeError):  # damaged, or of an older version
            return str(self.path)

    @property
    def results(self) -> list[Row]:
        found = self.report.get("results")
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def find_evaluations(run: Path, missing: list[str]) -> list[Evaluation]:
    """The evaluations of a run's encoder and snapshots: those in its folder, and those beside it and in
    folders `probes` that name it. Damaged ones are named in `missing`."""
    found: dict[Path, Evaluation] = {}
    for path in candidates(run):
        if path.resolve() in found:
            continue
        report = read_json(path)
        is_inside = run.resolve() in path.resolve().parents
        if report is None:
            if is_inside:
                missing.append(f"{path} cannot be read.")
            continue
        step = evaluated_step(report, run)
        if step is None and not is_inside:
            continue
        found[path.resolve()] = Evaluation(
            evaluation_name(path, run),
            path,
            report,
            step if isinstance(step, int) else trained_step(report),
            bool(encoder_of(report).get("random_init")),
        )
    return sorted(found.values(), key=lambda e: (e.is_untrained, e.step or 0, e.name))


def candidates(run: Path) -> Iterator[Path]:
    """Files that may be evaluations of this run."""
    for name in REPORTS:
        for depth in ("", "*/", "*/*/"):
            yield from sorted(run.glob(depth + name))
        parent = run.absolute().parent
        yield from sorted(parent.glob(f"*/{name}"))
        for base in (parent, parent.parent):
            for depth in ("*/", "*/*/"):
                yield from sorted(base.glob(f"probes/{depth}{name}"))
            yield from sorted(base.glob(f"dense/*/{name}"))


def encoder_of(report: Row) -> Row:
    found = report.get("encoder")
    return found if isinstance(found, dict) else {}


def evaluated_step(report: Row, run: Path) -> int | str | None:
    """The step of the run's encoder that a report names ("": its last one); None if it names another."""
    recorded = encoder_of(report).get("path")
    if not isinstance(recorded, str):
        return None
    parts = PurePath(recorded).parts
    own = run.resolve().parts
    places = [i for i, part in enumerate(parts) if part == own[-1]]
    if not places:
        return None
    # A folder may have been moved or be named from another place: names before it decide where both have any
    before = [part for part in parts[: places[-1]] if part not in (".", "..", "/")]
    if before and before[-1] != own[-2]:
        return None
    steps = re.findall(r"step-(\d+)", "/".join(parts[places[-1] + 1 :]))
    return int(steps[-1]) if steps else ""


def trained_step(report: Row) -> int | None:
    trained = report.get("trained")
    step = trained.get("step") if isinstance(trained, dict) else None
    return step if isinstance(step, int) else None


def evaluation_name(path: Path, run: Path) -> str:
    """The folders of a report below the run, or below the folder beside it."""
    folder = path.resolve().parent
    for base in (run.resolve(), run.resolve().parent, run.resolve().parent.parent):
        if folder == base:
            return run.name
        if base in folder.parents:
            name = folder.relative_to(base).as_posix()
            return name.removeprefix("probes/").removeprefix("dense/")
    return folder.name


def table_rows(evaluations: list[Evaluation]) -> list[Row]:
    """The results of probes as rows of one table."""
    rows = []
    for evaluation in evaluations:
        for result in evaluation.results:
            low, high = interval_of(result)
            control = str(result.get("control", "none"))
            if evaluation.is_untrained and control == "none":
                control = "random_init"
            rows.append(
                {
                    "probe": evaluation.name,
                    "step": 0 if evaluation.is_untrained else evaluation.step,
                    "label": str(result.get("label", result.get("task", ""))),
                    "protocol": str(result.get("protocol", result.get("task", ""))),
                    "control": control,
                    "fraction": number(result.get("train_fraction")),
                    "list": number(result.get("list_seed")),
                    "metric": str(result.get("metric", "")),
                    "value": number(result.get("value")),
                    "low": low,
                    "high": high,
                    "chance": number(result.get("chance")),
                    "n_test": number(result.get("n_test")),
                    "n_train": number(result.get("n_train")),
                    "top5": number(result.get("top5")),
                    "mean_per_class": number(result.get("mean_per_class")),
                }
            )
    order = {control: i for i, control in enumerate(CONTROLS)}
    return sorted(rows, key=lambda row: (row["label"], row["step"] or 0, order.get(row["control"], 99)))


def interval_of(result: Row) -> tuple[float | None, float | None]:
    """The ends of a 95 % interval, where there is one."""
    ends = result.get("ci95")
    if not isinstance(ends, list) or len(ends) != 2:
        return None, None
    return number(ends[0]), number(ends[1])


def read_predictions(evaluation: Evaluation, missing: list[str]) -> dict[RowKey, list[Row]]:
    """The rows of predictions.csv by (label, control, fraction, seed), read once."""
    path = evaluation.path.parent / "predictions.csv"
    if evaluation.predictions or evaluation.is_dense:
        return evaluation.predictions
    try:
        with open(path, newline="") as file:
            for row in read_table(file):
                key = (row["label"], row["control"], row["train_fraction"], row["seed"])
                evaluation.predictions.setdefault(key, []).append(row)
    except FileNotFoundError:
        missing.append(f"{evaluation.name}: there is no predictions.csv, so no confusion matrix.")
    except (OSError, ValueError, KeyError, csv.Error) as e:
        missing.append(f"{path} cannot be read: {str(e) or type(e).__name__}.")
    return evaluation.predictions


def confusion_of(predictions: list[Row]) -> Row | None:
    """Counts of (truth, predicted): a matrix of few classes, the most frequent confusions of many."""
    pairs = Counter((row["truth"], row["predicted"]) for row in predictions)
    truths = Counter(row["truth"] for row in predictions)
    if len(truths) < 2 or len(truths) > len(predictions) / 2:
        # Tags and numbers are no classes
        return None
    names = sorted({name for pair in pairs for name in pair if name})
    wrong = [[*pair, n] for pair, n in pairs.most_common() if pair[0] != pair[1]]
    per_class = [
        {"class": name, "n": n, "right": pairs[name, name], "accuracy": round(100 * pairs[name, name] / n, 1)}
        for name, n in sorted(truths.items())
    ]
    found: dict[str, Any] = {"n": len(predictions), "per_class": per_class, "pairs": wrong[:MAX_PAIRS]}
    if len(names) <= MAX_CLASSES:
        columns = names + ([""] if any(not predicted for _, predicted in pairs) else [])
        found["names"] = names
        found["columns"] = columns
        found["matrix"] = [[pairs[truth, predicted] for predicted in columns] for truth in names]
    return found


def confusions(evaluations: list[Evaluation], missing: list[str]) -> list[Row]:
    """The confusions on unchanged clips, of all of train, of each label set of each probe."""
    found = []
    for evaluation in evaluations:
        for (label, control, fraction, _), rows in read_predictions(evaluation, missing).items():
            if control != "none" or fraction:
                continue
            if (matrix := confusion_of(rows)) is not None:
                found.append({"probe": evaluation.name, "label": label, **matrix})
    return found

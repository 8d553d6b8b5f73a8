"""The outcome of an adaptation: accuracies with intervals and paired differences, and the held-out error."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidssl.core.io import read_json_rows
from vidssl.evaluation.comparison import Row, add_differences, decimals_of, read_probe

AFTER = "after"
ENCODERS = (AFTER, "before", "from scratch", "untrained")  # in the order of the table
IN_WORDS = {
    "before": "the checkpoint before",
    "from scratch": "a run from scratch",
    "untrained": "no training",
}


def compared_rows(probes: Mapping[str, Path]) -> list[Row]:
    """The rows of all finished probes of one data set, each with its difference to the adapted encoder.

    probes: name of an encoder -> folder of its probe."""
    rows: list[Row] = []
    for name in ENCODERS:
        if name in probes and (probes[name] / "probe.json").exists():
            rows += read_probe(probes[name] / "probe.json", name)[1]
    rows = [row for row in rows if row["control"] == "none"]
    if rows and rows[0]["name"] == AFTER:
        add_differences(rows)
    return rows


def label_tables(title: str, rows: Sequence[Row]) -> list[str]:
    """A table for each label set. The difference is that of the adapted encoder to the one of the line."""
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        members = [row for row in rows if row["label"] == label]
        first = members[0]
        unit = "R2" if first["metric"] == "R2" else f"{first['metric']}, %"
        head = f"{unit} of {first['n_test']} test samples, chance {first['chance']:.1f}"
        lines += [f"## {title}: {label}", "", f"{head}.", ""]
        lines += ["| encoder, frozen | value [95 %] | after less this [95 %, paired] |", "|---|---|---|"]
        n = decimals_of(first["metric"])
        for row in members:
            interval = f"[{row['low']:.{n}f}, {row['high']:.{n}f}]"
            lines.append(f"| {row['name']} | {row['value']:.{n}f} {interval} | {difference_text(row)} |")
        lines += ["", *verdict(members), ""]
    return lines


def gain(row: Row) -> tuple[float, float, float] | None:
    """By how much the adapted encoder is better than that of a row, and the ends of the interval."""
    if "difference" not in row:
        return None
    # 0 less the value, so that there is no minus zero
    return 0 - row["difference"], 0 - row["difference_high"], 0 - row["difference_low"]


def difference_text(row: Row) -> str:
    found = gain(row)
    return "" if found is None else f"{found[0]:+.1f} [{found[1]:+.1f}, {found[2]:+.1f}]"


def verdict(rows: Sequence[Row]) -> list[str]:
    """What the differences say, a line each."""
    texts = []
    for row in rows:
        if (found := gain(row)) is None:
            continue
        _, low, high = found
        word = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
        texts.append(f"{word} {IN_WORDS[row['name']]}")
    return [f"After adapting: {', '.join(texts)}."] if texts else []


def held_out_lines(log: Path, steps: int) -> list[str]:
    """How held-out error and spread of the features went, by the rows of a log.jsonl. steps: as planned."""
    rows = read_json_rows(log)
    measured = [row for row in rows if "val_loss" in row]
    if not measured:
        return []
    best = min(measured, key=error_of_row)
    lines = [f"held-out error: {error_text(rows[0], '_start')} before"]
    lines[0] += f", {error_text(best)} after step {best['step']}, the lowest of {len(measured)} measurements"
    by_rule = ", where it had not fallen for long enough" if rows[-1]["step"] < steps else ""
    lines[0] += f"; trained for {rows[-1]['step']} of {steps} steps{by_rule}"
    if "val_ratio" in best:
        lines.append("ratio: to the error of predicting the mean target at each place")
    spread = [row for row in rows if "feature_std_clips" in row]
    if spread:
        texts = [f"{row['feature_std_clips']:.2f}, rank {row['feature_rank']:.0f}" for row in spread]
        lines.append(f"spread of the features over clips: {texts[0]} at the start, {texts[-1]} at the end")
    return lines


def error_of_row(row: Mapping[str, Any]) -> float:
    """Infinite where the log has null, for what is not finite."""
    error = row.get("val_ratio", row["val_loss"])
    return math.inf if error is None else error


def error_text(row: Mapping[str, Any], suffix: str = "") -> str:
    loss = row[f"val_loss{suffix}"]
    ratio = row.get(f"val_ratio{suffix}")
    text = "not finite" if loss is None else f"{loss:.4f}"
    return text if ratio is None else f"{text} (ratio {ratio:.3f})"

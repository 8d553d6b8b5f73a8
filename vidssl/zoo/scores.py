"""Whether scores without labels order the encoders of a zoo as their accuracy does."""

from collections.abc import Mapping, Sequence

import numpy as np

from vidssl.evaluation.comparison import SCORES, Row, rank_correlation

RESAMPLES = 1000
MIN_ENCODERS = 4


def interval_over_runs(x: np.ndarray, y: np.ndarray, runs: Sequence[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the correlation. Runs are resampled, as a whole: their snapshots are
    alike."""
    rng = np.random.default_rng(0)
    names = sorted(set(runs))
    members = [np.flatnonzero([run == name for run in runs]) for name in names]
    found = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        found.append(rank_correlation(x[chosen], y[chosen]))
    finite = np.array(found)[np.isfinite(found)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def correlation_table(panels: Mapping[str, Sequence[Row]]) -> list[str]:
    """A line for each panel (title -> rows) and score: its correlation with the accuracy over all encoders,
    the untrained one included; none where too few have the score."""
    lines = []
    for title, rows in panels.items():
        plain = [row for row in rows if row["control"] == "none"]
        for score in SCORES:
            scored = [row for row in plain if row.get(score, "") != ""]
            runs = [f"{row['run']} {row['run_seed']}" for row in scored]
            if len(scored) < MIN_ENCODERS or len({row["samples"] for row in scored}) > 1:
                continue
            x, y = (np.array([row[key] for row in scored], float) for key in (score, "value"))
            low, high = interval_over_runs(x, y, runs)
            rho = f"{rank_correlation(x, y):+.2f} [{low:+.2f}, {high:+.2f}]"
            lines.append(f"| {title} | {score} | {rho} | {len(scored)} of {len(set(runs))} runs |")
    if not lines:
        return []
    return ["| panel | score | Spearman's rho, 95 % over runs | encoders |", "|---|---|---|---|", *lines]

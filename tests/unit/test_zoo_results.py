"""The tables of a zoo: final figures over seeds, and pairs with paired intervals."""

import json

import pytest

from vidssl.adaptation.table import label_tables
from vidssl.core.errors import UserError
from vidssl.evaluation.comparison import format_table
from vidssl.zoo.results import (
    accuracy_table,
    as_points,
    cell,
    final_rows,
    flops_by_step,
    ordered_pairs,
    pair_table,
)


def row(run: str, hits: list[int], seed: int = 0, step: int = 6, **more) -> dict:
    """A row as compare.py reads it; each test sample is a group."""
    value = 100 * sum(hits) / len(hits)
    samples = {(str(i), 0): (bool(hit), str(i)) for i, hit in enumerate(hits)}
    facts = {
        "label": "motion",
        "control": "none",
        "train_fraction": "",
        "seed": "",
        "metric": "top1",
        "chance": 10,
    }
    where = {"name": run, "run": run, "run_seed": seed, "step": step, "clips": 8 * step, "flops": 100 * step}
    figures = {"value": value, "low": value - 5, "high": value + 5, "n_test": len(hits), "hits": samples}
    return {**facts, **where, **figures, "rankme": 4.0 + seed, **more}


A = [1] * 30 + [0] * 10
B = [0] * 20 + [1] * 10 + [0] * 10


def test_the_better_of_two_comes_first_and_says_whether_that_is_decided():
    rows = [row("b", B), row("a", A), row("same", A[:29] + [0] + A[30:])]
    pairs = ordered_pairs(rows)
    assert [(p.better, p.other) for p in pairs] == [("a", "same"), ("a", "b"), ("same", "b")]
    assert [p.difference for p in pairs] == [2.5, 50.0, 47.5]
    lines = pair_table(rows)
    assert lines[2].startswith("| a - same | +2.5 | [+0.0, ") and lines[2].endswith("| undecided |")
    assert lines[3].endswith("| a is better |")


def test_the_interval_of_a_pair_holds_how_its_seeds_differ():
    alike = [row("a", A, 0), row("a", A, 1), row("b", B, 0), row("b", B, 1)]
    differing = [row("a", A, 0), row("a", B, 1), row("b", B, 0), row("b", B, 1)]
    (one,), (other,) = ordered_pairs(alike), ordered_pairs(differing)
    # A and B differ in 20 of 40 samples, which are resampled
    assert one.difference == 50.0 and 30 < one.low < 40 and 60 < one.high < 70
    assert other.difference == 25.0
    # in a quarter of the resamples both seeds of `a` are the one that equals `b`
    assert other.low == 0.0 and 55 < other.high < one.high
    assert (one.order, other.order) == ("a is better", "undecided")


def test_of_several_lists_of_one_seed_the_mean_is_compared():
    rows = [row("a", A), row("a", B), row("b", B)]
    (pair,) = ordered_pairs(rows)
    assert pair.difference == 25.0 and 15 < pair.low < 25 < pair.high < 35


def test_other_test_samples_are_refused():
    with pytest.raises(UserError, match="b: other test samples of 'motion' than another run"):
        ordered_pairs([row("a", A), row("b", B[:30])])


def test_metrics_without_hits_have_no_pairs():
    assert pair_table([row("a", A) | {"hits": {}}, row("b", B) | {"hits": {}}]) == []


def test_of_several_seeds_mean_and_deviation_are_shown():
    assert cell([row("a", A)]) == "75.0 [70.0, 80.0]"
    assert cell([row("a", A, 0), row("a", B, 1)]) == "50.0 ± 35.4 (2)"
    rows = [row("untrained", B, step=0), row("a", A, step=3), row("a", A), row("a", B, control="shuffled")]
    lines = accuracy_table(final_rows(rows))
    assert lines[0].startswith(
        "| encoder | unchanged clips | shuffled | chance | RankMe | steps | clips | FLOPs |"
    )
    assert lines[2] == "| a | 75.0 [70.0, 80.0] | 25.0 [20.0, 30.0] | 10.0 | 4.0 | 6 | 48 | 600 |"
    assert lines[3].startswith("| untrained | 25.0 [20.0, 30.0] |  | 10.0 |")


def test_tables_tell_an_r2_in_the_third_decimal():
    """R2 is a part of 1: with the decimals of percent 0.36 and 0.44 would be the same."""
    facts = {"metric": "R2", "chance": 0.0, "protocol": "linear"}
    found = [
        row(name, A, **facts) | {"value": value, "low": value - 0.02, "high": value + 0.02}
        for name, value in (("after", 0.365), ("before", 0.441))
    ]
    assert cell(found[:1]) == "0.365 [0.345, 0.385]" and cell(found) == "0.403 ± 0.054 (2)"
    lines = [format_table(found), *label_tables("own", found)]
    assert [any("0.441" in line and "0.461" in line for line in part) for part in (lines[:1], lines[1:])] == [
        True,
        True,
    ]


def test_points_of_a_curve_are_merged_over_seeds():
    rows = [row("a", A, 0, step=3), row("a", A, 0), row("a", B, 1)]
    assert [flops for flops, _ in as_points(rows, "value")] == [300, 600]
    assert as_points(rows, "rankme")[1][1] == pytest.approx(
        {"value": 4.5, "low": 3.793, "high": 5.207}, abs=1e-3
    )


def test_flops_are_summed_over_whole_rows(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "flops": 10 * step}) for step in (1, 2, 3)]
    lines.append(json.dumps({"step": 5, "steps": 2, "flops": 7}))
    log.write_text("\n".join(lines) + '\n{"step": 6, "fl')
    assert flops_by_step(log) == {1: 10, 2: 30, 3: 60, 5: 74}
    assert flops_by_step(tmp_path / "nothing") == {}

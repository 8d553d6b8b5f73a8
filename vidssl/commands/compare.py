r"""Compares probes: a table, differences with paired intervals, and a plot.

    vidssl compare A/probe.json B/probe.json ... \
        [--csv OUT.csv] [--plot OUT.png] [--names a b ...] [--rank]

The folder of each probe.json holds its predictions.csv. A difference is to the first probe's row of the same
label, control and fraction of train, sample by sample: groups of test samples are resampled for both
together, so that what is hard for both does not widen the interval. Rows of numbers or tags have no hits and
get no difference. What else than the encoder differs between the probes is listed below the table and the
plot; rows of different conditions share no bar.

--rank: Spearman's correlation, over three probes or more, of each label-free score of the mean tokens of
train (RankMe, alpha-ReQ, cluster learnability, dimension) with the metric on test; p: two-sided, by all
permutations of up to 7 probes, of more by 9,999 random ones.
"""

import argparse
from pathlib import Path

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder
from vidssl.core.tables import write_csv
from vidssl.evaluation.comparison import (
    CLIP_KEYS,
    COLUMNS,
    PLOT_SUFFIXES,
    add_differences,
    differing_conditions,
    draw_comparison,
    format_table,
    rank_lines,
    read_probe,
    short_names,
)
from vidssl.evaluation.controls import CONTROLS


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="compare", description=__doc__.split("\n")[0])
    p.add_argument("probes", nargs="+", type=Path)
    p.add_argument("--names", nargs="+", help="default: the parts of the paths that differ")
    p.add_argument("--csv", type=Path)
    p.add_argument("--plot", type=Path)
    p.add_argument("--rank", action="store_true", help="correlate label-free scores with the metric on test")
    a = p.parse_args(argv)
    if missing := [path for path in a.probes if not path.exists()]:
        raise UserError(f"{missing[0]}: no such file; give the probe.json of a probe, or its folder")
    paths = [path / "probe.json" if path.is_dir() else path for path in a.probes]
    names = a.names or short_names(paths)
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UserError(f"{len(paths)} probes need as many different --names, not {names}")
    if a.plot and a.plot.suffix not in PLOT_SUFFIXES:
        raise UserError(f"--plot {a.plot}: give a file name that ends in .png, .pdf or .svg")
    for file in (a.csv, a.plot):
        if file:
            check_writable(file.parent)
            make_folder(file.parent)
    probes = [read_probe(path, name) for path, name in zip(paths, names, strict=True)]
    if len({data for data, *_ in probes}) > 1:
        raise UserError("these probes were tested on different data (data.test differs): nothing to compare")
    differing = differing_conditions(dict(zip(names, (found for *_, found in probes), strict=True)))
    rows = [row for _, probe_rows, _ in probes for row in probe_rows]
    for row in rows:
        row["conditions"] = ", ".join(f"{key} {values[row['name']]}" for key, values in differing.items())
    rows.sort(key=lambda r: (r["label"], r["train_fraction"], r["seed"], CONTROLS.index(r["control"])))
    add_differences(rows)
    print(format_table(rows))
    conditions = "; ".join(
        f"{key}: {', '.join(f'{name} {value}' for name, value in values.items())}"
        for key, values in differing.items()
    )
    if conditions:
        conditions = f"These probes differ in more than the encoder: {conditions}"
        print("\n" + conditions)
    if a.csv:
        write_csv(a.csv, COLUMNS, ([row.get(name) for name in COLUMNS] for row in rows))
    if a.plot:
        draw_comparison(rows, a.plot, conditions)
    if a.rank:
        if heads := [key for key in differing if key not in CLIP_KEYS]:
            raise UserError(f"--rank: these probes differ in {', '.join(heads)}: no ranking of encoders")
        print("\n" + "\n".join(rank_lines(rows)))


if __name__ == "__main__":
    run_cli(main)

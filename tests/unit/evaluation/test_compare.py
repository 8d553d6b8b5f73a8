"""vidssl compare on written reports: names, conditions that differ, bars and files."""

import csv
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from vidssl.commands import compare
from vidssl.core import tables
from vidssl.core.errors import UserError
from vidssl.evaluation.comparison import common_lists, hits_of, read_probe, short_names
from vidssl.evaluation.dense import datasets
from vidssl.evaluation.embedding_files import read_embedding
from vidssl.report.evaluations import Evaluation, read_predictions

LISTS = (0, 1)  # seeds of the low-shot lists


def write_probe(folder: Path, base: float, fractions=(None, 0.2, 0.5), seeds=LISTS, **conditions) -> Path:
    """A report of values base + 10 * fraction + seed; conditions: of the configuration, or train_hash."""
    folder.mkdir(parents=True)
    runs = [(None, None)] if None in fractions else []
    runs += [(f, seed) for f in fractions if f for seed in seeds]
    results = []
    for fraction, seed in runs:
        value = base + 10 * (fraction or 1) + (seed or 0)
        facts = {"train_fraction": fraction, "list_seed": seed} if fraction else {}
        result = {"label": "x", "control": "none", "protocol": "knn", "metric": "top1", "value": value}
        results.append({**result, "ci95": [value - 5, value + 5], "chance": 10.0, "n_test": 2, **facts})
    columns = ("label", "control", "train_fraction", "seed", "key", "group", "truth", "predicted", "outputs")
    with open(folder / "predictions.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        for fraction, seed in runs:
            run = ("x", "none", f"{fraction:g}" if fraction else "", "" if seed is None else seed)
            writer.writerows((*run, key, "", "a", "a", "") for key in ("k0", "k1"))
    train_hash = conditions.pop("train_hash", "same")
    config = {"encoder": str(folder), "out": str(folder), "data": {"train": [str(folder)], "frames": None}}
    config["probe"] = {"segments": 1, "k": [5], "workers": 2}
    for key, value in conditions.items():
        section, name = key.split("__")
        config[section][name] = value
    scores = {"none": {"rankme": base, "alpha": 1.0, "samples": 9}}
    report = {"results": results, "data": {"train": train_hash, "test": "t"}, "label_free": scores}
    (folder / "probe.json").write_text(json.dumps({**report, "config": config}))
    return folder / "probe.json"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["A/probe", "B/probe"], ["A", "B"]),
        (["A", "B"], ["A", "B"]),
        (["run/A/p1", "run/B/p2"], ["p1", "p2"]),
        (["A/x/probe", "A/y/probe", "B/x/probe"], ["A/x", "A/y", "B/x"]),
        (["A/probe", "C/deep/probe"], ["A", "C/deep"]),
        (["A", "A/probe"], ["A", "probe"]),
    ],
)
def test_names_are_the_parts_of_the_paths_that_differ(tmp_path, paths, names):
    assert short_names([tmp_path / path / "probe.json" for path in paths]) == names


def test_bars_hold_rows_of_one_condition(tmp_path, monkeypatch):
    """Fractions have panels of their own; only lists of one fraction and one probe are averaged."""
    drawn: dict[str, list[float]] = {}
    bar = Axes.bar

    def recording(axis, places, heights, *args, **kwargs):
        drawn[axis] = np.asarray(heights).tolist()
        return bar(axis, places, heights, *args, **kwargs)

    monkeypatch.setattr(Axes, "bar", recording)
    probes = [write_probe(tmp_path / n / "probe", base) for n, base in (("A", 20), ("B", 40))]
    compare.main([*map(str, probes), f"--plot={tmp_path / 'no' / 'folder' / 'c.png'}"])
    assert (tmp_path / "no/folder/c.png").stat().st_size > 5000
    panels = {axis.get_title().split("\n")[0]: heights for axis, heights in drawn.items()}
    assert panels == {
        "x, all of train": [30, 50],
        "x, 0.2 of train": [22.5, 42.5],
        "x, 0.5 of train": [25.5, 45.5],
    }
    assert all("none" not in text for axis in drawn for text in axis.get_legend_handles_labels()[1])


def test_lists_that_a_probe_lacks_are_not_averaged_in_the_others(tmp_path):
    rows = [
        row
        for name, seeds in (("A", (0, 1, 2)), ("B", (1, 2)))
        for row in read_probe(write_probe(tmp_path / name, 20, (0.2,), seeds), name)[1]
    ]
    assert sorted((r["name"], r["seed"]) for r in common_lists(rows)) == [
        ("A", "1"), ("A", "2"), ("B", "1"), ("B", "2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"probe__segments": 2}, "probe.segments: A 1, B 2"),
        ({"probe__k": [1]}, "probe.k: A [5], B [1]"),
        ({"data__frames": 8}, "data.frames: A None, B 8"),
        ({"data__fps": 8.0}, "data.fps: A -, B 8.0"),
        ({"train_hash": "other"}, "train data: A same, B other"),
        ({"probe__workers": 9}, None),  # changes no figure
        ({}, None),
    ],
)
def test_what_differs_beside_the_encoder_is_said(tmp_path, capsys, condition, said):
    probes = [write_probe(tmp_path / "A", 20), write_probe(tmp_path / "B", 30, **condition)]
    probes.append(write_probe(tmp_path / "C", 40))
    table = tmp_path / "c.csv"
    compare.main([*map(str, probes[:2]), f"--csv={table}"])
    out = capsys.readouterr().out
    assert ("differ in more than the encoder" in out) == bool(said) and (said or "") in out
    with open(table, newline="") as f:
        conditions = {(row["name"], row["conditions"]) for row in csv.DictReader(f)}
    assert all(bool(text) == bool(said) for _, text in conditions) and len(conditions) == 2
    if said and "data." not in said:
        with pytest.raises(UserError, match="these probes differ in"):
            compare.main([*map(str, probes), "--rank"])


@pytest.mark.parametrize("option", ["--plot", "--csv"])
def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path, option):
    probe = write_probe(tmp_path / "A", 20)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        compare.main([str(probe), option, str(tmp_path / "file" / "x.png")])


def test_an_unknown_kind_of_picture_is_said(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.png"):
        compare.main([str(write_probe(tmp_path / "A", 20)), f"--plot={tmp_path / 'new' / 'x.nope'}"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option, name", [("--csv", "x.csv"), ("--plot", "x.png")])
def test_what_cannot_be_written_leaves_the_file_of_before(tmp_path, monkeypatch, option, name):
    probe = write_probe(tmp_path / "A", 20)
    (tmp_path / name).write_text("before")
    monkeypatch.setattr("vidssl.core.io.fsync_path", full_disk)
    with pytest.raises(OSError, match="No space"):
        compare.main([str(probe), option, str(tmp_path / name)])
    assert (tmp_path / name).read_text() == "before"
    assert not list(tmp_path.glob("*.tmp"))


def full_disk(_):
    raise OSError(errno.ENOSPC, "No space left on device")


ROWS_OF_KEYS = (("0", ""), ("1", ""), ("0", ""), ("2", "g"), ("2", "g"), ("0", ""))


def test_rows_of_one_key_without_a_group_are_alone():
    rows = [{"key": key, "group": group, "truth": "a", "predicted": "a"} for key, group in ROWS_OF_KEYS]
    groups = [group for _, group in hits_of(rows).values()]
    assert groups == ["sample 0", "sample 1", "sample 0 1", "g", "g", "sample 0 2"]


@pytest.fixture
def cell_limit(monkeypatch):
    """Sets the characters of a cell that read_table takes, so that a short file is damaged to it."""
    before = csv.field_size_limit()
    yield lambda number: monkeypatch.setattr(tables, "MAX_CELL", number)
    csv.field_size_limit(before)


def write_outputs(folder: Path, classes: int) -> Path:
    """A probe whose `outputs` have so many numbers."""
    probe = write_probe(folder, 20, fractions=(None,))
    text = probe.with_name("predictions.csv").read_text()
    rows = [f"{line.rstrip(',')},{' '.join(['-1.234'] * classes)}" for line in text.splitlines()[1:]]
    probe.with_name("predictions.csv").write_text("\n".join([text.splitlines()[0], *rows]) + "\n")
    return probe


@pytest.mark.parametrize("classes", [3, 21_000, 40_000])
def test_outputs_of_many_classes_are_read(classes, tmp_path, cell_limit, capsys):
    csv.field_size_limit(131_072)
    probe = write_outputs(tmp_path / "A", classes)
    compare.main([str(probe), str(write_outputs(tmp_path / "B", classes))])
    assert "+0.00" in capsys.readouterr().out
    missing: list[str] = []
    csv.field_size_limit(131_072)
    evaluation = Evaluation("A", probe, {}, None, False)
    (found,) = read_predictions(evaluation, missing).values()
    assert [len(row["outputs"].split()) for row in found] == [classes] * 2 and not missing


def test_a_damaged_table_is_one_line(tmp_path, cell_limit):
    probe = write_outputs(tmp_path / "A", 100)
    cell_limit(50)
    with pytest.raises(UserError, match=r"predictions\.csv: damaged \(field larger .*run the probe again$"):
        compare.main([str(probe)])
    (tmp_path / "labels.csv").write_text("path,split\n" + "x" * 99 + ",train\n")
    with pytest.raises(UserError, match=r"labels\.csv: not a csv file \(field larger"):
        datasets.synthetic("masks", tmp_path, "train")
    (tmp_path / "nyu2_train.csv").write_bytes(b"\xff\xfe,b\n")
    with pytest.raises(UserError, match=r"nyu2_train\.csv: not a csv file \("):
        datasets.nyu(tmp_path, "train")
    (tmp_path / "embedding.json").write_text(json.dumps({"format": "npy", "shape": [1], "dtype": "float32"}))
    (tmp_path / "rows.csv").write_text("key,start,end\n" + "x" * 99 + ",0,1\n")
    with pytest.raises(UserError, match=r"damaged \(field larger .*run vidssl embed again"):
        read_embedding(tmp_path)

"""data_prep.report: outliers, images without a frame rate, samples per class."""

import json

import pytest

from data_prep.index import read_contents
from data_prep.report import histogram, make_figure, make_report


@pytest.mark.parametrize("usual", [[25.0] * 200, [24.0, 25.0, 29.97, 30.0] * 50])
@pytest.mark.parametrize("outliers", [[], [90_000.0], [1e-3, 1000.0]])
def test_outliers_do_not_flatten_a_histogram(usual, outliers):
    found = histogram(usual + outliers)
    assert sum(found["counts"]) == len(usual + outliers) and found["outliers"] == len(outliers)
    assert (found["min"], found["max"]) == (min(usual + outliers), max(usual + outliers))
    assert found["edges"][0] >= min(usual) - 0.5 and found["edges"][-1] <= max(usual) + 0.5


def test_a_wide_range_without_outliers_is_kept():
    found = histogram([float(i * i) for i in range(100)])
    assert found["outliers"] == 0 and (found["edges"][0], found["edges"][-1]) == (0.0, 99.0**2)


@pytest.mark.parametrize("frames, timed", [(1, []), (20, ["frames a second", "seconds"])])
@pytest.mark.parametrize("classes", [3, 40])
def test_panels_are_those_of_facts_that_there_are(tmp_path, write_index, frames, timed, classes):
    sizes = [5] + [2] * (classes - 2) + [1]
    ext = "mp4" if frames > 1 else "jpg"
    facts = {"frames": frames, "fps": 25.0, "duration": frames / 25, "codec": ext, "height": 4, "width": 6}
    metas = [{"labels": {"label": i}, **facts} for i, size in enumerate(sizes) for _ in range(size)]
    names = {"label": [f"class_{i}" for i in range(classes)]}
    report = make_report(read_contents(write_index(tmp_path / "a", ext, metas, names)))
    json.dumps(report, allow_nan=False)
    assert list(report["classes"]["label"].values()) == sizes
    figure = make_figure(report)
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert labels[: len(timed)] == timed and "" not in labels
    (panel,) = (axis for axis in figure.axes if axis.get_xlabel().startswith("samples per class"))
    texts = [text.get_text() for text in panel.texts]
    if classes > 16:
        assert texts == ["largest: class_0 (5)\nsmallest: class_39 (1)"]
    else:
        assert texts == ["5", "2", "1"] and panel.get_yticklabels()[0].get_text() == "class_0"

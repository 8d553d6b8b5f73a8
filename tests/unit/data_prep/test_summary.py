"""data_prep.summary, and what pack says of filters."""

import json

import pytest

from data_prep import pack
from data_prep.sources import read_source
from data_prep.summary import UNREAD_IMAGES, UNREAD_VIDEOS, Tally, left_out_lines, make_summary, summary_lines
from vidssl.core.errors import UserError
from vidssl.data.extensions import MEDIA_EXTENSIONS

CLASSES = {"verb": ["close", "open", "push"], "noun": ["7", "8"]}


def record(key: str, ext: str = "mp4", verb: int = -1, group: str | None = None, **meta) -> dict:
    labels = {"verb": verb} if verb >= 0 else {}
    return {"key": key, "ext": ext, "meta": {"labels": labels, "group": group, **meta}}


def test_counts_of_a_summary():
    records = [record(f"o{i}", verb=1, group="g") for i in range(3)]
    records += [record("c", "jpg", 0, "h"), record("n1", "gif"), record("n2", source="a/n2.mp4")]
    records[0]["meta"]["time_repairs"] = {"doubled": 2}
    records[1]["meta"]["original"] = {"time_repairs": {"doubled": 1}}
    left_out = Tally()
    for i in range(5):
        left_out.note("not_a_video", f"bad{i}.mp4")
    summary = make_summary(records, CLASSES, left_out)
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["samples"], summary["videos"], summary["images"]) == (6, 5, 1)
    assert summary["classes"] == {"verb": {"close": 1, "open": 3, "push": 0}, "noun": {"7": 0, "8": 0}}
    assert summary["unlabelled"]["verb"] == {"files": 2, "examples": ["n1", "a/n2.mp4"]}
    assert (summary["groups"], summary["largest_group"], summary["without_group"]) == (2, 3, 2)
    assert summary["time_repairs"] == {"doubled": {"files": 3, "examples": ["o0", "o1"]}}
    assert summary["left_out"] == {
        "not_a_video": {"files": 5, "examples": ["bad0.mp4", "bad1.mp4", "bad2.mp4"]}
    }
    lines = list(summary_lines(summary))
    assert lines == [
        "  5 videos, 1 image",
        "  verb: 3 classes, largest open (3), smallest close (1); 1 without a sample, such as push",
        "  noun: 2 classes, none with a sample",
        "  without verb: 2 samples (n1, a/n2.mp4)",
        "  without noun: 6 samples (o0, o1, o2, ...)",
        "  groups: 2, the largest of 3 samples; 2 samples in none",
        "  time stamps doubled: 3 (o0, o1, ...)",
        "  left out, not_a_video: 5 (bad0.mp4, bad1.mp4, bad2.mp4, ...)",
    ]


def test_samples_without_labels_are_not_silent():
    lines = list(summary_lines(make_summary([record("a")], {}, {})))
    assert lines == ["  1 video, 0 images", "  no classes: no sample has a label"]


def test_media_that_are_not_read_are_always_said():
    assert not (UNREAD_IMAGES | UNREAD_VIDEOS) & set(MEDIA_EXTENSIONS)
    tally = Tally({f".x{i}": 9 for i in range(30)})
    tally.note(".HEIC", "a/b.HEIC")
    tally.note(".tiff", "c.tiff")
    tally.note(".mxf", "d.mxf")
    lines = list(left_out_lines(tally.entries()))
    assert "  left out, .HEIC (images that are not read; convert them to .jpg or .png): 1 (a/b.HEIC)" in lines
    assert "  left out, .tiff (images that are not read; convert them to .jpg or .png): 1 (c.tiff)" in lines
    assert "  left out, .mxf (videos that are not read; convert them to .mp4): 1 (d.mxf)" in lines
    assert lines[-1] == "  left out for 18 more reasons: see summary.json" and len(lines) == 16


def test_names_are_printed_in_one_line():
    tally = Tally()
    tally.note("(x)", "a\nb\x1b[31m\udce9.mp4")
    assert tally.entries()["(x)"]["examples"] == ["a\\nb\\x1b[31m\\xe9.mp4"]


def test_merged_tallies_keep_their_names():
    tally = Tally({".txt": 2})
    other = Tally()
    other.note(".txt", "a.txt")
    tally.merge(other)
    assert tally.entries() == {".txt": {"files": 3, "examples": ["a.txt"]}}


def test_sources_give_examples_of_ignored_files(tmp_path):
    for name in ("a/1.mp4", "a/2.heic", "a/3.avif", "notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert read_source(tmp_path).ignored.entries() == {
        "(no extension)": {"files": 1, "examples": ["notes"]},
        ".avif": {"files": 1, "examples": ["a/3.avif"]},
        ".heic": {"files": 1, "examples": ["a/2.heic"]},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, said",
    [
        (["--min-seconds", "99"], "--min-seconds 99 drops 4"),
        (["--min-side", "500"], "--min-side 500 drops 4"),
        (["--drop-dark", "255"], "--drop-dark 255 drops 4"),
        (["--drop-static", "200"], "--drop-static 200 drops 4"),
    ],
)
def test_a_filter_that_drops_everything_is_named(tmp_path, make_video, options, said):
    for i in range(4):
        (tmp_path / f"src/{i}").mkdir(parents=True)
        (tmp_path / f"src/{i}/v.mp4").write_bytes(make_video(2 + i))
    with pytest.raises(UserError, match=said):
        pack.main([str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1", *options])


@pytest.mark.parametrize(
    "labels, classes, line",
    [
        ([0, 1, 0, 1], 2, "2 classes of 2 samples each"),
        ([0, 0], 1, "1 class of 2 samples"),
        ([0, 1], 3, "3 classes, 2 of them of 1 sample each; 1 without a sample, such as 2"),
        ([0, 0, 1], 2, "2 classes, largest 0 (2), smallest 1 (1)"),
    ],
)
def test_classes_of_equal_size_are_said_so(labels, classes, line):
    records = [{"key": "k", "ext": "mp4", "meta": {"labels": {"label": label}}} for label in labels]
    summary = make_summary(records, {"label": [str(i) for i in range(classes)]}, {})
    assert f"  label: {line}" in list(summary_lines(summary))

"""The page of data sets: figures of their own files, clips, rejected files, copies in and between them."""

import json

import numpy as np
import pytest
from films import encode, film
from report_runs import HOSTILE
from server import serving
from shards_by_hand import merge_shards, write_shards

from data_prep import sample_search
from data_prep.sample_search import SEARCHED_PIXELS, choose_searched, search_samples
from data_prep.workers import reject_on_error, rejected_or_partial
from vidssl.commands import report as command
from vidssl.core.errors import UserError
from vidssl.data.format import Sample
from vidssl.data.isolation import Failure
from vidssl.report import data_pictures, data_sets, page
from vidssl.report.data_pictures import DataPictures, spread_over_classes
from vidssl.report.data_sets import find_sets, make_data_contents, rejected_rows

CLASSES = {"move": ["clap", HOSTILE]}
META = {"width": 128, "height": 96, "fps": 24.0, "codec": "h264", "decoder": "pyav", "rotation": 0}


class InlinePool:
    """WorkerPool without child processes."""

    def __init__(self, work, timeout_s):
        self.work = work

    def progress(self):
        """A Reporter's."""

    def map(self, jobs, workers, title, unit):
        results = [reject_on_error(self.work, self, *job) for job in jobs]
        return [rejected_or_partial(r) if isinstance(r, Failure) else r for r in results]

    def close(self):
        """Nothing was started."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with `shards` (train: a film, a smaller copy of it, another film; test: a smaller copy of
    that, and a film of its own), and `source` with a dropped duplicate, a dark clip and a text."""
    root = tmp_path_factory.mktemp("data_page")
    one, two, three = film(1, 2.0), film(2, 2.5), film(3, 2.0)
    files = {name: encode(frames) for name, frames in (("one", one), ("two", two), ("three", three))}
    copy, leak = encode(one, (96, 72), crf=24), encode(two, (112, 84), every=2)

    def meta(frames, label, group, rate=24):
        length = {"frames": frames, "duration": frames / rate, "fps": float(rate), "group": group}
        return {**META, **length, "labels": {"move": label}, "source": f"films/{group}.mp4"}

    train = {"one": (files["one"], meta(48, 0, "a")), "copy": (copy, meta(48, 0, "b"))}
    train["two"] = (files["two"], meta(60, 1, "c"))
    rejected = [
        {"path": "same.mp4", "reason": "duplicate", "detail": "the same bytes as one.mp4", "value": 0},
        {"path": "dark.mp4", "reason": "too_dark", "detail": "mean luma 3.00, under 16", "value": 3.0},
        {"path": "text.mp4", "reason": "not_a_video", "detail": ""},
        {"path": "../one.mp4", "reason": "not_a_video", "detail": "elsewhere"},
    ]
    write_shards(root / "shards" / "train", train, CLASSES, rejected)
    test = {"leak": (leak, meta(30, 0, "c", 12)), "three": (files["three"], meta(48, 0, "d"))}
    write_shards(root / "shards" / "test", test, CLASSES)
    (root / "source").mkdir()
    dark = encode((film(4, 0.5) * 0.1).astype(np.uint8))
    written = {"one": files["one"], "same": files["one"], "dark": dark, "text": b"no video"}
    for name, data in written.items():
        (root / "source" / f"{name}.mp4").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def contents(corpus):
    draw = DataPictures(source=corpus / "source")
    with pytest.MonkeyPatch.context() as patch:
        for module in (sample_search, data_pictures):
            patch.setattr(module, "WorkerPool", InlinePool)
        return make_data_contents([corpus / "shards"], ["vidssl", "report"], draw)


def verdict(verdicts, word):
    (found,) = [one for one in verdicts if word in one["question"]]
    return found


def test_figures_are_those_of_the_files(contents):
    train, test = contents["sets"]
    assert (train["name"], test["name"]) == ("train", "test")
    assert dict(train["facts"])["holds"] == "3 videos of 3 files"
    assert contents["data"][0]["report"]["classes"] == {"move": {"clap": 2, HOSTILE: 1}}
    assert verdict(train["verdicts"], "left out")["answer"] == "4 files or clips, 57%"
    assert "1 without a sample" in verdict(test["verdicts"], "like size")["why"]
    assert HOSTILE in verdict(contents["between"], "same classes")["why"]
    shared = verdict(contents["between"], "recordings")
    assert shared["kind"] == "bad" and "1 group in train and test (c)" in shared["why"]
    assert any("summary.json" in text for text in train["missing"])
    reasons = {row["reason"]: row["n"] for row in contents["rejected"]}
    assert reasons == {"not_a_video": 2, "duplicate": 1, "too_dark": 1}
    json.dumps(contents, allow_nan=False)


def test_clips_play_and_copies_stand_side_by_side(contents):
    groups = {group["id"]: group for group in contents["pictures"]}
    clips = groups["clips"]["items"]
    assert [len(one["rows"]) for one in clips] == [3, 2] and clips[0]["frames"] == 12
    assert {row["label"] for row in clips[0]["rows"]} == {"clap", HOSTILE}
    assert "128×96, 24 fps" in clips[0]["rows"][0]["note"]
    dropped, found = groups["duplicates"]["items"]
    assert dropped["title"] == "Dropped by pack: the same bytes"
    assert [row["label"] for row in dropped["rows"]] == ["kept", "dropped"]
    assert found["title"].startswith("correlation") and len(found["rows"]) == 2
    assert verdict(contents["sets"][0]["verdicts"], "twice")["answer"] == "Yes, 1 pair"
    assert verdict(contents["sets"][1]["verdicts"], "twice")["answer"] == "No"
    (leak,) = groups["leaks"]["items"]
    assert [row["label"].split(":")[0] for row in leak["rows"]] == ["train", "test"]
    assert len({row["frames"] for row in leak["rows"]}) == 1
    assert verdict(contents["between"], "in another")["answer"] == "Yes, 1 pair"
    # The text does not decode, and a path out of the folder is not opened
    (dark,) = groups["rejected-files"]["items"]
    assert dark["title"] == "too_dark" and len(dark["rows"]) == 1


def test_clips_are_spread_over_classes_and_each_class():
    def samples(number, classes):
        return [Sample(str(i), "mp4", 0, i, 1, {"labels": {"move": i % classes}}) for i in range(number)]

    alone = [one.offset for one in spread_over_classes(samples(1000, 1), 3)]
    assert alone == [500, 250, 750]
    of_classes = spread_over_classes(samples(12_000, 60), 48)
    assert len({one.meta["labels"]["move"] for one in of_classes}) == 48
    assert {one.offset // 2000 for one in of_classes} == set(range(6))
    assert {one.key for one in spread_over_classes(samples(77, 5), 77)} == set(map(str, range(77)))


def test_a_search_is_bounded_and_says_of_what(corpus, monkeypatch):
    monkeypatch.setattr(sample_search, "WorkerPool", InlinePool)
    sets = {one.name: one for one in find_sets([corpus / "shards"])}
    shards = {name: one.shards for name, one in sets.items()}
    samples = {name: one.samples for name, one in sets.items()}
    film_pixels = 48 * 96 * 128 + sample_search.OPENING_PIXELS
    found = search_samples(shards, samples, 1, pixels=2.5 * film_pixels)
    assert sum(found.searched.values()) == 2
    undecided = search_samples(shards, samples, 1, compared_pixels=0)
    assert undecided.pairs == [] and undecided.undecided >= 2
    twins = [one._replace(size=7) for one in samples["train"][1:]]
    chosen = choose_searched({"train": [samples["train"][0], *twins]}, 2.3 * film_pixels)
    assert {one.size for one in chosen["train"]} == {7}
    # What opening takes counts too: of 10,000 small videos not all are searched
    small = [one._replace(meta={"frames": 8, "height": 16, "width": 16}) for one in samples["train"]]
    assert 0 < len(choose_searched({"train": small * 4000}, SEARCHED_PIXELS)["train"]) < 10_000


def test_a_remote_set_is_read_and_some_of_its_shards_are_opened(tmp_path, monkeypatch, corpus):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data_sets, "FETCHED_BYTES", 1)
    for module in (sample_search, data_pictures):
        monkeypatch.setattr(module, "WorkerPool", InlinePool)
    shards = tmp_path / "set"
    films = [corpus / "shards" / "train", corpus / "shards" / "test"]
    merge_shards(shards, films)
    with serving(tmp_path) as server:
        url = server.url("set?signature=secret")
        contents = make_data_contents([url], ["vidssl", "report", url], DataPictures())
        assert server.times_asked(".tar") == 1
    (one,) = contents["sets"]
    assert one["name"] == "set" and "1 shard of 2" in " ".join(one["missing"])
    assert dict(one["facts"])["holds"] == "5 videos of 4 files"
    assert [len(item["rows"]) for item in contents["pictures"][0]["items"]] == [3]
    (copies,) = [group for group in contents["pictures"] if group["id"] == "duplicates"]
    assert "3 of 5 of set" in copies["about"]
    assert "secret" not in json.dumps(contents)


def test_a_scanned_set_and_one_without_samples(tmp_path, corpus):
    scanned = tmp_path / "scanned"
    write_shards(scanned, {"a": (b"x", {"label": 0, "labels": {"label": 0}})}, {"label": ["a"]})
    index = json.loads((scanned / "index.json").read_text())
    empty = {**index, "shards": [], "samples": 0, "checksum": None}
    (tmp_path / "empty").mkdir()
    del empty["checksum"]
    (tmp_path / "empty" / "index.json").write_text(json.dumps(empty))
    one, none = find_sets([scanned, tmp_path / "empty"])
    assert one.size == 1 and none.size == 0 and none.shards is None
    assert rejected_rows(none) == []
    with pytest.raises(UserError, match=r"no index\.json"):
        find_sets([corpus / "source"])


def test_the_command_writes_a_page_of_shards(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, "plotly_script", lambda: "/* plotly */")
    out = tmp_path / "data.html"
    command.main([str(corpus / "shards"), "--no-pictures", "-o", str(out)])
    assert "2 data sets" in capsys.readouterr().out and "<script>alert" not in out.read_text()
    for wrong, words in (
        (["--source", str(tmp_path / "none")], "no such folder"),
        (["--watch"], "shards do not change"),
    ):
        with pytest.raises(UserError, match=words):
            command.main([str(corpus / "shards"), "-o", str(out), *wrong])

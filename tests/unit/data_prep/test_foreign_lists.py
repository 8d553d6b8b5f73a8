"""Lists and folders of others: which file a name means, what is no class, and what is said of it."""

import json
import unicodedata
from pathlib import Path

import pytest

from data_prep.packing import classes_without_train, groups_of_train
from data_prep.sources import FolderOptions, SourceListing, read_source
from data_prep.sources.names import numbered_series
from data_prep.summary import is_cut_short
from vidssl.commands.embed import list_media
from vidssl.core.errors import UserError


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def splits_of(source: SourceListing) -> dict[str, str | None]:
    return {item.path: item.split for item in source.items}


# Files by name
def kinetics(root: Path) -> SourceListing:
    rows = ("a,bbbbbbbbbbb,0,10", "a,ccccccccccc,0,10")
    for split in ("train", "val"):
        text = "label,youtube_id,time_start,time_end\n" + "\n".join(rows)
        (root / f"{split}.csv").write_text(text)
    return read_source(root, "kinetics", [root / "train.csv", root / "val.csv"])


def something(root: Path) -> SourceListing:
    for split in ("train", "validation"):
        entries = [{"id": name, "template": "x"} for name in ("bbbbbbbbbbb", "ccccccccccc")]
        (root / f"{split}.json").write_text(json.dumps(entries))
    return read_source(root, "ssv2", [root / "train.json", root / "validation.json"])


def jester(root: Path) -> SourceListing:
    for split in ("train", "validation"):
        (root / f"{split}.csv").write_text("bbbbbbbbbbb;x\nccccccccccc;x\n")
    return read_source(root, "jester", [root / "train.csv", root / "validation.csv"])


def unlabelled(root: Path) -> SourceListing:
    for split in ("training", "validation"):
        (root / f"{split}.csv").write_text("video_id\nbbbbbbbbbbb\nccccccccccc\n")
    return read_source(root, "unlabelled", [root / "training.csv", root / "validation.csv"])


@pytest.mark.parametrize("read", [kinetics, something, jester, unlabelled])
@pytest.mark.parametrize(
    "folders", [("train", "val"), ("videos/Train", "videos/Validation"), ("k_train", "k_val")]
)
def test_a_name_means_the_file_in_the_folder_of_its_split(read, folders, tmp_path):
    names = [f"{folder}/{name}.mp4" for folder in folders for name in ("bbbbbbbbbbb", "ccccccccccc")]
    source = read(fill(tmp_path, *names))
    assert splits_of(source) == dict(zip(names, ["train", "train", "val", "val"], strict=True))
    # The lists in the folder are read and no files that are left out
    assert not source.ignored and not any("several files" in note for note in source.notes)


@pytest.mark.parametrize(
    "kind, name, text",
    [
        ("unlabelled", "l.csv", "video_id\nb\nc\n"),
        ("ssv2", "train.json", '[{"id": "b", "template": "x"}, {"id": "c", "template": "x"}]'),
        ("jester", "train.csv", "b;x\nc;x\n"),
    ],
)
def test_names_of_several_files_are_said(kind, name, text, tmp_path):
    (fill(tmp_path, "240/b.mp4", "480/b.mp4", "240/c.mp4", "480/d.mp4") / name).write_text(text)
    source = read_source(tmp_path, kind, [tmp_path / name])
    assert [item.path for item in source.items] == ["240/b.mp4", "240/c.mp4"]
    note = "1 name with several files: the first by path is taken, such as 240/b.mp4 and not 480/b.mp4"
    assert note in source.notes
    assert source.ignored == {"(another file of this name is taken)": 1, "(not in the annotations)": 1}


@pytest.mark.parametrize("on_disk, listed", [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "unlabelled", "video_id"])
def test_accents_are_found_in_either_form(kind, on_disk, listed, tmp_path):
    stored, named = (unicodedata.normalize(form, "caf\u00e9 \u00fc") for form in (on_disk, listed))
    fill(tmp_path / "v", f"{stored}.mp4")
    text = {
        "csv": f"path,label\n{named}.mp4,x\n",
        "jsonl": json.dumps({"path": f"{named}.mp4", "label": "x"}),
        "unlabelled": f"{named}.mp4\n",
        "video_id": f"video_id\n{named}\n",
    }[kind]
    file = tmp_path / {"video_id": "l.csv", "unlabelled": "l.txt"}.get(kind, f"l.{kind}")
    file.write_text(text, encoding="utf-8")
    source = read_source(tmp_path / "v", "unlabelled" if kind == "video_id" else kind, [file])
    assert [item.path for item in source.items] == [f"{stored}.mp4"] and not source.rejected


# Lists of another form
@pytest.mark.parametrize(
    "kind, text, line",
    [
        ("csv", "v/a.mp4 0\nv/b.mp4 1\n", "its first line is no header: put one above it"),
        ("csv", "v/a.mp4,0\n", "its first line is no header"),
        ("csv", "path;label\nv/a.mp4;0\n", "separate columns by commas"),
        ("csv", "path\tlabel\nv/a.mp4\t0\n", "separate columns by commas"),
        ("csv", "path,label\nv\\a.mp4,0\n", "folders are separated by /"),
        ("unlabelled", "v/a.mp4 0\nv/b.mp4 1\n", "a line holds more than a path"),
        ("unlabelled", "v/a.mp4,0\n", "a line holds more than a path"),
        ("unlabelled", "v\\a.mp4\n", "folders are separated by /"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(kind, text, line, tmp_path):
    fill(tmp_path, "v/a.mp4", "v/b.mp4")
    file = tmp_path / ("l.csv" if kind == "csv" else "l.txt")
    file.write_text(text)
    with pytest.raises(UserError, match=line):
        read_source(tmp_path, kind, [file])


# Classes
@pytest.mark.parametrize("folder", ["images", "videos", "data", "clips"])
def test_the_folder_that_holds_the_files_of_a_split_is_no_class(folder, tmp_path):
    """Tiny ImageNet: val/images/val_0.JPEG beside train/n01443537/images."""
    train = [f"train/{c}/{folder}/{c}{i}.mp4" for c in ("n1", "n2") for i in range(2)]
    source = read_source(fill(tmp_path, *train, f"val/{folder}/v.mp4", "test/n1/t.mp4"))
    labels = {item.path: item.labels.get("label") for item in source.items}
    assert labels == {path: path.split("/")[1] for path in (*train, "test/n1/t.mp4")} | {
        f"val/{folder}/v.mp4": None
    }
    assert any(f"val: its only folder, {folder}" in note for note in source.notes)


@pytest.mark.parametrize(
    "names",
    [
        ("train/images/a.mp4", "train/text/b.mp4", "val/images/c.mp4"),  # a class of train
        ("train/run/a.mp4", "val/images/c.mp4"),  # no other class to compare with
        ("images/a.mp4", "run/b.mp4"),  # no splits
        ("train/run/a.mp4", "train/walk/b.mp4", "val/jump/c.mp4"),  # not a usual name of such folders
    ],
)
def test_other_folders_are_classes(names, tmp_path):
    source = read_source(fill(tmp_path, *names), options=FolderOptions())
    assert {item.path: item.labels["label"] for item in source.items} == {n: n.split("/")[-2] for n in names}


def test_classes_of_which_train_has_no_sample_are_said():
    def summary(**sizes: dict[str, int]) -> dict:
        return {"classes": sizes}

    train = summary(
        label={"run": 2, "walk": 1, "jump": 0}, speed={"1.5": 1, "2.5": 0}, tags={"a|b": 1, "b": 2}
    )
    test = summary(
        label={"run": 1, "walk": 0, "jump": 4}, speed={"1.5": 0, "2.5": 1}, tags={"a": 1, "b|c": 1}
    )
    assert list(classes_without_train({"train": train, "test": test, "val": train})) == [
        "test: 4 samples of 1 class of label without a sample in train, such as jump",
        "test: 1 sample of 1 class of tags without a sample in train, such as b|c",
    ]
    assert not list(classes_without_train({"a": train, "b": test}))
    assert not list(classes_without_train({"train": summary(label={"run": 0}), "test": test}))


def test_groups_that_train_has_too_are_said():
    groups = {"test": ["a", "a", "b", None], "train": ["a", None, "c"], "val": ["d", None]}
    assert list(groups_of_train(groups)) == [
        "test: 2 samples of 1 group (a recording, a person) that train has, too, such as a"
    ]
    assert not list(groups_of_train({"a": ["x"], "b": ["x"]}))


# Clips of recordings
@pytest.mark.parametrize("form", ["{}_{:05d}.mp4", "{}-clip{}.avi", "{} part {}.webm", "{}{}.mp4"])
def test_numbered_clips_of_several_recordings(form):
    recordings = ("-mnyYMNhZLE", "a video", "other")
    paths = ["rgb/" + form.format(name, n) for name in recordings for n in (1, 2)]
    assert sorted(map(sorted, numbered_series(paths))) == sorted([paths[:2], paths[2:4], paths[4:]])
    assert not numbered_series(paths[:4]) and not numbered_series(paths[::2])
    assert not numbered_series([f"run/{n}.mp4" for n in range(9)])


@pytest.mark.parametrize(
    "meta, cut",
    [
        ({"start": 1.0, "end": 5.0, "duration": 1.0, "fps": 25.0}, True),
        ({"end": 3.0, "duration": 2.0, "fps": 25.0}, True),
        ({"start": 1.0, "end": 2.0, "duration": 0.96, "fps": 25.0}, False),
        ({"start": 0.0, "end": 3.0, "duration": 2.0, "fps": 1.0}, False),
        ({"start": 1.0, "duration": 2.0, "fps": 25.0}, False),
    ],
)
def test_segments_beyond_their_file(meta, cut):
    assert is_cut_short({**meta, "packed": {}}) is cut
    assert not is_cut_short(meta | {"end": "later"})  # of another tool


# vidssl embed FOLDER
def test_embed_lists_what_pack_takes(tmp_path, capsys):
    root = fill(
        tmp_path / "v", "a.mp4", "a.jpg", "._a.mp4", "b.mp4.part", "c/b.png", "c.txt", "__MACOSX/x.mp4"
    )
    fill(tmp_path / "elsewhere", "d.mp4")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    assert list_media([str(root), str(root / "a.jpg")]) == [
        str(root / name) for name in ("a.mp4", "c/b.png", "linked/d.mp4", "a.jpg")
    ]
    fill(tmp_path / "frames", *(f"run/img_{i:04d}.jpg" for i in range(4)))
    list_media([str(tmp_path / "frames")])
    said = capsys.readouterr()
    assert "1 folder of numbered images" in said.out + said.err
    fill(tmp_path / "packed", "train/index.json")
    with pytest.raises(UserError, match=r"no video or image in it; packed folders in it: .*packed/train"):
        list_media([str(tmp_path / "packed")])

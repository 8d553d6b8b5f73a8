"""Layouts of folders and lists: links, splits, frames, thumbnails, names (data_prep.sources)."""

import argparse
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.encode import encode_clips
from data_prep.filters import NO_FILTERS
from data_prep.frame_folder import folder_as_video, folder_bytes
from data_prep.plan import make_plan
from data_prep.recipe import Recipe
from data_prep.sources import FolderOptions, SourceItem, SourceListing, read_source
from data_prep.sources.names import are_frames, media_stem
from vidssl.core.errors import DecodeError, UserError
from vidssl.data.split_names import parse_split


def fill(root: Path, *names: str) -> Path:
    """Makes small files; images are all of one size."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(name) if name.endswith((".jpg", ".png")) else name.encode())
    return root


def image_bytes(name: str, size: tuple[int, int] = (8, 6), grey: int = 100) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(out, "png" if name.endswith("png") else "jpeg")
    return out.getvalue()


def understood(source: SourceListing) -> dict[str, tuple[str | None, str | None]]:
    return {item.path: (item.labels.get("label"), item.split) for item in source.items}


# Links


def test_links_are_followed_and_cycles_found(tmp_path):
    real = fill(tmp_path / "real", "walk/1.mp4", "lone.mp4")
    src = fill(tmp_path / "src", "run/1.mp4", "run/deep/2.mp4")
    (src / "walk").symlink_to(real / "walk")
    (src / "run/lone.mp4").symlink_to(real / "lone.mp4")
    (src / "run/gone.mp4").symlink_to(real / "gone.mp4")
    (src / "run/deep/up").symlink_to("..")
    (src / "run/deep/top").symlink_to(src)
    (src / "run/self").symlink_to(".")
    (src / "a").mkdir()
    (src / "b").mkdir()
    (src / "a/b").symlink_to(src / "b")
    (src / "b/a").symlink_to(src / "a")
    fill(src, "a/x.mp4")
    source = read_source(src)
    assert understood(source) == {
        "run/1.mp4": ("run", None),
        "run/deep/2.mp4": ("run", None),
        "run/lone.mp4": ("run", None),
        "walk/1.mp4": ("walk", None),
        "a/x.mp4": ("a", None),
        "b/a/x.mp4": ("b", None),
    }
    assert source.rejected == {"run/gone.mp4": "broken_link"}
    assert source.ignored["(link to a folder above it)"] == 5
    assert any(note.startswith("2 links lead out of") for note in source.notes)


def test_paths_of_one_file_are_one_group(tmp_path):
    src = fill(tmp_path, "all/1.mp4", "all/2.mp4", "other/3.mp4")
    (src / "run").mkdir()
    (src / "run/one.mp4").symlink_to("../all/1.mp4")
    groups = {item.path: item.group for item in read_source(src).items}
    assert groups["all/1.mp4"] == groups["run/one.mp4"] is not None
    assert groups["all/2.mp4"] is None and groups["other/3.mp4"] is None


def test_links_are_followed_for_annotations(tmp_path):
    real = fill(tmp_path / "real", "aaaaaaaaaaa_000000_000010.mp4")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/videos").symlink_to(real)
    (tmp_path / "train.csv").write_text("label,youtube_id,time_start,time_end\nx,aaaaaaaaaaa,0,10\n")
    source = read_source(tmp_path / "src", "kinetics", [tmp_path / "train.csv"])
    assert [item.path for item in source.items] == ["videos/aaaaaaaaaaa_000000_000010.mp4"]
    assert "lead out of" in source.notes[0]


# Splits


@pytest.mark.parametrize(
    "train, test, split",
    [
        ("train", "test", "test"),
        ("Train", "Test", "test"),
        ("TRAINING", "VALIDATION", "val"),
        ("tr", "dev", "val"),
        ("trn", "eval", "test"),
        ("videos_train", "videos_val", "val"),
        ("train_256", "val_256", "val"),
        ("k400_train", "k400_val", "val"),
        ("TrainSet", "TestSet", "test"),
        ("trainset", "testing_data", "test"),
        ("diving train", "diving test", "test"),
        ("train2017", "val2017", "val"),
    ],
)
def test_split_folders(tmp_path, train, test, split):
    for above in (True, False):
        src = tmp_path / str(above)
        for folder in (train, test):
            for name in ("run", "walk"):
                fill(src, f"{folder}/{name}/{folder}.mp4" if above else f"{name}/{folder}/{folder}.mp4")
        source = read_source(src)
        found = {(item.labels["label"], item.split) for item in source.items}
        assert found == {(name, s) for name in ("run", "walk") for s in ("train", split)}
        assert "splits by folder" in source.notes[0]
    none = read_source(tmp_path / "True", options=FolderOptions(splits="none"))
    assert {item.labels["label"] for item in none.items} == {train, test}


def test_split_folders_in_one_folder(tmp_path):
    fill(tmp_path, "data/train/run/1.mp4", "data/test/run/2.mp4", "data/test/walk/3.mp4")
    assert understood(read_source(tmp_path)) == {
        "data/train/run/1.mp4": ("run", "train"),
        "data/test/run/2.mp4": ("run", "test"),
        "data/test/walk/3.mp4": ("walk", "test"),
    }


@pytest.mark.parametrize(
    "names",
    [
        ("train/run/1.mp4", "test/run/1.mp4", "extra/run/1.mp4"),
        ("train/1.mp4", "extra/1.mp4"),
        ("train/run/1.mp4", "test/run/1.mp4", "1.mp4"),
        ("eye_test/1.mp4", "freight_train/1.mp4"),
        ("run/train/1.mp4", "run/test/2.mp4", "run/3.mp4"),
    ],
)
def test_a_layout_with_two_readings_is_asked_about(tmp_path, names):
    fill(tmp_path, *names)
    with pytest.raises(UserError, match="--splits folders or --splits none") as e:
        read_source(tmp_path)
    assert "\n" not in str(e.value)
    assert not any(item.split for item in read_source(tmp_path, options=FolderOptions(splits="none")).items)
    answered = read_source(tmp_path, options=FolderOptions(splits="folders"))
    assert all(item.split for item in answered.items)


def test_answers_name_the_other_folders_too(tmp_path):
    fill(tmp_path, "train/run/1.mp4", "test/run/1.mp4", "extra (new)/run/1.mp4")
    source = read_source(tmp_path, options=FolderOptions(splits="folders"))
    assert understood(source) == {
        "train/run/1.mp4": ("run", "train"),
        "test/run/1.mp4": ("run", "test"),
        "extra (new)/run/1.mp4": ("run", "extra-new"),
    }


def test_a_class_may_be_called_train(tmp_path):
    names = [f"vehicle{i}" for i in range(20)]
    fill(tmp_path, *(f"{name}/{k}.mp4" for name in ("train", "eye_test", *names) for k in range(2)))
    source = read_source(tmp_path)
    assert {item.labels["label"] for item in source.items} == {"train", "eye_test", *names}
    assert not any(item.split for item in source.items)
    assert source.notes[0] == "taken for a class beside 20 others: eye_test, train"


def test_words_that_are_no_splits():
    for name in ("contest", "medieval", "strain", "testimony", "rain", "developer", "trend", "train_val"):
        assert parse_split(name) is None


# Lists


@pytest.mark.parametrize(
    "kind, first, second",
    [
        ("csv", "path,label\na.mp4,p\n", "path,label\nb.mp4,q\n"),
        ("jsonl", '{"path": "a.mp4"}\n', '{"path": "b.mp4"}\n'),
        ("unlabelled", "a.mp4\n", "b.mp4\n"),
    ],
)
def test_names_of_two_lists_are_splits(tmp_path, kind, first, second):
    src = fill(tmp_path / "src", "a.mp4", "b.mp4")
    ext = {"csv": "csv", "jsonl": "jsonl", "unlabelled": "txt"}[kind]

    def read(*names: str, splits: str = "auto") -> dict:
        files = [tmp_path / f"{name}.{ext}" for name in names]
        for file, text in zip(files, (first, second), strict=False):
            file.write_text(text)
        source = read_source(src, kind, files, FolderOptions(splits=splits))
        return {item.path: item.split for item in source.items}

    assert read("train", "val") == {"a.mp4": "train", "b.mp4": "val"}
    assert read("k400_Train", "k400_TEST") == {"a.mp4": "train", "b.mp4": "test"}
    assert read("train", "val", splits="none") == {"a.mp4": None, "b.mp4": None}
    assert read("train") == {"a.mp4": None}
    with pytest.raises(UserError, match="are these lists splits, or one set"):
        read("one", "two")
    with pytest.raises(UserError, match="split"):
        read("train", "more")


def test_missing_files_are_booked_to_their_split(tmp_path):
    src = fill(tmp_path / "src", "a.mp4", "b.mp4")
    (tmp_path / "test.csv").write_text("path,label\na.mp4,p\n")
    (tmp_path / "validation.csv").write_text("path,label\nb.mp4,p\ngone.mp4,p\n")
    (tmp_path / "train.csv").write_text("path,label\nlost.mp4,p\n")
    files = [tmp_path / f"{name}.csv" for name in ("test", "validation", "train")]
    source = read_source(src, "csv", files)
    assert source.rejected_splits == {"gone.mp4": "val", "lost.mp4": "train"}
    args = argparse.Namespace(
        test_fraction=0.0, seed=0, recipe=None, filters=NO_FILTERS, drop_duplicates=None, decoder="auto",
        samples_per_shard=0,
    )  # fmt: skip
    plan = make_plan(source, src, tmp_path / "out", args)
    booked = {folder.name: [(r["path"], r["detail"]) for r in plan.rejected.get(folder, [])]
              for folder in plan.datasets}  # fmt: skip
    assert booked == {"test": [("lost.mp4", "of the split train")], "val": [("gone.mp4", "")]}


# Names


def test_absolute_paths(tmp_path):
    src = fill(tmp_path / "src", "a/b.mp4", "c.mp4")
    (tmp_path / "link").symlink_to(src)
    for root in (src, tmp_path / "link"):
        for path in (src / "a/b.mp4", tmp_path / "link/a/b.mp4", f"file://{src}/a/b.mp4", "a/../a/./b.mp4"):
            (tmp_path / "l.csv").write_text(f"path,label\n{path},p\n")
            items = read_source(root, "csv", [tmp_path / "l.csv"]).items
            assert [item.path for item in items] == ["a/b.mp4"]
    for path in (tmp_path / "other.mp4", src / "../x.mp4", "../src/c.mp4", src, "."):
        (tmp_path / "l.csv").write_text(f"path,label\n{path},p\n")
        with pytest.raises(UserError, match=r"l\.csv:2: path .*expected a path inside"):
            read_source(src, "csv", [tmp_path / "l.csv"])


@pytest.mark.parametrize("ending", ["mp4.mkv", "MP4", "mp4.webm", "mkv.MP4", "webm.mp4.mkv"])
def test_ids_are_found_with_any_extension(tmp_path, ending):
    name = "zzzzzzzzzz1_000000_000010"
    src = fill(tmp_path / "src", f"train/{name}.{ending}", "train/yyyyyyyyyy1_000000_000010.mp4.part")
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end\nx,zzzzzzzzzz1,0,10\nx,yyyyyyyyyy1,0,10\n"
    )
    source = read_source(src, "kinetics", [tmp_path / "train.csv"])
    assert [item.path for item in source.items] == [f"train/{name}.{ending}"]
    assert source.rejected == {"yyyyyyyyyy1_000000_000010": "missing"}
    assert source.ignored["(unfinished download)"] == 1
    assert media_stem("a.v.mp4.mkv") == "a.v" and media_stem(".mp4") == ".mp4"


# Thumbnails and other files of one recording


COMPANIONS = ("x.jpg", "x.webp", "x-thumb.jpg", "x_thumbnail.png", "x.mp4.jpg", "X.JPG", "poster.jpg",
              "thumbs/x.jpg", "x-640x360.jpg")  # fmt: skip


def test_thumbnails_and_side_files_are_left_out(tmp_path):
    others = ("x.vtt", "x.info.json", "y.mp4.part", "z.temp.mp4", "z.mp4.ytdl", "z.mp4.part-Frag3")
    fill(tmp_path, "run/x.mp4", "walk/picture.jpg", *(f"run/{name}" for name in (*COMPANIONS, *others)))
    source = read_source(tmp_path)
    assert [item.path for item in source.items] == ["run/x.mp4", "walk/picture.jpg"]
    assert source.ignored["(thumbnail of a video; --thumbnails keep takes it)"] == len(COMPANIONS)
    assert source.ignored["(unfinished download)"] == 4
    assert source.ignored[".vtt"] == source.ignored[".json"] == 1


def test_kept_thumbnails_are_in_the_group_of_their_video(tmp_path):
    fill(
        tmp_path,
        "run/x.mp4",
        "run/x.jpg",
        "run/x.mp4.webp",
        "run/y.mp4",
        "walk/x.mp4",
        "run/z.mp4",
        "run/z.mov",
    )
    source = read_source(tmp_path, options=FolderOptions(thumbnails="keep"))
    groups = {item.path: item.group for item in source.items}
    assert groups["run/x.mp4"] == groups["run/x.jpg"] == groups["run/x.mp4.webp"] == "run/x"
    assert groups["run/z.mp4"] == groups["run/z.mov"] == "run/z"
    assert groups["run/y.mp4"] is None and groups["walk/x.mp4"] is None


# Frames


FRAME_NAMES = ("img_{:05d}.jpg", "frame{:06d}.png", "image_{:04d}.jpg", "{:06d}.jpg", "{:05d}.jpg", "{}.png")


@pytest.mark.parametrize("name", FRAME_NAMES)
@pytest.mark.parametrize("folder", ["run/v{}", "{}", "train/run/v{}"])
def test_folders_of_frames(tmp_path, name, folder):
    fill(tmp_path, *(f"{folder.format(v)}/{name.format(i + 1)}" for v in (1, 2) for i in range(4)))
    fill(tmp_path, *(f"{folder.format(1)}/flow_{axis}_{i:05d}.jpg" for axis in "xy" for i in range(4)))
    with pytest.raises(UserError, match=r"--frame-rate RATE .* or --frames images"):
        read_source(tmp_path)
    source = read_source(tmp_path, options=FolderOptions(frame_rate="12"))
    assert [item.path for item in source.items] == [folder.format(v) for v in (1, 2)]
    label = "run" if "run" in folder else None
    assert {item.labels.get("label") for item in source.items} == {label}
    assert {item.split for item in source.items} == {"train" if "train" in folder else None}
    assert source.items[0].ext == "frames" and source.ignored["(optical flow)"] == 8
    images = read_source(tmp_path, options=FolderOptions(frames="images"))
    assert len(images.items) == 8
    if "/" in folder:  # images of one recording are never divided
        assert {item.group for item in images.items} == {folder.format(v) for v in (1, 2)}


def test_images_of_a_class_do_not_become_a_video(tmp_path):
    for k in range(6):  # of different sizes
        path = fill(tmp_path / "sizes", f"cat/{k:06d}.jpg", f"dog/{k:06d}.jpg") / f"cat/{k:06d}.jpg"
        path.write_bytes(image_bytes("x.jpg", (8 + k, 6)))
        path.with_name("x").unlink(missing_ok=True)
        (tmp_path / f"sizes/dog/{k:06d}.jpg").write_bytes(image_bytes("x.jpg", (8, 6 + k)))
    assert len(read_source(tmp_path / "sizes").items) == 12
    fill(tmp_path / "gaps", *(f"n01440764/n01440764_{k}.jpg" for k in (10026, 1009, 44, 7)))
    assert len(read_source(tmp_path / "gaps").items) == 4
    fill(tmp_path / "cifar", *(f"{c}/{k:04d}.png" for c in ("cat", "dog") for k in range(5)))
    with pytest.raises(UserError, match="--frames images"):
        read_source(tmp_path / "cifar")
    assert len(read_source(tmp_path / "cifar", "imagefolder").items) == 10
    source = read_source(tmp_path / "cifar", options=FolderOptions(frames="images"))
    assert [item.group for item in source.items] == [None] * 10


def test_numbered_images_of_several_recordings_in_a_folder_are_grouped(tmp_path):
    names = [f"run/v_Run_g0{g}_c01_{i:04d}.jpg" for g in (1, 2) for i in range(1, 4)]
    fill(tmp_path, *names, "run/other.jpg")
    groups = {item.path: item.group for item in read_source(tmp_path).items}
    assert groups == {name: name[4 : -len("_c01_0001.jpg")] for name in names} | {"run/other.jpg": None}


def test_frame_names():
    assert are_frames(["img_1.jpg", "img_2.jpg"]) and are_frames(["1.jpg", "6.jpg", "11.jpg"])
    assert not are_frames(["1.jpg", "2.jpg"]) and not are_frames(["a1.jpg", "b2.jpg", "c3.jpg"])
    assert not are_frames(["1.jpg", "2.jpg", "4.jpg"]) and not are_frames(["x.jpg", "1.jpg", "2.jpg"])


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp"])
def test_a_folder_of_frames_becomes_a_video(tmp_path, kind, frame_index):
    form = {"jpg": "jpeg"}.get(kind, kind)
    for i in range(6):
        picture = np.full((48, 64, 3), 20 + 10 * i, np.uint8)
        Image.fromarray(picture).save(tmp_path / f"img_{i + 8}.{kind}", form)
    (tmp_path / "flow_x_8.jpg").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    assert folder_bytes(tmp_path) == sum(p.stat().st_size for p in tmp_path.glob("img_*"))
    video = folder_as_video(tmp_path, "30000/1001", lambda: None)
    (clip,) = encode_clips(video, [(None, None)], Recipe(), NO_FILTERS, lambda: None)
    assert clip.meta["frames"] == 6 and clip.meta["fps"] == pytest.approx(30000 / 1001, abs=0.01)
    assert clip.meta["duration"] == pytest.approx(6 * 1001 / 30000, abs=1e-3)
    from vidssl.data.decoding import open_video

    frames = open_video(clip.data, "mp4", clip.meta).get(list(range(6)))
    assert [frame_index(frame) for frame in frames] == list(range(6))


def test_frames_that_do_not_fit(tmp_path):
    fill(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "3.jpg").write_bytes(image_bytes("3.jpg", (10, 10)))
    with pytest.raises(DecodeError, match=r"frames_differ: 3\.jpg is JPEG"):
        folder_as_video(tmp_path, "25", lambda: None)
    (tmp_path / "3.jpg").write_bytes(b"no image")
    with pytest.raises(DecodeError, match=r"not_an_image: 3\.jpg"):
        folder_as_video(tmp_path, "25", lambda: None)


def test_source_items_of_files_have_no_frame_rate():
    assert (
        SourceItem("a/B.MP4", {}).ext == "mp4" and SourceItem("a/v.avi", {}, frame_rate="25").ext == "frames"
    )


# Lists


def listed(root: Path, text: str, **options: str) -> SourceListing:
    fill(root, "a.mp4", "b.mp4", "c.mp4", "v/1.jpg", "v/2.jpg", "v/3.jpg")
    (root / "labels.csv").write_text(text, encoding="utf-8")
    return read_source(root, "folder", [], FolderOptions(**options))


def test_files_and_columns_that_a_list_does_not_read_are_said(tmp_path):
    source = listed(tmp_path, "\ufeffpath, label ,fold\r\na.mp4,x,1\r\n")
    assert understood(source) == {"a.mp4": ("x", None)}
    assert source.ignored == {"(not in the list)": 5}
    assert source.notes == ["columns of labels.csv that are not read: fold"]


@pytest.mark.parametrize("column", ["Group", "groups", " SPLIT", "Start", "end_"])
def test_columns_with_nearly_the_name_of_another_are_refused(tmp_path, column):
    with pytest.raises(UserError, match=r"labels.csv:1: column .*: call it '(group|split|start|end)'"):
        listed(tmp_path, f"path,label,{column}\na.mp4,x,1\n")


def test_texts_that_stand_for_no_class(tmp_path):
    for label in ("-1", "-1.0", "nan", "NaN", "null", " "):
        assert understood(listed(tmp_path, f"path,label\na.mp4,{label}\nb.mp4,0\n")) == {
            "a.mp4": (None, None),
            "b.mp4": ("0", None),
        }
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4", "label": -1}\n{"path": "b.mp4", "label": "x"}\n')
    source = read_source(tmp_path, "jsonl", [tmp_path / "list.jsonl"])
    assert understood(source) == {"a.mp4": (None, None), "b.mp4": ("x", None)}


@pytest.mark.parametrize(
    "first, second", [("Run", "run "), ("two words", "Two  Words"), ("1", "01"), ("2", "2.0")]
)
def test_classes_in_two_spellings_are_said(tmp_path, first, second):
    source = listed(tmp_path, f"path,label\na.mp4,{first}\nb.mp4,{second}\nc.mp4,other\n")
    names = sorted([first, second.strip()])
    assert source.notes == [f"classes that differ in spelling only: {names[0]!r}, {names[1]!r}"]


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    source = read_source(fill(tmp_path / "folders", "caf\u00e9/a.mp4", "cafe\u0301/b.mp4"))
    assert {item.labels["label"] for item in source.items} == {"caf\u00e9"}
    source = listed(tmp_path / "list", "path,label\na.mp4,caf\u00e9\nb.mp4,cafe\u0301\n")
    assert {item.labels["label"] for item in source.items} == {"caf\u00e9"}


def test_splits_that_differ_in_case_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"labels.csv:3: split 'train', but 'Train' in .*labels.csv:2"):
        listed(tmp_path, "path,label,split\na.mp4,x,Train\nb.mp4,x,train\n")


def test_lists_name_folders_of_frames(tmp_path):
    text = "path,label\nv,x\na.mp4,y\n"
    with pytest.raises(UserError, match=r"labels.csv:2: v is a folder; give --frame-rate RATE"):
        listed(tmp_path, text)
    source = listed(tmp_path, text, frame_rate="10")
    assert [(item.path, item.frame_rate) for item in source.items] == [("a.mp4", None), ("v", "10")]
    assert source.ignored == {"(not in the list)": 2}


def test_a_folder_around_the_classes_is_said(tmp_path):
    source = read_source(fill(tmp_path, "data/run/a.mp4", "data/walk/b.mp4"))
    assert source.notes == [
        "all files are in data, the only class; pack that folder to take the 2 folders in it for classes"
    ]

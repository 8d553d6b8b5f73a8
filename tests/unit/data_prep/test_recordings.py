"""What is of one recording, or has the same bytes, is in train or in test (data_prep)."""

import argparse
import json
from pathlib import Path

import pytest

from data_prep import pack
from data_prep.filters import NO_FILTERS
from data_prep.plan import Plan, make_plan
from data_prep.sources import FolderOptions, read_source
from data_prep.sources.names import are_frames, recording
from data_prep.synthetic import make_corpus
from vidssl.core.errors import DecodeError, UserError
from vidssl.data.format import Sample
from vidssl.data.parts import group_of, hold_out
from vidssl.data.shards import Shards


def fill(root: Path, *names: str) -> Path:
    """Makes files of their own names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def plan_of(source: Path, out: Path, **more) -> Plan:
    args = {"test_fraction": 0.3, "seed": 0, "recipe": None, "filters": NO_FILTERS, "drop_duplicates": None}
    args |= {"decoder": "auto", "samples_per_shard": 0, "workers": 1, "timeout": 60.0, **more}
    return make_plan(read_source(source), source, out, argparse.Namespace(**args))


def split_of(plan: Plan) -> dict[str, str]:
    return {
        item.path: folder.name
        for folder, shards in plan.datasets.items()
        for shard in shards
        for item in shard.items
    }


@pytest.mark.parametrize("drop", [None, "exact"])
@pytest.mark.parametrize("grouped", [False, True])
def test_copies_are_on_one_side(tmp_path, drop, grouped):
    names = [f"{c}/{i}.mp4" for c in "ab" for i in range(10)]
    source = fill(tmp_path / "src", *names)
    for name in names:
        (source / name.replace(".mp4", "copy.mp4")).write_bytes(name.encode())
    if grouped:  # by a number of their own each, so that only the bytes tell which belong together
        rows = [f"{path.relative_to(source)},{path.parent.name},{path.stem}{path.parent.name}\n"
                for path in sorted(source.rglob("*.mp4"))]  # fmt: skip
        (source / "labels.csv").write_text("path,label,group\n" + "".join(rows))
    plan = plan_of(source, tmp_path / "out", drop_duplicates=drop)
    splits = split_of(plan)
    if drop is None:
        assert len(splits) == 40
        assert all(splits[name] == splits[name.replace(".mp4", "copy.mp4")] for name in names)
    else:
        assert sorted(splits) == sorted(names)
        dropped = [record["path"] for records in plan.rejected.values() for record in records]
        assert sorted(dropped) == sorted(name.replace(".mp4", "copy.mp4") for name in names)
        for folder, records in plan.rejected.items():  # where the copy is that is kept
            assert {splits[r["path"].replace("copy.mp4", ".mp4")] for r in records} == {folder.name}
    assert list(splits.values()).count("test") == pytest.approx(0.3 * len(splits), abs=1)


@pytest.mark.parametrize("form", ["dive/{}_{:05d}.mp4", "{} clip{}.mp4"])
def test_numbered_clips_that_are_divided_are_said(form, tmp_path, capsys):
    paths = [form.format(recording, n) for recording in ("-mnyYMNhZLE", "x", "y") for n in range(1, 5)]
    source = fill(tmp_path / "src", *paths)
    splits = split_of(plan_of(source, tmp_path / "out", test_fraction=0.5))
    said = capsys.readouterr()
    assert "series of numbered files are divided, such as" in said.out + said.err
    rows = [f"{path},{path.split('/')[-1][:2]},x\n" for path in splits]
    (source / "labels.csv").write_text("path,group,label\n" + "".join(rows))
    plan_of(source, tmp_path / "other")
    said = capsys.readouterr()
    assert "numbered files" not in said.out + said.err


def groups_of(plan: Plan) -> dict[str, str | None]:
    shards = [shard for shards in plan.datasets.values() for shard in shards]
    return {item.path: item.group for shard in shards for item in shard.items}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("search", ["bytes", "near"])
def test_groups_that_a_dropped_file_joins_are_on_one_side(tmp_path, monkeypatch, search, seed):
    """Of a pair one file is dropped; the rest of its group is of the recording of the other."""
    texts = {f"{g}{v}.mp4": f"{g} {v}" for g in "pqrs" for v in range(3)}
    copies = {"q0.mp4": "p0.mp4", "s0.mp4": "r2.mp4"}
    if search == "bytes":
        texts |= {copy: texts[of] for copy, of in copies.items()}
    found = {copy: {"duplicate_of": of} for copy, of in copies.items()}
    monkeypatch.setattr("data_prep.copies.find_near_duplicates", lambda *_: found)
    source = fill(tmp_path / "src", *texts)
    for name, text in texts.items():
        (source / name).write_text(text)
    rows = [f"{name},{name[0]},x" for name in texts]
    (source / "labels.csv").write_text("\n".join(["path,group,label", *rows]) + "\n")
    plan = plan_of(source, tmp_path / "out", test_fraction=0.5, drop_duplicates=search, seed=seed)
    sides = {(path[0] in "pq", split) for path, split in split_of(plan).items()}
    assert len(sides) == 2 and not copies.keys() & split_of(plan).keys()
    assert all(group == ("p" if path[0] in "pq" else "r") for path, group in groups_of(plan).items())


@pytest.mark.parametrize("drop", [None, "bytes"])
def test_kept_copies_have_a_group_for_later_splits(tmp_path, drop):
    """Other segments of a copy are no duplicates; without --drop-duplicates whole copies are kept."""
    names = [f"{copy}{v}.mp4" for copy in "ab" for v in range(6)]
    source = fill(tmp_path / "src", *names)
    for name in names:
        (source / name).write_text(name[1:])
    rows = [
        f"{name},{start},{start + 1},x" for name in names for start in ((0, 2) if name[0] == "b" else (0,))
    ]
    if drop:
        (source / "labels.csv").write_text("\n".join(["path,start,end,label", *rows]) + "\n")
    plan = plan_of(source, tmp_path / "out", drop_duplicates=drop)
    groups, sides = groups_of(plan), split_of(plan)
    for v in range(6):
        assert groups[f"a{v}.mp4"] == groups[f"b{v}.mp4"] == f"a{v}.mp4"
        assert sides[f"a{v}.mp4"] == sides[f"b{v}.mp4"]


@pytest.mark.parametrize("drop", [None, "bytes"])
def test_copies_in_splits_of_the_source_are_said(drop, tmp_path, caplog):
    source = fill(tmp_path / "src", "train/a/1.mp4", "train/a/2.mp4", "test/a/3.mp4")
    (source / "test/a/3.mp4").write_bytes((source / "train/a/1.mp4").read_bytes())
    with caplog.at_level("WARNING", "vidssl"):
        plan = plan_of(source, tmp_path / "out", test_fraction=0.0, drop_duplicates=drop)
    assert len(split_of(plan)) == 3
    groups = groups_of(plan)
    assert groups["train/a/1.mp4"] == groups["test/a/3.mp4"] is not None and groups["train/a/2.mp4"] is None
    assert "1 files have the bytes of one in another split, such as train/a/1.mp4 (train) of" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        [f"v_{c}_g{g:02d}_c{k:02d}.avi" for c in ("Run", "Walk") for g in range(1, 6) for k in (1, 2, 3)],
        [
            f"{i:06d}abc_D_{k:06d}_{k + 10:06d}.mp4".replace("abc_D", "a-c_D")
            for i in range(8)
            for k in (0, 20)
        ],
        [f"{film}_run_{v}_nm_np1_ri_med_{k}.avi" for film in "ABCDEFGH" for v, k in (("f", 0), ("f", 1))],
    ],
    ids=["UCF101", "Kinetics", "HMDB51"],
)
def test_clips_of_a_recording_are_on_one_side(tmp_path, names):
    source = fill(tmp_path / "src", *(f"{'ab'[i % 2]}/{name}" for i, name in enumerate(names)))
    assert any("grouped by a common name, recording" in note for note in read_source(source).notes)
    sides: dict[str | None, set[str]] = {}
    for path, split in split_of(plan_of(source, tmp_path / "out")).items():
        sides.setdefault(recording(path.rpartition("/")[2]), set()).add(split)
    assert len(sides) in (8, 10) and all(len(found) == 1 for found in sides.values())
    assert set.union(*sides.values()) == {"train", "test"}


def test_other_names_are_of_no_recording():
    for name in ("a.mp4", "walk_01.mp4", "v_Run_c01.avi", "000010_000020.mp4", "abc_000010_000020.mp4"):
        assert recording(name) is None


# Clips of one file


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("windows")
    make_corpus(root / "corpus", train=4, test=2, workers=1)
    pack.main([str(root / "corpus"), str(root / "out"), "--window", "0.4", "--workers", "1"])
    return root / "out" / "train"


def test_windows_of_a_video_are_one_group(windows):
    samples = Shards([str(windows)]).list_samples()
    sources = [sample.meta["source"] for sample in samples]
    assert len(samples) > len(set(sources)) == 4
    assert [group_of(sample) for sample in samples] == sources
    without_labels = [sample._replace(meta=sample.meta | {"labels": {}}) for sample in samples]
    held = hold_out(without_labels, 0.25, 0).held_out
    sides = {(source, bool(is_held)) for source, is_held in zip(sources, held, strict=True)}
    assert len(sides) == 4 and sum(is_held for _, is_held in sides) == 1


def test_clips_that_were_packed_without_a_group_have_that_of_their_file():
    def sample(key: str, **meta) -> Sample:
        return Sample(key, "mp4", 0, 0, 1, meta)

    assert group_of(sample("x", source="a.mp4", start=0.0, end=1.0, group=None)) == "a.mp4"
    assert group_of(sample("x", source="a.mp4", start=0.0, group="film 1")) == "film 1"
    assert group_of(sample("x", source="a.mp4", group=None)) == "sample x"
    assert group_of(sample("x", start=1.0)) == "sample x"
    # others name the site that a clip is from
    assert group_of(sample("x", source="youtube", start=1.0)) == "sample x"


# Folders of frames


def test_frames_with_gaps_are_the_frames_of_a_video(tmp_path):
    from PIL import Image

    for v in range(3):
        for i in range(1, 13):
            if i != 4 + v:
                path = tmp_path / f"run/v{v}/img_{i:05d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(UserError, match=r"--frame-rate RATE .* or --frames images"):
        read_source(tmp_path)
    source = read_source(tmp_path, options=FolderOptions(frame_rate="12"))
    assert [item.path for item in source.items] == [f"run/v{v}" for v in range(3)] and not source.notes
    images = read_source(tmp_path, options=FolderOptions(frames="images"))
    assert {item.group for item in images.items} == {f"run/v{v}" for v in range(3)}


def test_how_many_numbers_may_be_missing():
    def named(*numbers: int) -> list[str]:
        return [f"img_{number}.jpg" for number in numbers]

    assert are_frames(named(1, 2, 3, 5)) and are_frames(named(*range(1, 60, 2), 70))
    assert not are_frames(named(1, 2, 9)) and are_frames(named(1, 2, 9), any_gaps=True)
    assert not are_frames([*named(1, 2), "img_01.jpg"], any_gaps=True)


def images(root: Path, *names: str) -> Path:
    from PIL import Image

    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(root / name)
    return root


@pytest.mark.parametrize("word", ["img", "frame", "image"])
@pytest.mark.parametrize("numbers", [(1, 2, 4), (1, 3, 4, 7), (2, 4, 10)])
def test_few_frames_with_gaps_are_asked_about(tmp_path, word, numbers):
    images(tmp_path, *(f"run/v{v}/{word}_{k:05d}.jpg" for v in range(3) for k in numbers))
    with pytest.raises(UserError, match=r"--frame-rate RATE .* or --frames images"):
        read_source(tmp_path)


@pytest.mark.parametrize("options", [{}, {"frames": "images"}, {"frame_rate": "12"}], ids=str)
@pytest.mark.parametrize("other", ["cover.jpg", "img_a.png", "sound.mp4"])
def test_frames_beside_another_file_are_one_group(tmp_path, options, other):
    names = [f"run/v{v}/img_{k:05d}.jpg" for v in range(2) for k in range(4)]
    images(tmp_path, *names, *([f"run/v{v}/{other}" for v in range(2)] if other != "sound.mp4" else ()))
    if other == "sound.mp4":
        fill(tmp_path, "run/v0/sound.mp4", "run/v1/sound.mp4")
    source = read_source(tmp_path, options=FolderOptions(**options))
    groups = {item.path: item.group for item in source.items}
    assert all(groups[name] == name.rpartition("/")[0] for name in names)
    assert ("frame_rate" in options) == any("not one series each" in note for note in source.notes)


@pytest.mark.parametrize("options", [{}, {"frames": "images"}, {"frame_rate": "12"}], ids=str)
@pytest.mark.parametrize("views", [("left", "right"), ("cam0", "cam1", "cam2")], ids=str)
def test_views_of_a_recording_are_one_group(tmp_path, views, options):
    names = [f"run/v{v}/{view}_{k:03d}.jpg" for v in range(2) for view in views for k in range(3)]
    source = read_source(images(tmp_path, *names), options=FolderOptions(**options))
    if options != {"frames": "images"}:
        groups = {(item.path.rpartition("/")[0], item.group) for item in source.items}
        assert len(groups) == 2 and None not in dict(groups).values()


@pytest.mark.parametrize("name", ["{:04d}.png", "img_{:d}.jpg", "n0144_{:d}.jpg"])
def test_images_of_a_class_below_a_split_are_no_recording(tmp_path, name):
    """Else a class would be one group, of which nothing can be held out."""
    images(tmp_path, *(f"{s}/{c}/{name.format(k)}" for s in ("train", "val") for c in "xy" for k in range(5)))
    source = read_source(tmp_path, "imagefolder")
    assert [item.group for item in source.items] == [None] * 20


@pytest.mark.parametrize("name", ["v_Run_g{g}_c0{c}_{k:04d}.jpg", "v_Run_g{g}_c0{c}/img_{k:04d}.jpg"])
def test_frames_of_clips_of_one_recording_are_one_group(tmp_path, name):
    paths = [f"Run/{name.format(g=g, c=c, k=k)}" for g in "12" for c in (1, 2) for k in range(1, 4)]
    options = FolderOptions(frames="images" if "/" in name else None)
    source = read_source(images(tmp_path, *paths), options=options)
    assert {item.path: item.group for item in source.items} == {
        path: f"v_Run_g{path.split('_g')[1][0]}" for path in paths
    }


def test_frames_named_by_clip_are_grouped_where_images_are_asked_for(tmp_path):
    names = [f"run/v_Run_g0{g}_c0{c}_{k:04d}.jpg" for g in (1, 2) for c in (1, 2) for k in range(1, 4)]
    groups = {item.path: item.group for item in read_source(images(tmp_path, *names), "imagefolder").items}
    assert len(set(groups.values())) == 2 and None not in groups.values()
    assert all(groups[name] == groups[f"{name[:13]}_c01_0001.jpg"] for name in names)


def test_two_series_in_a_folder_are_named(tmp_path):
    fill(tmp_path, *(f"run/v1/{side}_{i:03d}.jpg" for side in ("left", "right") for i in range(4)))
    fill(tmp_path, *(f"run/v2/{i:03d}.jpg" for i in range(4)))
    source = read_source(tmp_path, options=FolderOptions(frame_rate="12"))
    assert len(source.items) == 9 and any("run/v1: their images stay images" in note for note in source.notes)
    assert all(item.group for item in source.items if item.frame_rate is None)
    from data_prep.frame_folder import folder_as_video

    with pytest.raises(DecodeError, match="frames_differ: two images have the number 0"):
        folder_as_video(tmp_path / "run/v1", "12", lambda: None)


# Splits


def test_the_folder_of_an_imagenet_subset_decides_over_the_name(tmp_path):
    for split, numbers in (("train", (0, 1)), ("val", (7,))):
        for c in (1, 2):
            fill(tmp_path, *(f"{split}/n0144076{c}/n0144076{c}_{k}.JPEG" for k in numbers))
    source = read_source(tmp_path, "imagenet")
    assert {item.path.split("/")[0]: item.split for item in source.items} == {"train": "train", "val": "val"}
    assert "2 images are named as train in a folder of val: the folder decides" in source.notes


def test_splits_and_groups_of_a_list_without_labels(tmp_path):
    source = fill(tmp_path / "src", "a.mp4", "b.mp4")
    file = tmp_path / "list.csv"
    file.write_text("video_id,split,group,rank\na,train,film,1\nb,test,,2\n")
    found = read_source(source, "unlabelled", [file])
    items = {item.path: (item.split, item.group) for item in found.items}
    assert items == {"a.mp4": ("train", "film"), "b.mp4": ("test", "b")}
    assert "columns that are not read: rank" in found.notes


@pytest.mark.parametrize("one, other", [("train", "training"), ("val", "validation"), ("Test", "testing")])
def test_splits_in_two_spellings_are_refused(tmp_path, one, other):
    source = fill(tmp_path / "src", "a.mp4", "b.mp4")
    (source / "labels.csv").write_text(f"path,label,split\na.mp4,x,{one}\nb.mp4,x,{other}\n")
    with pytest.raises(UserError, match=f"labels.csv:3: split '{other}', but '{one}'"):
        read_source(source)


# Lists that are not what they should be


@pytest.mark.parametrize(
    "line, says",
    [
        (json.dumps({"path": "a.mp4", "label": "\ud800"}), "half of a surrogate pair"),
        (json.dumps({"path": "a.mp4", "group": "x\udfff"}), "half of a surrogate pair"),
        ('{"path": "a.mp4", "labels": {"\\ud800": "x"}}', "half of a surrogate pair"),
        ('{"path": "\\udc80.mp4", "label": "x"}', "half of a surrogate pair"),
        ("[" * 100_000, "not JSON"),
        ('{"path": ' + '{"a":' * 100_000, "not JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, says):
    source = fill(tmp_path / "src", "a.mp4")
    file = tmp_path / "list.jsonl"
    file.write_text('{"path": "a.mp4"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"list\.jsonl:2: .*{says}"):
        read_source(source, "jsonl", [file])


@pytest.mark.parametrize(
    "kind, first, second",
    [
        ("ssv2", {"id": "a", "template": "x"}, {"id": "b", "template": "\ud83d"}),
        ("ssv2", {"id": "a", "template": "x"}, {"id": "\udc80", "template": "x"}),
        ("diving48", {"vid_name": "a_1", "label": 1}, {"vid_name": "x\udfff", "label": 1}),
    ],
)
def test_an_entry_with_half_a_character_is_named(tmp_path, kind, first, second):
    source = fill(tmp_path / "src", "a.mp4", "a_1.mp4")
    file = tmp_path / "train.json"
    whole = {**first, "note": "\U0001f600"}  # a whole pair
    file.write_text(f"[{json.dumps(whole)},\n{json.dumps(second)}]")
    with pytest.raises(UserError, match=r"train\.json:2: half of a surrogate pair"):
        read_source(source, kind, [file])


@pytest.mark.parametrize("vocabulary", ["7", '{"a": 1}', "[" * 100_000])
def test_a_vocabulary_that_is_no_list_is_named(tmp_path, vocabulary):
    source = fill(tmp_path / "src", "d_001.mp4")
    lists = [tmp_path / "Diving48_V2_train.json", tmp_path / "Diving48_vocab.json"]
    lists[0].write_text(json.dumps([{"vid_name": "d_001", "label": 0}]))
    lists[1].write_text(vocabulary)
    with pytest.raises(UserError, match=r"Diving48_vocab\.json:1: "):
        read_source(source, "diving48", lists)

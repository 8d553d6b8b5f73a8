"""data_prep.sources: annotation files as they are published, valid and invalid ones."""

import json
from pathlib import Path

import pytest

from data_prep.sources import SOURCES, SourceItem, read_source
from data_prep.sources.common import json_objects
from vidssl.core.errors import UserError


@pytest.fixture
def make(tmp_path):
    """make(kind, {file: text}, *names) writes annotation files, and files of one byte into videos/, and reads
    them."""

    def write(kind: str, annotations: dict[str, str], *names: str):
        for name in names:
            file = tmp_path / "videos" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
        for name, text in annotations.items():
            (tmp_path / name).write_bytes(text.encode())
        return read_source(tmp_path / "videos", kind, [tmp_path / name for name in annotations])

    return write


def by_path(source):
    """path -> (labels, group, split)."""
    return {item.path: (item.labels, item.group, item.split) for item in source.items}


K400 = "label,youtube_id,time_start,time_end,split,is_cc\n"


def test_kinetics_in_every_layout(make):
    train = K400 + (
        "air drumming,--nQbRBEz2s,104,114,train,0\n"
        '"playing harp",_dbcJuKJQNs,40,50,train,0\n'
        "abseiling,abcdefghijk,7,17,train,0\nabseiling,gone,0,10,train,0\n"
    )
    val = "label,youtube_id,time_start,time_end,split\ntestifying,---QUuC4vJs,84,94,validate\n"
    test = "youtube_id,time_start,time_end,split\nzzzzzzzzzzz,1,11,test\n"
    source = make(
        "kinetics",
        {"train.csv": train, "validate.csv": val, "test.csv": test},
        "train/--nQbRBEz2s_000104_000114.mp4",  # CVDF
        "videos_train/playing_harp/_dbcJuKJQNs_000040_000050.mkv",  # OpenMMLab
        "train/abseiling/abcdefghijk_000007_000017.mp4",  # the crawler; corrupted, with a replacement
        "replacement/replacement_for_corrupted_k400/abcdefghijk_000007_000017.mp4",
        "whole/---QUuC4vJs.mp4",
        "test/zzzzzzzzzzz_000001_000011.mp4",
        "other/nobody_000001_000011.mp4",
        "notes.txt",
    )
    assert by_path(source) == {
        "train/--nQbRBEz2s_000104_000114.mp4": ({"label": "air drumming"}, "--nQbRBEz2s", "train"),
        "videos_train/playing_harp/_dbcJuKJQNs_000040_000050.mkv": (
            {"label": "playing harp"},
            "_dbcJuKJQNs",
            "train",
        ),
        "replacement/replacement_for_corrupted_k400/abcdefghijk_000007_000017.mp4": (
            {"label": "abseiling"},
            "abcdefghijk",
            "train",
        ),
        "whole/---QUuC4vJs.mp4": ({"label": "testifying"}, "---QUuC4vJs", "val"),
        "test/zzzzzzzzzzz_000001_000011.mp4": ({}, "zzzzzzzzzzz", "test"),
    }
    cuts = {item.path: (item.start, item.end) for item in source.items if item.end is not None}
    assert cuts == {"whole/---QUuC4vJs.mp4": (84.0, 94.0)}
    assert source.rejected == {"gone_000000_000010": "missing"}
    left_out = {".txt": 1, "(not in the annotations)": 1, "(another file of this name is taken)": 1}
    assert source.ignored == left_out and source.label_sets == ["label"]


def test_kinetics_without_split_column_and_with_repeated_rows(make):
    rows = "label,youtube_id,time_start,time_end\na,xx,0,10\na,xx,0,10\n"
    source = make("kinetics", {"kinetics_val.csv": rows}, "xx_000000_000010.mp4")
    assert [item.split for item in source.items] == ["val"] and source.ignored == {"(named twice)": 1}
    with pytest.raises(UserError, match=r"kinetics_val\.csv:3: .*is b \(val\) here, but a \(val\) in line 2"):
        make("kinetics", {"kinetics_val.csv": rows[:-10] + "b,xx,0,10\n"})


def ssv2(i: int, template: str) -> dict:
    return {"id": str(i), "label": "holding potato", "template": template, "placeholders": ["potato"]}


def test_something_something_v2(make):
    lists = {
        "something-something-v2-train.json": json.dumps(
            [ssv2(78687, "Holding [something] next to [something]")]
        ),
        "something-something-v2-validation.json": json.dumps(
            [ssv2(2, "Closing [something]"), ssv2(3, "Closing [something]")]
        ),
        "something-something-v2-test.json": json.dumps([{"id": "1420"}]),
        "something-something-v2-labels.json": json.dumps(
            {"Closing something": "0", "Holding something next to something": "1"}
        ),
    }
    source = make("ssv2", lists, "78687.webm", "2.webm", "1420.webm", "5.webm")
    assert by_path(source) == {
        "78687.webm": ({"label": "Holding something next to something"}, None, "train"),
        "2.webm": ({"label": "Closing something"}, None, "val"),
        "1420.webm": ({}, None, "test"),
    }
    assert source.rejected == {"3": "missing"} and source.ignored == {"(not in the annotations)": 1}


UCF = {
    "classInd.txt": "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n",
    "trainlist01.txt": "",
    "testlist01.txt": "",
}


def test_ucf101(make):
    source = make(
        "ucf101",
        {
            **UCF,
            "trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n"
            "HandStandPushups/v_HandStandPushups_g08_c02.avi 2\r\n",
            "testlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\n"
            "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c02.avi\r\n",
        },
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "UCF-101/HandstandPushups/v_HandStandPushups_g08_c02.avi",
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.mp4",
    )
    assert by_path(source) == {
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi": (
            {"label": "ApplyEyeMakeup"},
            "v_ApplyEyeMakeup_g08",
            "train",
        ),
        "UCF-101/HandstandPushups/v_HandStandPushups_g08_c02.avi": (
            {"label": "HandstandPushups"},
            "v_HandStandPushups_g08",
            "train",
        ),
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.mp4": (
            {"label": "ApplyEyeMakeup"},
            "v_ApplyEyeMakeup_g01",
            "test",
        ),
    }
    assert source.rejected == {"ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c02.avi": "missing"}


def test_real_ucf101_clips(make, tmp_path):
    real = Path(__file__).parents[4] / "shared/data/ucf101_5"
    if not real.is_dir():
        pytest.skip("the UCF101 videos are not beside the checkout")
    clips = sorted(p.relative_to(real).as_posix() for p in real.rglob("*.avi"))
    classes = sorted({c.split("/")[0] for c in clips})
    test = [c for c in clips if c.split("_g")[1][:2] <= "07"]
    (tmp_path / "classInd.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(classes, 1)))
    train = [f"{c} {classes.index(c.split('/')[0]) + 1}\n" for c in clips if c not in test]
    (tmp_path / "trainlist01.txt").write_text("".join(train))
    (tmp_path / "testlist01.txt").write_text("".join(f"{c}\n" for c in test))
    ours = read_source(real, "ucf101", sorted(tmp_path.glob("*.txt")))
    theirs = read_source(real)
    assert [(i.path, i.labels, i.split) for i in ours.items] == [
        (i.path, i.labels, i.split) for i in theirs.items
    ]
    assert not ours.rejected and len(ours.items) == 170


def test_hmdb51(make):
    a, b = "April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "Two_Towers_4_wave_u_cm_np1_fr_med_1.avi"
    source = make(
        "hmdb51",
        {
            "brush_hair_test_split1.txt": f"{a} 1 \n{a.replace('goo_0', 'goo_1')} 2 \n"
            "lost_brush_hair_u_0.avi 2 \n",
            "wave_test_split1.txt": f"{b} 0 \n{a} 2 \n",
        },
        *(f"brush_hair/{x}" for x in (a, a.replace("goo_0", "goo_1"))),
        f"wave/{b}",
        f"wave/{a}",  # the same name in two classes: each list refers to its own
    )
    assert by_path(source) == {
        f"brush_hair/{a}": ({"label": "brush_hair"}, "April_09", "train"),
        "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_1.avi": ({"label": "brush_hair"}, "April_09", "test"),
        f"wave/{a}": ({"label": "wave"}, None, "test"),
    }
    assert source.rejected == {"brush_hair/lost_brush_hair_u_0.avi": "missing"}
    assert source.ignored == {"(in neither part of the split)": 1}


def test_diving48(make):
    train = [{"vid_name": "-mmq0PT-u8k_00155", "label": 0, "start_frame": 0, "end_frame": 48}]
    test = [{"vid_name": "2x00lRzlTVQ_00000", "label": 1, "start_frame": 0, "end_frame": 60}]
    lists = {"Diving48_V2_train.json": json.dumps(train), "Diving48_V2_test.json": json.dumps(test)}
    files = ("rgb/-mmq0PT-u8k_00155.mp4", "rgb/2x00lRzlTVQ_00000.mp4")
    source = make("diving48", lists, *files)
    assert by_path(source)["rgb/2x00lRzlTVQ_00000.mp4"] == ({"label": "1"}, "2x00lRzlTVQ", "test")
    vocab = [["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "15Twis", "FREE"]]
    source = make("diving48", {**lists, "Diving48_vocab.json": json.dumps(vocab)}, *files)
    assert by_path(source)["rgb/-mmq0PT-u8k_00155.mp4"] == (
        {"label": "Back 15som 05Twis FREE"},
        "-mmq0PT-u8k",
        "train",
    )


JESTER = {
    "jester-v1-train.csv": "34870;Drumming Fingers\n",
    "jester-v1-labels.csv": "Drumming Fingers\nNo gesture\n",
}


def test_jester(make):
    lists = {**JESTER, "jester-v1-validation.csv": "9;No gesture\n", "jester-v1-test.csv": "1420\n"}
    source = make("jester", lists, "34870.mp4", "1420.webm")
    assert by_path(source) == {
        "34870.mp4": ({"label": "Drumming Fingers"}, None, "train"),
        "1420.webm": ({}, None, "test"),
    }
    assert source.rejected == {"9": "missing"}
    for folder in ("9", "20bn-jester-v1/9"):
        with pytest.raises(
            UserError, match=r"9: a folder of frames; expected a video .*ffmpeg -framerate 12"
        ):
            make("jester", lists, f"{folder}/00001.jpg")


EPIC = (
    "narration_id,participant_id,video_id,narration_timestamp,"
    "start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
ROW = "P01_01_{i},P01,{video},00:00:01.089,{start},{stop},8,202,open door,open,3,door,3,['door'],[3]\n"


def test_epic_kitchens(make):
    train = EPIC + ROW.format(i=0, video="P01_01", start="00:00:00.14", stop="00:00:03.37")
    train += ROW.format(i=1, video="P01_01", start="01:02:03.5", stop="01:02:04")
    train += ROW.format(i=2, video="P01_01", start="01:02:03.5", stop="01:02:04").replace("open,3", "take,0")
    train += ROW.format(i=3, video="P01_09", start="00:00:00.14", stop="00:00:03.37")
    test = EPIC.partition(",narration,")[0] + "\n"
    test += "P02_101_0,P02,P02_101,00:00:02.851,00:00:02.86,00:00:03.87,143,193\n"
    lists = {"EPIC_100_train.csv": train, "EPIC_100_test_timestamps.csv": test}
    files = ("P01/videos/P01_01.MP4", "P02/videos/P02_101.MP4")
    source = make("epic_kitchens", lists, *files)
    numbers = {"verb": "3", "noun": "3", "action": "3,3"}
    assert source.items == [
        SourceItem(files[0], numbers, "P01", "train", 0.14, 3.37),
        SourceItem(files[0], numbers, "P01", "train", 3723.5, 3724.0),
        SourceItem(files[1], {}, "P02", "test", 2.86, 3.87),
    ]
    assert source.label_sets == ["verb", "noun", "action"] and source.rejected == {
        "P01/videos/P01_09.MP4": "missing"
    }
    assert source.ignored == {"(second narration of a segment)": 1}
    keys = {
        "EPIC_100_verb_classes.csv": "id,key,instances,category\n0,take,\"['take', 'g']\",x\n"
        "3,open,['open'],access\n",
        "EPIC_100_noun_classes_v2.csv": '"id","key","instances","category"\n'
        '3,"cupboard","[\'cupboard\']","storage"\n',
    }
    named = make("epic_kitchens", {**lists, **keys}, *files)
    assert named.items[0].labels == {"verb": "open", "noun": "cupboard", "action": "open,cupboard"}


def test_unlabelled_lists(make):
    source = make(
        "unlabelled",
        {
            "HowTo100M_v1.csv": "video_id,category_1,category_2,rank,task_id\n"
            "nVbIUDjzWY4,Cars,X,27,9\nlost,Cars,X,1,2\n"
        },
        "a/b/nVbIUDjzWY4.webm",
    )
    assert source.items == [SourceItem("a/b/nVbIUDjzWY4.webm", {}, "nVbIUDjzWY4")] and source.rejected == {
        "lost": "missing"
    }
    cuts = {"cuts.csv": "video_id,start,end\nnVbIUDjzWY4,1.5,4\nnVbIUDjzWY4,,1.5\nnVbIUDjzWY4,9,\n"}
    assert [(i.start, i.end) for i in make("unlabelled", cuts).items] == [
        (None, 1.5),
        (1.5, 4.0),
        (9.0, None),
    ]
    source = make(
        "unlabelled", {"list.txt": "a/b/nVbIUDjzWY4.webm\n\nc.mp4\nlost.mp4\nd.doc"}, "c.mp4", "d.doc"
    )
    assert [item.path for item in source.items] == [
        "a/b/nVbIUDjzWY4.webm",
        "c.mp4",
    ] and source.label_sets == []
    assert source.rejected == {"d.doc": "unknown_extension", "lost.mp4": "missing"}


def test_imagenet_with_folders_and_with_a_flat_val(make):
    train = "ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_18.JPEG"
    flat = [f"val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2)]
    kit = {"ILSVRC2012_validation_ground_truth.txt": "2\n1\n2\n", "wnids.txt": "n01440764\nn01443537\n"}
    source = make("imagenet", kit, train, *flat, "test/ILSVRC2012_test_00000001.JPEG", "cat.jpg")
    assert {path: (labels.get("label"), split) for path, (labels, _, split) in by_path(source).items()} == {
        train: ("n01440764", "train"),
        flat[0]: ("n01443537", "val"),
        flat[1]: ("n01440764", "val"),
        "test/ILSVRC2012_test_00000001.JPEG": (None, "test"),
    }
    assert source.rejected == {"ILSVRC2012_val_00000003.JPEG": "missing"}
    assert source.ignored == {"(not named as in ImageNet)": 1}
    with pytest.raises(UserError, match=r"val_00000001\.JPEG: in no synset folder; expected --annotations"):
        make("imagenet", {})
    with pytest.raises(UserError, match=r"truth\.txt:2: '3': expected a class number from 1 to 2"):
        make("imagenet", {**kit, "ILSVRC2012_validation_ground_truth.txt": "1\n3\n"})


def test_imagenet_val_in_synset_folders(make):
    source = make(
        "imagenet", {}, "val/n01443537/ILSVRC2012_val_00000001.JPEG", "train/n01440764/n01440764_1.JPEG"
    )
    assert [(i.labels["label"], i.split) for i in source.items] == [
        ("n01440764", "train"),
        ("n01443537", "val"),
    ]


def test_imagenet_meta_mat(make, tmp_path):
    io = pytest.importorskip("scipy.io")
    import numpy as np

    rows = [(1, "n01440764", 0), (2, "n01443537", 0), (1001, "n00001740", 2)]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    io.savemat(tmp_path / "meta.mat", {"synsets": synsets[:, None]})
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n")
    make("imagenet", {}, "train/n01440764/n01440764_1.JPEG", "val/n01443537/ILSVRC2012_val_00000001.JPEG")
    kit = [tmp_path / "ILSVRC2012_validation_ground_truth.txt", tmp_path / "meta.mat"]
    (tmp_path / "videos/val/n01443537/ILSVRC2012_val_00000001.JPEG").rename(
        tmp_path / "videos/ILSVRC2012_val_00000001.JPEG"
    )
    source = read_source(tmp_path / "videos", "imagenet", kit)
    assert [i.labels["label"] for i in source.items] == ["n01443537", "n01440764"]


def test_csv_with_segments(make):
    text = "path,label_verb,start,end,group\na.mp4,open,0,1.5,g\na.mp4,close,1.5,,g\nb.mp4,open,,,h\n"
    source = make("csv", {"mine.csv": text}, "a.mp4", "b.mp4")
    assert source.items == [
        SourceItem("a.mp4", {"verb": "open"}, "g", None, 0.0, 1.5),
        SourceItem("a.mp4", {"verb": "close"}, "g", None, 1.5, None),
        SourceItem("b.mp4", {"verb": "open"}, "h"),
    ]


def test_json_lines(make):
    rows = [
        {
            "path": "a.mp4",
            "labels": {"verb": "open", "noun": 7},
            "group": "g",
            "split": "train",
            "start": 1,
            "end": 2.5,
        },
        {"path": "a.mp4", "label": "x", "split": "val", "start": 3},
        {"path": "lost.mp4", "split": "val"},
    ]
    source = make("jsonl", {"list.jsonl": "\n".join(map(json.dumps, rows)) + "\n"}, "a.mp4")
    assert source.items == [
        SourceItem("a.mp4", {"verb": "open", "noun": "7"}, "g", "train", 1.0, 2.5),
        SourceItem("a.mp4", {"label": "x"}, None, "val", 3.0),
    ]
    assert source.label_sets == ["verb", "noun", "label"] and source.rejected == {"lost.mp4": "missing"}


KIN, TWO = "kinetics", '[\n {"id": "1", "template": "a"},\n {"id": "2"}\n]'


@pytest.mark.parametrize(
    "kind, annotations, message",
    [
        (KIN, {}, "needs --annotations FILE .*: train.csv"),
        (KIN, {"train.csv": ""}, r"train\.csv: empty; expected a header line with the columns youtube_id"),
        (KIN, {"train.csv": "label,id\n"}, r"train\.csv:1: no column `youtube_id` \(found: label, id\)"),
        (KIN, {"train.csv": K400}, r"train\.csv: no line after the header"),
        (KIN, {"train.csv": K400 + "a,b,0,10,train\n"}, r"train\.csv:2: a different number of columns"),
        (
            KIN,
            {"train.csv": K400 + "a,b,0,10,holdout,0\n"},
            r"train\.csv:2: split 'holdout': expected train, val",
        ),
        (KIN, {"train.csv": K400 + "a,b,x,10,train,0\n"}, r"train\.csv:2: start 'x': expected seconds"),
        (KIN, {"train.csv": K400 + "a,b,10,10,train,0\n"}, r"train\.csv:2: start 10 is not before end 10"),
        (KIN, {"train.csv": K400 + "a,,0,10,train,0\n"}, r"train\.csv:2: expected youtube_id, time_start"),
        (
            KIN,
            {"all.csv": "label,youtube_id,time_start,time_end\na,b,0,10\n"},
            r"all\.csv: its name must say",
        ),
        (
            KIN,
            {"train.csv": K400 + "a,gone,0,10,train,0\n"},
            r"none of its 1 files is there.*gone_000000_000010",
        ),
        ("ssv2", {"train.json": "{}"}, r"train\.json:1: expected a list of objects with id, template"),
        ("ssv2", {"train.json": '[\n{"id": "1"\n]'}, r"train\.json:3: not JSON"),
        ("ssv2", {"train.json": TWO}, r"train\.json:3: .*expected an object with id, template"),
        (
            "ssv2",
            {"train.json": TWO.replace('"2"', '"2", "template": "[b]"'), "labels.json": '{"a": "0"}'},
            r"train\.json:3: class 'b': expected one of the 1",
        ),
        ("ssv2", {"train.json": "[]", "labels.json": "[]"}, r"labels\.json:1: expected an object"),
        ("ucf101", {"trainlist01.txt": "A/v_A_g01_c01.avi 1\n"}, r"0 classInd\.txt among the annotations"),
        (
            "ucf101",
            {**UCF, "trainlist01.txt": "A/v_A_g01_c01.avi 1\n"},
            r"trainlist01\.txt:1: .*CLASS being in",
        ),
        (
            "ucf101",
            {**UCF, "trainlist01.txt": "HandstandPushups/v_H_g01_c01.avi 1\n"},
            r":1: class number 1 .*expected 2",
        ),
        (
            "ucf101",
            {**UCF, "trainlist01.txt": "HandstandPushups/v_H_g01_c01.avi\n"},
            r":1: .*expected CLASS/FILE\.avi NUMBER",
        ),
        (
            "ucf101",
            {**UCF, "testlist01.txt": "HandstandPushups/v_H_g01_c01.avi 2\n"},
            r":1: .*expected CLASS/FILE\.avi$",
        ),
        (
            "ucf101",
            {
                **UCF,
                "trainlist01.txt": "HandstandPushups/v_H_g01_c01.avi 2\n",
                "testlist02.txt": "HandstandPushups/v_H_g01_c01.avi\n",
            },
            r"testlist02\.txt:1: .*\(test\) here, but .*\(train\) in .*list01\.txt:1",
        ),
        ("ucf101", {"classInd.txt": "1 A\nB\n"}, r"classInd\.txt:2: 'B': expected NUMBER CLASS"),
        ("hmdb51", {"wave_split1.txt": "a.avi 1\n"}, r"expected a file called CLASS_test_split1\.txt"),
        ("hmdb51", {"wave_test_split1.txt": "a.avi 3\n"}, r"split1\.txt:1: 3: expected 0 \(neither\)"),
        (
            "hmdb51",
            {"wave_test_split1.txt": "a.avi\n"},
            r"split1\.txt:1: 'a\.avi': expected FILE\.avi NUMBER",
        ),
        (
            "hmdb51",
            {"a_test_split1.txt": "a.avi 1\n", "b_test_split2.txt": "b.avi 1\n"},
            r"of another split than",
        ),
        (
            "diving48",
            {"V2_train.json": '[{"vid_name": "a_1", "label": 48}]'},
            r"json:1: label 48: expected a number from 0 to 47",
        ),
        ("jester", {"jester-v1-train.csv": "1\n"}, r"train\.csv:1: '1': expected ID;CLASS$"),
        (
            "jester",
            {**JESTER, "jester-v1-train.csv": "1;Waving\n"},
            r"train\.csv:1: class 'Waving': expected one of the 2",
        ),
        (
            "epic_kitchens",
            {"EPIC_100_train.csv": EPIC + ROW.format(i=0, video="P01_01", start="1.2", stop="3")},
            r"csv:2: time '1\.2'",
        ),
        (
            "epic_kitchens",
            {
                "EPIC_100_train.csv": EPIC
                + ROW.format(i=0, video="P01_01", start="00:00:02.0", stop="00:00:01.9")
            },
            r"csv:2: stop_timestamp 00:00:01\.9: expected one after",
        ),
        (
            "epic_kitchens",
            {"EPIC_100_train.csv": EPIC.replace("verb_class", "verb_id") + "\n"},
            r":1: no column `verb_class`",
        ),
        ("unlabelled", {"list.json": "[]"}, r"expected a \.txt of paths or a \.csv"),
        (
            "unlabelled",
            {"list.txt": "a.mp4\n../b.mp4\n"},
            r"list\.txt:2: path '\.\./b\.mp4': expected a path inside",
        ),
        ("imagenet", {"ILSVRC2012_validation_ground_truth.txt": "1\n"}, "expected both"),
        (
            "imagenet",
            {"ILSVRC2012_validation_ground_truth.txt": "1\n", "wnids.txt": "cat\n"},
            r"wnids\.txt:1: 'cat'",
        ),
        (
            "csv",
            {"mine.csv": "path,label,start,end\na.mp4,x,2,1\n"},
            r"mine\.csv:2: start 2 is not before end 1",
        ),
        (
            "csv",
            {"mine.csv": "path,label,start\na.mp4,x,-1\n"},
            r"mine\.csv:2: start '-1': expected seconds, 0 or more",
        ),
        (
            "csv",
            {"mine.csv": "path,label,start\na.mp4,x,nan\n"},
            r"mine\.csv:2: start 'nan': expected seconds",
        ),
        (
            "csv",
            {"mine.csv": "path,label,start\na.mp4,x,1\na.mp4,y,1.0\n"},
            r"mine\.csv:3: a\.mp4 is named again \(first in line 2\)",
        ),
        ("jsonl", {"l.jsonl": '{"path": "a.mp4"\n'}, r"l\.jsonl:1: not JSON"),
        (
            "jsonl",
            {"l.jsonl": '{"path": "a.mp4", "lable": "x"}\n'},
            r"l\.jsonl:1: .*no other keys than path, label",
        ),
        ("jsonl", {"l.jsonl": '{"label": "x"}\n'}, r"l\.jsonl:1: path None: expected a path inside"),
        (
            "jsonl",
            {"l.jsonl": '{"path": "a.mp4", "label": "x", "labels": {}}\n'},
            r":1: both `label` and `labels`",
        ),
        (
            "jsonl",
            {"l.jsonl": '{"path": "a.mp4", "label": 1.5}\n'},
            r":1: label label 1\.5: expected a name or a whole number",
        ),
        ("jsonl", {"l.jsonl": '{"path": "a.mp4", "start": true}\n'}, r":1: start True: expected seconds"),
        ("folder", {"x.csv": ""}, "--source csv does"),
        ("webdataset", {}, r"vidssl scan"),
        ("kinetic", {}, "--source kinetic: expected one of folder, imagefolder, csv"),
    ],
)
def test_invalid_annotations(make, kind, annotations, message):
    with pytest.raises(UserError, match=message) as e:
        make(kind, annotations, "a.mp4")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", [k for k in SOURCES if k not in ("folder", "imagefolder", "imagenet")])
def test_missing_or_binary_annotation_file(tmp_path, kind):
    name = {
        "ucf101": "classInd.txt",
        "hmdb51": "wave_test_split1.txt",
        "ssv2": "train.json",
        "diving48": "train.json",
    }
    file = tmp_path / name.get(kind, "train.txt" if kind == "jester" else "train.csv")
    with pytest.raises(UserError, match=r"No such file.*; expected an annotation file"):
        read_source(tmp_path, kind, [file])
    file.write_bytes(b"caf\xe9,\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_source(tmp_path, kind, [file])


def test_line_numbers_of_json_objects(tmp_path):
    entries = [{"id": f"a, ]\n{i}", "x": [1, {"y": 2}]} for i in range(3)]
    for indent, lines in ((None, [1, 1, 1]), (1, [2, 11, 20])):
        (tmp_path / "l.json").write_text(" " + json.dumps(entries, indent=indent) + "\n")
        found = list(json_objects(tmp_path / "l.json", ["id"]))
        assert [e for _, e in found] == entries
        starts = json.dumps(entries, indent=indent).split("\n")
        want = [1] * 3 if indent is None else [i for i, x in enumerate(starts, 1) if x == " {"]
        assert [int(w.rpartition(":")[2]) for w, _ in found] == want, lines

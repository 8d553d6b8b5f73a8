"""data_prep.scan and data.reader=stream on shards of others, damaged and odd ones too."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packed_files import read_records

from data_prep import pack, scan, verify
from vidssl.core.errors import UserError
from vidssl.data.augment import RandomCrop
from vidssl.data.decoding import open_video
from vidssl.data.loader import make_streams, open_shards, train_steps
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards
from vidssl.data.tar_files import is_system_file

Members = list[tuple[str, bytes]]


def tar_bytes(members: Members, **kind) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def labelled(make_image) -> Members:
    """Four pictures, each with a .json that has its label."""
    return [
        member
        for i in range(4)
        for member in ((f"{i}.png", make_image("png")), (f"{i}.json", b'{"label": %d}' % (i % 2)))
    ]


@pytest.fixture
def scanned(tmp_path, capsys) -> Callable[[bytes], tuple[dict[str, int], str]]:
    """Writes a shard, scans it and returns the label of each key, and what was said."""

    def scan_bytes(data: bytes, name: str = "a.tar") -> tuple[dict[str, int], str]:
        (tmp_path / name).write_bytes(data)
        scan.main([str(tmp_path)])
        verify.main([str(tmp_path)])
        labels = {s.key: s.meta["label"] for s in Shards([str(tmp_path)]).list_samples()}
        return labels, capsys.readouterr().out

    return scan_bytes


def streamed(folder: Path, steps: int = 3, **more) -> list[tuple[str, int]]:
    """Key and label of the clips of steps of 4."""
    data = DataConfig([str(folder)], frames=1, stride=1, reader="stream", shuffle_buffer=2, **more)
    streams = make_streams(data, open_shards(data)[0], RandomCrop(16), 0, 4, 10)
    batches = [batch for (batch,) in train_steps(streams, 0, steps, [4], workers=0, isolate=False)]
    return [pair for batch in batches for pair in zip(batch.key, batch.label.tolist(), strict=True)]


LABELS = {"0": 0, "1": 1, "2": 0, "3": 1}


@pytest.mark.parametrize(
    "order", [lambda m: m[::2] + m[1::2], lambda m: m[1::2] + m[::2], lambda m: m[:1] + m[:0:-1]]
)
def test_members_that_do_not_follow_each_other_are_joined(order, labelled, scanned, tmp_path):
    labels, said = scanned(tar_bytes(order(labelled)))
    assert labels == LABELS and "do not follow each other; they were joined" in said
    with pytest.raises(UserError, match=r"a\.tar: the members of sample \w do not follow .*vidssl scan"):
        streamed(tmp_path, max_decode_error_rate=1.0)


def apple_double(members: Members) -> Members:
    junk = b"\0\5\x16\7" + bytes(80)
    return [x for name, data in members for x in ((f"./._{name}", junk), (f"./{name}", data))]


def archived_by_a_mac(members: Members) -> Members:
    copies = [(f"__MACOSX/._{name}", b"junk") for name, _ in members]
    return [(".DS_Store", b"x"), *members[:3], *copies, *members[3:], ("Thumbs.db", b"y")]


def with_pax_folders(members: Members) -> Members:
    return [("PaxHeaders.123/0.png", b"1"), *members, ("@eaDir/0.png", b"2"), ("desktop.ini", b"3")]


def with_many_other_files(members: Members) -> Members:
    return [("README", b"x"), ("__meta__/info.json", b"{}"), *members, ("3.txt", b"7"), ("3.npy", b"0")]


@pytest.mark.parametrize("change", [apple_double, archived_by_a_mac, with_pax_folders, with_many_other_files])
def test_files_of_operating_systems_are_ignored(change, labelled, scanned, tmp_path):
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    labels, said = scanned(tar_bytes(change(labelled)))
    assert labels == LABELS and "left out, " in said
    assert dict(streamed(tmp_path)) == LABELS


def test_names_of_system_files():
    for name in ("a/._b.mp4", "__MACOSX/b.mp4", ".DS_Store", "x/Thumbs.db", "PaxHeader/b.mp4", "ehthumbs.db"):
        assert is_system_file(name)
    for name in ("a/b.mp4", "_b.mp4", "thumbs/b.mp4", "b.db", "macosx/a.jpg", "a_._b.mp4"):
        assert not is_system_file(name)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_that_follow_each_other_are_read_to_the_end(kind, labelled, scanned, tmp_path):
    parts = [tar_bytes(labelled[2 * i : 2 * i + 2], format=kind) for i in range(4)]
    labels, _ = scanned(bytes(1024) + b"".join(parts))
    assert labels == LABELS and dict(streamed(tmp_path)) == LABELS


def test_long_and_absolute_names(labelled, scanned, tmp_path):
    long = "/root/" + "x" * 120 + "/"
    labels, _ = scanned(
        tar_bytes([(long + name, data) for name, data in labelled], format=tarfile.PAX_FORMAT)
    )
    assert labels == {long + key: label for key, label in LABELS.items()}


def damaged_tars(members: Members) -> dict[str, tuple[bytes, str]]:
    whole = tar_bytes(members)
    end = whole.rindex(b'{"label": 1}') + 512
    return {
        "cut in a file": (whole[: whole.index(b"2.png") + 550], "unexpected end of data"),
        "cut in a header": (whole[: whole.index(b"2.png") + 100], r"no header of a tar at byte \d+, after 4"),
        "garbage in the middle": (
            tar_bytes(members[:4])[:-1024].rstrip(b"\0") + b"x" * 4096 + whole,
            "no header of a tar|unexpected",
        ),
        "garbage at the end": (whole + b"x" * 512, r"no header of a tar at byte \d+, after 8 members"),
        "gzip": (gzip.compress(whole), r"it is compressed \(gzip\); unpack it"),
        "empty": (b"", "not a plain tar file: empty file"),
        "text": (b"no tar" * 1000, "not a plain tar file"),
        "twice": (tar_bytes([*members, members[0]]), r"'0\.png' occurs twice"),
        "two archives with the same keys": (whole + whole, r"'0\.png' occurs twice"),
        "end cut off": (whole[:end], ""),
    }


@pytest.mark.parametrize("damage", damaged_tars([("0.png", b"")] * 2 + [("2.png", b'{"label": 1}')] * 2))
def test_damaged_tars_are_refused_or_said(damage, labelled, scanned):
    data, says = damaged_tars(labelled)[damage]
    if not says:
        labels, said = scanned(data)
        assert labels == LABELS and "no end-of-archive mark; it may be cut" in said
        return
    with pytest.raises(UserError, match=rf"a\.tar: .*({says})") as e:
        scanned(data)
    assert "\n" not in str(e.value)


def test_links_devices_and_holes_are_ignored(labelled, scanned, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.png")
            info.type = kind
            info.linkname = "/etc/passwd"
            tar.addfile(info)
        for name, data in labelled:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    labels, said = scanned(out.getvalue())
    assert labels == LABELS and "left out, link: 2" in said and "left out, device or pipe: 2" in said
    assert dict(streamed(tmp_path)) == LABELS


@pytest.mark.parametrize(
    "names",
    [
        ("imagenet1k-train-0000", "imagenet1k-train-0001", "imagenet1k-validation-0000"),
        ("train_000", "test_000"),
        ("k400_Val", "k400_Test-1", "extra"),
    ],
)
def test_shards_of_several_splits_are_no_one_set(names, labelled, tmp_path, capsys):
    for i, name in enumerate(names):
        own = [(f"{i}-{member}", data) for member, data in labelled]
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(own))
    with pytest.raises(UserError, match=r"shards of several splits: .*\(val|test\)"):
        scan.main([str(tmp_path)])
    with pytest.raises(UserError, match="shards of several splits"):
        streamed(tmp_path)
    scan.main([str(tmp_path), "--splits", "none"])
    assert f"{4 * len(names)} samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names", [("train-0", "train-1"), ("0", "1"), ("test-0", "0"), ("train_val-0", "train-1")]
)
def test_shards_of_one_split(names, labelled, tmp_path, capsys):
    for i, name in enumerate(names):
        own = [(f"{i}-{member}", data) for member, data in labelled]
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(own))
    scan.main([str(tmp_path)])
    assert "8 samples in 2 shards" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["b.tar.gz", "b.tgz", "b.tar.zst", "below/b.tar", None, "._b.tar", "b.txt"])
def test_archives_that_are_not_read_are_said(other, labelled, scanned, tmp_path):
    if other:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"x")
    said = scanned(tar_bytes(labelled))[1]
    expected = other is not None and "b.t" in other and other not in ("._b.tar", "b.txt")
    assert (f"1 archive not read, such as {other}" in said) is expected


def test_splits_that_samples_name_are_said(make_image, scanned):
    splits = ("train", "training", "validation", "test", 3, None)
    members = [
        member
        for i, split in enumerate(splits)
        for member in ((f"{i}.png", make_image("png")), (f"{i}.json", json.dumps({"split": split}).encode()))
    ]
    assert '"split" of .json: test (1), train (2), val (1)' in scanned(tar_bytes(members))[1]
    assert "name splits" not in scanned(tar_bytes(members[:4]))[1]


def test_folders_without_shards(tmp_path):
    with pytest.raises(UserError, match=r"none: no such folder$"):
        scan.main([str(tmp_path / "none")])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"no \.tar file in it; scan each of the folders .* do: train"):
        scan.main([str(tmp_path)])
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.tar\.gz is compressed: unpack it"):
        scan.main([str(tmp_path)])


# --- labels ---


@pytest.fixture
def packed_sets(tmp_path_factory, make_image) -> Path:
    """A folder that pack wrote, with two label sets."""
    root = tmp_path_factory.mktemp("sets")
    (root / "in").mkdir()
    names = {"motion": ("up", "down"), "appearance": ("red", "green", "blue")}
    lines = []
    for i in range(6):
        (root / "in" / f"{i}.png").write_bytes(make_image("png"))
        labels = {label_set: values[i % len(values)] for label_set, values in names.items()}
        lines.append(json.dumps({"path": f"{i}.png", "labels": labels}) + "\n")
    (root / "list.jsonl").write_text("".join(lines))
    options = ["--source", "jsonl", "--annotations", str(root / "list.jsonl"), "--workers", "1"]
    pack.main([str(root / "in"), str(root / "out"), *options])
    return root / "out"


def pictures_with(make_image, metas: list[bytes | None], ext: str = "json") -> bytes:
    image = make_image("png")
    members = []
    for i, meta in enumerate(metas):
        members += [(f"{i}.png", image)] + ([] if meta is None else [(f"{i}.{ext}", meta)])
    return tar_bytes(members)


@pytest.mark.parametrize(
    ("metas", "ext", "classes", "labels"),
    [
        ([b"0", b"1", b"-1", b"", None], "cls", ["0", "1"], [0, 1, -1, -1, -1]),
        ([b"10", b"2", b"0"], "cls", [str(i) for i in range(11)], [10, 2, 0]),
        ([b"run", b"\xef\xbb\xbfclap\r\n", b"run"], "cls", ["clap", "run"], [1, 0, 1]),
        ([b'{"label":"b"}', b'{"class":"a"}'], "json", ["a", "b"], [1, 0]),
        ([b'{"label":1,"class":"x"}', b'{"label":0,"class":"y"}'], "json", ["y", "x"], [1, 0]),
        ([b'{"label":0,"class":"x"}', b'{"class":"x"}'], "json", ["x"], [0, 0]),
        ([b'{"label":1,"class":"x"}', b'{"label":0,"class":"x"}'], "json", ["0", "1"], [1, 0]),
        ([b'{"label":1,"class":"x"}', b'{"label":1,"class":"y"}'], "json", ["0", "1"], [1, 1]),
    ],
)  # fmt: skip
def test_classes(metas, ext, classes, labels, make_image, scanned, tmp_path):
    got, _ = scanned(pictures_with(make_image, metas, ext))
    assert list(got.values()) == labels and Shards([str(tmp_path)]).classes == {"label": classes}


SETS = {
    "pack's": (
        [{"motion": 1, "appearance": 0}, {"motion": 0, "appearance": 2}, {"appearance": 1}],
        [(1, "up"), (0, "down"), (-1, None)],
        {"motion": ["down", "up"], "appearance": ["0", "1", "2"]},
    ),
    "no label": ([{"verb": 0, "noun": 1}, {"verb": 2}], None, {"noun": ["0", "1"], "verb": ["0", "1", "2"]}),
    "of several": ([{"verb": [0, 3], "noun": -1}], None, {"verb": ["0", "1", "2", "3"]}),
    "a label of its own": (
        [{"verb": 1}, {"verb": 1}, {}],
        [(0, "a"), (1, "b"), (1, "b")],
        {"label": ["a", "b"], "verb": ["0", "1"]},
    ),
    "two equal sets": ([{"a": 0, "b": 0}], [(0, "x")], {"label": ["x"], "a": ["0"], "b": ["0"]}),
    "called label": ([{"label": 0, "verb": 0}], [(0, "x")], {"label": ["x"], "verb": ["0"]}),
}


@pytest.mark.parametrize("case", SETS)
def test_all_label_sets_have_classes(case, make_image, scanned, tmp_path):
    stored, main, classes = SETS[case]
    metas = [{"labels": labels, "captions": "x" * (70_000 * (i == 0))} for i, labels in enumerate(stored)]
    if main:
        metas = [meta | {"label": n, "class": name} for meta, (n, name) in zip(metas, main, strict=True)]
    _, said = scanned(pictures_with(make_image, [json.dumps(meta).encode() for meta in metas]))
    shards = Shards([str(tmp_path)])
    assert shards.classes == classes
    own = {"label"} & (classes.keys() - {name for labels in stored for name in labels})
    for sample, labels, (number, _) in zip(
        shards.list_samples(), stored, main or [(-1, None)] * len(stored), strict=True
    ):
        assert sample.meta["labels"] == labels | dict.fromkeys(own, number)
    unnamed = [name for name, names in classes.items() if names[0] == "0"]
    assert [
        line.split(":")[1].strip() for line in said.splitlines() if "names its classes" in line
    ] == unnamed
    assert "none with a sample" not in said and "no label was understood" not in said


def test_packed_shards_keep_their_label_sets(tmp_path, packed_sets):
    index = json.loads((packed_sets / "index.json").read_text())
    for tar in packed_sets.glob("*.tar"):
        (tmp_path / tar.name).symlink_to(tar)
    scan.main([str(tmp_path)])
    found = Shards([str(tmp_path)])
    assert {name: len(names) for name, names in found.classes.items()} == {"motion": 2, "appearance": 3}
    assert found.classes == index["classes"]
    before = [s.meta["labels"] for s in Shards([str(packed_sets)]).list_samples()]
    assert [s.meta["labels"] for s in found.list_samples()] == before


@pytest.mark.parametrize(
    "names, classes",
    [
        ([{"verb": "cut", "noun": "egg"}, {"verb": "wash"}], {"noun": ["0", "egg"], "verb": ["cut", "wash"]}),
        ([{"verb": "cut"}, {"verb": "cut"}], {"noun": ["0", "1"], "verb": ["0", "1"]}),  # not one to one
        ([["cut"], {"verb": 3}], {"noun": ["0", "1"], "verb": ["0", "1"]}),
    ],
)
def test_names_of_label_sets_are_those_that_samples_say(names, classes, make_image, scanned, tmp_path):
    labels = [{"verb": 0, "noun": 1}, {"verb": 1}]
    metas = [{"labels": numbers, "class_names": n} for numbers, n in zip(labels, names, strict=True)]
    scanned(pictures_with(make_image, [json.dumps(meta).encode() for meta in metas]))
    assert Shards([str(tmp_path)]).classes == classes


@pytest.mark.parametrize("key, value", [("label", ["a", "b"]), ("labels", ["a", "b"]), ("class", {"x": [1]})])
def test_labels_that_are_not_one_class_are_shown(key, value, make_image, scanned):
    _, said = scanned(pictures_with(make_image, [json.dumps({key: value, "caption": "c"}).encode()]))
    assert f"no label was understood: {key} = {json.dumps(value)}; expected the number or the name" in said


def test_numbers_beside_names_without_a_number(make_image, scanned):
    with pytest.raises(UserError, match="others only a class name, such as 'b'; which number is which name"):
        scanned(pictures_with(make_image, [b'{"label":1,"class":"a"}', b'{"class":"b"}']))


def test_what_was_understood_is_said(make_image, scanned, tmp_path):
    _, said = scanned(pictures_with(make_image, [b'{"label":"a"}', b'{"label":"a"}', b'{"label":"b"}', None]))
    assert "4 samples in 1 shard\n  0 videos, 4 images\n" in said
    assert "  label: 2 classes, largest a (2), smallest b (1)\n  without label: 1 sample (3)\n" in said
    assert json.loads((tmp_path / "summary.json").read_text())["classes"] == {"label": {"a": 2, "b": 1}}
    _, said = scanned(pictures_with(make_image, [b'{"verb":"a","frames":3}'] * 2))
    assert "no classes: no sample has a label" in said
    assert "warning: 2 samples have metadata (verb, frames), but no label was understood" in said


def test_records_are_strict_json(make_image, scanned, tmp_path):
    deep = b'{"label":0,"deep":' + b"[" * 200 + b"]" * 200 + b"}"
    scanned(pictures_with(make_image, [b'{"label":1,"s":NaN,"t":"\\ud800"}', deep]))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)


def test_large_metadata_are_left_out_of_the_index(make_image, scanned, tmp_path):
    _, said = scanned(pictures_with(make_image, [b'{"label":1,"captions":"%s"}' % (b"x" * 100_000)]))
    assert "left out, metadata beyond 64 KiB: 1" in said and (tmp_path / "a.jsonl").stat().st_size < 1000


# --- facts of others ---

CLAIMS = (
    {"frames": 20, "fps": 25.0, "width": 1920, "height": 1080},
    {"frames": 6, "fps": 25.0, "width": 48, "height": 64, "times": None, "decoder": "decord", "decord": True},
    {"frames": 20, "fps": 25.0},
    {"frames": ["1.jpg", "2.jpg"]},
    {"frames": 6, "fps": "25", "width": "64", "height": None, "times": [0.0]},
    {"frames": 2, "fps": 10.0, "width": 64, "height": 48, "times": [0.0, 9.0]},
)


@pytest.mark.parametrize("claims", CLAIMS)
@pytest.mark.parametrize("index", ["scan", "by hand"])
def test_frames_are_measured_whatever_others_say(claims, index, make_video, scanned, tmp_path):
    meta = json.dumps({"label": 0, **claims}).encode()
    scanned(tar_bytes([("0.mp4", make_video(6)), ("0.json", meta)]))
    if index == "by hand":  # as an earlier scan, or another tool, writes it
        (record,) = read_records(tmp_path, "*.jsonl")
        record["meta"] |= record["meta"].pop("claimed")
        lines = tmp_path / "a.jsonl"
        lines.write_text(json.dumps(record) + "\n")
        listed = json.loads((tmp_path / "index.json").read_text())
        listed["shards"][0] |= scan.shard_entry(tmp_path / "a.tar", 1)
        del listed["checksum"]
        (tmp_path / "index.json").write_text(json.dumps(listed))
    shards = Shards([str(tmp_path)])
    sample = shards.sample(0, 0)
    for decoder in ("auto", "decord"):
        with open_video(shards.read(sample), "mp4", sample.meta, decoder) as video:
            assert video.get(list(range(len(video.times)))).shape == (6, 48, 64, 3)
    assert [label for _, label in streamed(tmp_path, 1)] == [0] * 4

"""data_prep.pack, verify and scan."""

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from packed_files import file_hashes, read_records
from signal_at import signalled

from data_prep import pack, packing, scan, verify
from data_prep.encode import EncodedSample
from data_prep.index import class_lists, sample_key
from data_prep.inspect_file import FileInspector, Rejected
from data_prep.plan import split_train_test
from data_prep.sources import SourceItem, read_source
from vidssl.core.errors import UserError
from vidssl.data.decoding import open_video


@pytest.fixture(scope="module")
def packed(tiny_corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack.main([str(tiny_corpus), str(out), "--workers", "1", "--samples-per-shard", "3"])
    return out


def test_contents_of_a_pack(packed, tiny_corpus, frame_index):
    index = json.loads((packed / "index.json").read_text())
    assert (index["version"], index["samples"], index["rejected"]) == (1, 12, 0)
    assert index["classes"] == {"label": ["clap", "run", "wave"]}
    assert [s["samples"] for s in index["shards"]] == [3] * 4
    assert (packed / "rejected.jsonl").read_text() == ""
    assert {p.name for p in packed.iterdir()} == {
        "index.json",
        "plan.json",
        "rejected.jsonl",
        "report.json",
        "report.png",
        "summary.json",
    } | {f"shard-{i:06d}.{e}" for i in range(4) for e in ("tar", "jsonl")}
    seen = set()
    for shard in index["shards"]:
        tar = (packed / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(tar), hashlib.sha256(tar).hexdigest())
        for line in read_records(packed, shard["name"].replace(".tar", ".jsonl")):
            assert set(line) == {"key", "ext", "offset", "size", "meta"}
            data = tar[line["offset"] : line["offset"] + line["size"]]
            meta = line["meta"]
            assert data == (tiny_corpus / meta["source"]).read_bytes()
            assert (
                line["key"] == sample_key(meta["source"]) and "." not in line["key"] and line["ext"] == "mp4"
            )
            assert meta["class"] == meta["source"].split("/")[0] == index["classes"]["label"][meta["label"]]
            assert meta["labels"] == {"label": meta["label"]} and meta["group"] is None
            assert (meta["frames"], meta["height"], meta["width"]) == (20 - meta["label"], 48, 64)
            assert (meta["fps"], meta["codec"], meta["rotation"], meta["decoder"]) == (
                10.0,
                "h264",
                0,
                "pyav",
            )
            assert meta["decord"]  # proven, too
            assert meta["duration"] == pytest.approx(meta["frames"] / 10)
            video = open_video(data, line["ext"], meta)
            assert frame_index(video.get([meta["frames"] - 1])[0]) == meta["frames"] - 1
            seen.add(meta["source"])
    assert len(seen) == 12


def test_bytes_do_not_depend_on_the_workers(packed, tiny_corpus, tmp_path, capsys):
    args = [str(tiny_corpus), str(tmp_path / "out"), "--workers", "3", "--samples-per-shard", "3"]
    pack.main(args)
    assert file_hashes(tmp_path / "out") == file_hashes(packed)
    capsys.readouterr()
    pack.main(args)  # prints that it is finished
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a pack of other files or with other options"):
        pack.main([*args, "--seed", "1"])
    with pytest.raises(UserError, match="holds something else already"):
        pack.main([str(tiny_corpus), str(tmp_path)])
    with pytest.raises(UserError, match="lies inside"):
        pack.main([str(tiny_corpus), str(tiny_corpus / "out")])


def test_resume_after_sigkill(packed, tiny_corpus, tmp_path):
    out = tmp_path / "out"
    arguments = [str(tiny_corpus), str(out), "--workers", "1", "--samples-per-shard", "3"]
    # Before the first tar has its name; after the first shard, with the records of the second.
    for number, event in enumerate(("shard-000000.tar", "shard-000001.tar")):
        assert signalled("SIGKILL", event, 1, "data_prep.pack", *arguments) == -signal.SIGKILL
        assert len(list(out.glob("*.tar"))) == number and not (out / "index.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    pack.main(arguments)
    assert file_hashes(out) == file_hashes(packed)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # finished shards are not written again


def test_incomplete_shards_are_written_again(packed, tiny_corpus, tmp_path, monkeypatch):
    """A shard without its tar, or without its list of rejected files, is not finished."""
    args = [str(tiny_corpus), str(tmp_path / "out"), "--workers", "1", "--samples-per-shard", "3"]
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(packing, "write_indexes", lambda plan: (_ for _ in ()).throw(KeyboardInterrupt))
        pack.main(args)
    (tmp_path / "out" / "shard-000001.tar").unlink()
    (tmp_path / "out" / "shard-000003.rejected").unlink()
    pack.main(args)
    assert file_hashes(tmp_path / "out") == file_hashes(packed)


def test_odd_files(odd_corpus, tmp_path, capsys, frame_index):
    # bad/text.png has the name of bad/text.mp4, as a thumbnail has
    pack.main([str(odd_corpus), str(tmp_path / "out"), "--workers", "2", "--thumbnails", "keep"])
    printed = capsys.readouterr().out
    assert (
        "left out, .txt: 1 (notes.txt)" in printed
        and "4 rejected (1 empty, 2 not_a_video, 1 not_an_image)" in printed
    )
    rejected = read_records(tmp_path / "out", "rejected.jsonl")
    assert [(r["path"], r["reason"]) for r in rejected] == [
        ("bad/empty.mp4", "empty"),
        ("bad/text.mp4", "not_a_video"),
        ("bad/text.png", "not_an_image"),
        ("bad/truncated.mp4", "not_a_video"),
    ]
    assert rejected[2]["detail"] == "no known image format"  # the same text in every run
    metas = {x["meta"]["source"].split("/")[1]: x["meta"] for x in read_records(tmp_path / "out")}
    facts = {name: (m["frames"], m["height"], m["width"], m["rotation"]) for name, m in metas.items()}
    partly = facts.pop("truncated.mkv")
    assert 0 < partly[0] < 20
    assert facts == {
        "vfr.mp4": (6, 48, 64, 0),
        "rotated.mp4": (20, 64, 48, 90),
        "mirrored.mp4": (
            20,
            48,
            64,
            180,
        ),  # FFmpeg's angle of a mirrored video; pixels are mirrored, not rotated
        "short.mp4": (2, 48, 64, 0),
        "one.webm": (1, 48, 64, 0),
        "picture.JPG": (1, 48, 64, 0),
        "turned.jpeg": (1, 64, 48, 0),
        "picture.png": (1, 48, 64, 0),
    }
    assert {x["ext"] for x in read_records(tmp_path / "out")} == {"mp4", "mkv", "webm", "jpg", "jpeg", "png"}
    verify.main([str(tmp_path / "out")])
    assert "no problems" in capsys.readouterr().out


def test_source_without_decodable_files(odd_corpus, tmp_path):
    with pytest.raises(UserError, match="no sample is left: 2 not_a_video, 1 empty, 1 not_an_image"):
        pack.main([str(odd_corpus / "bad"), str(tmp_path / "out"), "--thumbnails", "keep"])
    with pytest.raises(UserError, match="no such folder"):
        pack.main([str(odd_corpus / "nowhere"), str(tmp_path / "out2")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no video or image in it"):
        pack.main([str(tmp_path / "empty"), str(tmp_path / "out2")])


KNOWN = {"frames": 1, "height": 2, "width": 2, "duration": 1.0, "decoder": "pyav"}


def faulty_inspection(decoder, recipe, filters, report, path, ext, spans, frame_rate):
    """Crashes at once, or after the first report, or hangs, as the content of the file names it."""
    fault = Path(path).read_bytes()
    if fault == b"later":
        report.partial([EncodedSample(KNOWN)])
    if fault != b"hang":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def test_crash_or_hang_rejects_one_file(tmp_path, tiny_corpus):
    files = {name: tmp_path / name for name in ("now", "later", "hang")}
    for name, path in files.items():
        path.write_bytes(name.encode())
    inspector = FileInspector("auto", 120, job=faulty_inspection)
    crash = Rejected("decoder_crash", "the decoder's process ended with -11")
    assert inspector(files["now"], "mp4") == [crash]
    assert inspector(files["later"], "mp4") == [EncodedSample(KNOWN)]  # PyAV serves it
    inspector.close()
    inspector = FileInspector("auto", 1, job=faulty_inspection)
    assert inspector(files["hang"], "mp4") == [Rejected("timeout", "no answer in 1 s")]
    inspector.close()
    inspector = FileInspector("auto", 120)
    found = inspector(next(tiny_corpus.rglob("*.mp4")), "mp4")
    assert isinstance(found[0], EncodedSample) and found[0].meta["frames"] >= 18
    inspector.close()


def csv_folder(root: Path, text: str | bytes, *names: str) -> Path:
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).write_bytes(b"x")
    (root / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"labels\.csv: empty"),
        ("path,label\n", r"labels\.csv: no line after the header"),
        ("file,label\na.mp4,x\n", r"labels\.csv:1: no column `path` \(found: file, label\)"),
        ("path,class\na.mp4,x\n", r"labels\.csv:1: no column `label` or `label_NAME`"),
        (
            "path,label\na.mp4,x\nb.mp4,y\na.mp4,x\n",
            r"labels\.csv:4: a\.mp4 is named again \(first in line 2\)",
        ),
        ("path,label\n/etc/a.mp4,x\n", r"labels\.csv:2: path '/etc/a\.mp4': expected a path inside"),
        ("path,label\n../a.mp4,x\n", r"labels\.csv:2: path .*: expected a path inside"),
        ("path,label\na.mp4\n", r"labels\.csv:2: a different number of columns"),
        ("path,label\na.mp4,x,y\n", r"labels\.csv:2: a different number of columns"),
        ('path,label\na.mp4,"x\n', r"labels\.csv:\d: not a valid CSV line"),
        ("path,label,split\na.mp4,x,train\nb.mp4,x,\n", r"labels\.csv:3: split ''"),
        ("path,label,split\na.mp4,x,../up\n", r"labels\.csv:2: split '\.\./up'"),
        (
            "path,label,label_label\na.mp4,x,y\n",
            r"labels\.csv:1: columns 'label' and 'label_label' are the same labels",
        ),
        ("path,label_,label\na.mp4,x,y\n", r"labels\.csv:1: column 'label_': expected a name"),
        ("path,label,label\na.mp4,x,y\n", r"labels\.csv:1: two columns 'label'"),
        ("path,label,group,group\na.mp4,x,y,z\n", r"labels\.csv:1: two columns 'group'"),
        ("path,label\nnone.mp4,x\n", "none of its 1 files is there, of a known kind"),
        (b"path,label\na.mp4,caf\xe9\n", r"labels\.csv: not UTF-8"),
    ],
)
def test_errors_in_labels_csv(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as e:
        read_source(csv_folder(tmp_path / "src", text, "a.mp4", "b.mp4"))
    assert "\n" not in str(e.value)


def test_labels_csv(tmp_path, make_video, make_image):
    src, out = tmp_path / "src", tmp_path / "out"
    rows = ["path,label_verb,label_noun,group,split"]
    rows += [
        f"v{i}.mp4,{('open', 'close')[i % 2]},{i + 7},g{i // 2},{('train', 'val')[i > 2]}" for i in range(5)
    ]
    csv_folder(
        src, "\ufeff" + "\r\n".join([*rows, "gone.mp4,open,7,g0,train", "a.doc,open,7,g0,train"]) + "\r\n"
    )
    (src / "a.doc").write_text("x")
    for i in range(5):
        (src / f"v{i}.mp4").write_bytes(make_video(3 + i))
    pack.main([str(src), str(out), "--workers", "1"])
    want = {"noun": ["7", "8", "9", "10", "11"], "verb": ["close", "open"]}
    for split, n in (("train", 3), ("val", 2)):
        index = json.loads((out / split / "index.json").read_text())
        assert index["classes"] == want and index["samples"] == n
    metas = {x["meta"]["source"]: x["meta"] for s in ("train", "val") for x in read_records(out / s)}
    assert metas["v3.mp4"]["labels"] == {"verb": 0, "noun": 3} and metas["v3.mp4"]["label"] == 0
    assert metas["v3.mp4"]["class"] == "close" and metas["v3.mp4"]["group"] == "g1"
    reasons = [(r["path"], r["reason"]) for r in read_records(out / "train", "rejected.jsonl")]
    assert reasons == [("a.doc", "unknown_extension"), ("gone.mp4", "missing")]
    with pytest.raises(UserError, match="leave out --test-fraction"):
        pack.main([str(src), str(tmp_path / "out2"), "--test-fraction", "0.2"])


def test_flat_folder_and_split_folders(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    source = read_source(tmp_path)
    assert source.items == [SourceItem("a.mp4", {})] and source.label_sets == []
    for name in ("train/run/deep/1.mp4", "val/run/2.MP4", "val/.hidden.mp4"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(b"x")
    assert read_source(tmp_path / "s").items == [
        SourceItem("train/run/deep/1.mp4", {"label": "run"}, None, "train"),
        SourceItem("val/run/2.MP4", {"label": "run"}, None, "val"),
    ]


def test_names_with_unicode_line_separators(tmp_path, make_image, capsys):
    """JSON keeps U+2028, U+2029 and U+0085; none of them ends a line."""
    src, out = tmp_path / "src", tmp_path / "out"
    odd = ["a\u2028b", "a\u2029b", "a\u0085b"]
    for name in odd:
        (src / name).mkdir(parents=True)
        (src / name / f"{name}.png").write_bytes(make_image("png"))
        (src / name / f"{name}.mp4").write_bytes(b"")
    options = ["--workers", "1", "--samples-per-shard", "2", "--thumbnails", "keep"]
    pack.main([str(src), str(out), *options])
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    assert (index["samples"], index["rejected"], index["classes"]) == (3, 3, {"label": sorted(odd)})
    assert "3 rejected (3 empty)" in capsys.readouterr().out
    verify.main([str(out), "--decode", "3"])
    assert "no problems" in capsys.readouterr().out


def test_names_that_are_not_utf8(tmp_path, make_image, capsys):
    src, out = tmp_path / "src", tmp_path / "out"
    for name in (b"run/1.png", b"run/caf\xe9.png", b"caf\xe9/1.png", b"run/notes.\xe9", b"run/caf\xe9.txt"):
        path = Path(os.fsdecode(os.fsencode(src) + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image("png"))
    pack.main([str(src), str(out), "--workers", "1"])
    assert [x["meta"]["source"] for x in read_records(out)] == ["run/1.png"]
    rejected = [(r["path"], r["reason"]) for r in read_records(out, "rejected.jsonl")]
    assert rejected == [("caf\\xe9/1.png", "bad_name"), ("run/caf\\xe9.png", "bad_name")]
    printed = capsys.readouterr().out
    assert "2 rejected (2 bad_name)" in printed
    assert ".\\xe9: 1" in printed and ".txt: 1" in printed


def test_too_long_path_is_missing(tmp_path):
    long = "x" * 5000 + ".mp4"
    source = read_source(csv_folder(tmp_path / "src", f"path,label\na.mp4,x\n{long},x\n", "a.mp4"))
    assert [item.path for item in source.items] == ["a.mp4"] and source.rejected == {long: "missing"}


def test_order_of_classes_with_equal_values():
    for names in itertools.permutations(["1", "01", "001", "10", "2"]):
        assert class_lists({"label": names}) == {
            "label": ["001", "01", "1", "2", "10"]
        }  # a set's order is any of them


def test_unwritable_out(tiny_corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(pack, "read_source", lambda *_: pytest.fail("read the source first"))
    for out in ("file", "file/out", "file/a/b"):
        with pytest.raises(UserError, match="file is not a folder; choose another place"):
            pack.main([str(tiny_corpus), str(tmp_path / out)])
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda p, mode: not (p == tmp_path and mode & os.W_OK) and real(p, mode)
    )
    for out in ("", "a", "a/b"):
        with pytest.raises(UserError, match="cannot be written to; choose another place"):
            pack.main([str(tiny_corpus), str(tmp_path / out)])
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be made: File name too long"):
        pack.main([str(tiny_corpus), str(tmp_path / ("x" * 300))])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
def test_split_by_group(seed, fraction):
    rng = np.random.default_rng(seed)
    items = [SourceItem(f"{i}", {"label": f"c{rng.integers(4)}"}, f"g{rng.integers(12)}") for i in range(150)]
    items += [SourceItem("lone", {"label": "lone"}, "g_lone")]
    parts = split_train_test(items, ["label"], fraction, seed)
    assert parts == split_train_test(items[::-1], ["label"], fraction, seed)
    assert sorted(parts["train"] + parts["test"]) == sorted(items)
    assert not {i.group for i in parts["train"]} & {i.group for i in parts["test"]}
    counts = {name: Counter(i.labels["label"] for i in part) for name, part in parts.items()}
    assert parts["test"] and all(counts["train"][f"c{c}"] for c in range(4))
    assert counts["test"]["lone"] == 0
    if fraction in (0.25, 0.5):
        assert abs(len(parts["test"]) / 151 - fraction) < 0.02


def test_split_of_single_files(tiny_corpus, tmp_path):
    out = tmp_path / "out"
    pack.main([str(tiny_corpus), str(out), "--test-fraction", "0.25", "--workers", "2"])
    got = {s: read_records(out / s) for s in ("train", "test")}
    assert Counter(x["meta"]["class"] for x in got["test"]) == {"clap": 1, "run": 1, "wave": 1}
    assert len(got["train"]) == 9
    classes = [json.loads((out / s / "index.json").read_text())["classes"] for s in ("train", "test")]
    assert classes[0] == classes[1] == {"label": ["clap", "run", "wave"]}


def test_verify_reports_damage(packed, tmp_path, capsys):
    def broken(change) -> str:
        out = tmp_path / str(time.monotonic_ns())
        out.mkdir()
        for p in packed.iterdir():
            (out / p.name).write_bytes(p.read_bytes())
        change(out)
        with pytest.raises(SystemExit) as e:
            verify.main([str(out)])
        assert e.value.code == 1
        return capsys.readouterr().out

    def flip(out, name="shard-000001.tar", at=5000):
        data = bytearray((out / name).read_bytes())
        data[at] ^= 1
        (out / name).write_bytes(data)

    def relabel(out):  # the jsonl and its sha256 agree with each other, but not with the tar
        file = out / "shard-000000.jsonl"
        file.write_text(file.read_text().replace('"frames": 20', '"frames": 21'))
        index = json.loads((out / "index.json").read_text())
        index["shards"][0]["index_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        del index["checksum"]
        (out / "index.json").write_text(json.dumps(index))

    verify.main([str(packed), "--decode", "100"])
    assert "no problems" in capsys.readouterr().out
    assert "shard-000001.tar: sha256 differs" in broken(flip)
    assert "shard-000002.jsonl: sha256 differs" in broken(lambda out: flip(out, "shard-000002.jsonl", 50))
    assert "shard-000003.tar: missing" in broken(lambda out: (out / "shard-000003.tar").unlink())
    assert "differs from its jsonl line" in broken(relabel)
    with pytest.raises(UserError, match="nothing: no such folder"):
        verify.main([str(tmp_path / "nothing")])


def write_tar(path: Path, members: list[tuple[str, bytes]], **how) -> None:
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5
            tar.addfile(info, io.BytesIO(data))


def test_scan_of_other_shards(tmp_path, make_video, make_image, capsys):
    video, image = make_video(4), make_image("jpeg")
    long = "x" * 150
    write_tar(
        tmp_path / "a.tar", [("d/1.mp4", video), ("d/1.cls", b"2"), ("d/2.jpg", image), ("d/2.cls", b"0\n")]
    )
    three = [
        (f"{long}.json", b'{"label": 1, "fps": 9}'),
        (f"{long}.jpg", image),
        (f"{long}.MP4", video),
        ("4.txt", b"x"),
    ]
    write_tar(tmp_path / "b.tar", three, format=tarfile.PAX_FORMAT)
    scan.main([str(tmp_path)])
    scan.main([str(tmp_path)])  # overwrites its own index
    assert "left out, sample without a video or image: 1 (" in capsys.readouterr().out
    got = {x["key"]: x for x in read_records(tmp_path, "*.jsonl")}
    assert {k: (x["ext"], x["meta"]["label"]) for k, x in got.items()} == {
        "d/1": ("mp4", 2),
        "d/2": ("jpg", 0),
        long: ("mp4", 1),  # of a video and an image, the video is the media file
    }
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["classes"] == {"label": ["0", "1", "2"]} and index["samples"] == 3
    for shard in ("a", "b"):
        data = (tmp_path / f"{shard}.tar").read_bytes()
        for x in read_records(tmp_path, f"{shard}.jsonl"):
            payload = data[x["offset"] : x["offset"] + x["size"]]
            assert payload == (video if x["ext"] == "mp4" else image)
            open_video(payload, x["ext"], x["meta"]).get([0])
    verify.main([str(tmp_path)])


def test_scan_of_class_names_and_errors(tmp_path, packed, make_image):
    named = [
        ("1.jpg", make_image("jpeg")),
        ("1.cls", b"run"),
        ("2.jpg", make_image("jpeg")),
        ("2.cls", b"clap"),
    ]
    write_tar(tmp_path / "a.tar", [*named, ("3.jpg", make_image("jpeg"))])
    scan.main([str(tmp_path)])
    assert [x["meta"]["label"] for x in read_records(tmp_path, "*.jsonl")] == [1, 0, -1]
    assert json.loads((tmp_path / "index.json").read_text())["classes"] == {"label": ["clap", "run"]}
    with pytest.raises(UserError, match="has an index already"):
        scan.main([str(packed)])
    bad = tmp_path / "bad"
    bad.mkdir()
    with pytest.raises(UserError, match=r"no \.tar file"):
        scan.main([str(bad)])
    write_tar(bad / "a.tar", [("1.jpg", b"x"), ("1.json", b"[1")])
    with pytest.raises(UserError, match=r"1\.json: not JSON"):
        scan.main([str(bad)])
    (bad / "a.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match="not a plain tar file"):
        scan.main([str(bad)])


def test_webdataset_reads_the_shards(packed, tiny_corpus):
    import webdataset

    shards = sorted(str(p) for p in packed.glob("*.tar"))
    got = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [s["__key__"] for s in got] == [x["key"] for x in read_records(packed)]
    for sample in got:
        meta = json.loads(sample["json"])
        assert sample["mp4"] == (tiny_corpus / meta["source"]).read_bytes()


def test_command_line_errors_are_one_line(tmp_path):
    for module in ("pack", "verify", "scan"):
        args = [str(tmp_path / "none"), str(tmp_path / "out")][: 2 if module == "pack" else 1]
        done = subprocess.run(
            [sys.executable, "-m", f"data_prep.{module}", *args],
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

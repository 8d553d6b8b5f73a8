"""data_prep.leaks and data_prep.dedup: copies of training videos in a test set, and near duplicates."""

import io
import json
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from films import encode, film, spots
from PIL import Image

from data_prep import leaks, pack
from data_prep.fingerprint import (
    MAX_HASH_DISTANCE,
    Candidate,
    Fingerprint,
    HashTable,
    MediaFile,
    fingerprint,
    hamming_distance,
    phash,
)
from data_prep.leak_search import ShardFiles, find_leaks
from data_prep.matching import align, compare, matching_job
from data_prep.workers import WorkerPool
from vidssl.core.errors import UserError
from vidssl.data.shards import Shards

pytestmark = pytest.mark.slow


def packed(root: Path, name: str, files: dict[str, bytes]) -> str:
    (root / name).mkdir()
    for file, data in files.items():
        (root / name / file).write_bytes(data)
    pack.main([str(root / name), str(root / f"{name}_shards"), "--workers", "1"])
    return str(root / f"{name}_shards")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """leaks of 8 films; `test` has copies of four, another take of one scene, and a film of its own."""
    root = tmp_path_factory.mktemp("leaks")
    films = {i: film(i) for i in range(8)}
    scene = films[5].copy()
    back = np.asarray(Image.fromarray(np.median(scene, 0).astype(np.uint8)))
    photo = Image.fromarray(film(77)[0])
    jpeg, small = io.BytesIO(), io.BytesIO()
    photo.save(jpeg, "jpeg")
    photo.resize((80, 60)).save(small, "jpeg", quality=50)
    train = packed(
        root, "train", {**{f"f{i}.mp4": encode(x) for i, x in films.items()}, "photo.jpg": jpeg.getvalue()}
    )
    test = packed(
        root,
        "test",
        {
            "same.mp4": encode(films[0]),
            "worse.mp4": encode(films[1], (96, 72), every=2, crf=36),
            "cut.mp4": encode(films[2][29:], (160, 120)),
            "middle.mp4": encode(films[3][20:70], every=2),
            "take.mp4": encode(spots(back, np.random.default_rng(99), 4.0)),
            "other.mp4": encode(film(50)),
            "photo.jpg": small.getvalue(),
        },
    )
    with pytest.raises(SystemExit, match="1"):
        leaks.main([train, test, "--out", str(root / "new" / "leaks.jsonl"), "--workers", "1"])
    lines = [json.loads(x) for x in (root / "new" / "leaks.jsonl").read_text().splitlines()]
    return {line["test"].rsplit("-", 1)[0]: line for line in lines}, len(lines), (train, test)


def test_only_copies_are_found(found):
    lines, n, _ = found
    assert {test: (line["train"].rsplit("-", 1)[0], line["match"]) for test, line in lines.items()} == {
        "same": ("f0", "bytes"),
        "worse": ("f1", "pictures"),
        "cut": ("f2", "pictures"),
        "middle": ("f3", "pictures"),
        "photo": ("photo", "still pictures"),
    }
    assert n == 5  # each once


def test_shift_and_overlap_of_copies(found):
    lines, _, _ = found
    for name, shift, seconds in (
        ("worse", 0.0, 4.0),
        ("cut", 29 / 24, 67 / 24),
        ("middle", 20 / 24, 50 / 24),
    ):
        assert lines[name]["shift"] == pytest.approx(shift, abs=0.1), name
        assert lines[name]["overlap"] == pytest.approx(seconds, abs=0.2), name
        assert lines[name]["correlation"] > 0.95, name


def test_another_take_of_a_scene_is_no_leak(found):
    """The backgrounds are equal, what moves is not."""
    _, _, (train, test) = found
    sets = Shards([train]), Shards([test])
    samples = [s.list_samples() for s in sets]
    seen = [
        [fingerprint(MediaFile(d.read(x), x.ext, x.meta)) for x in s]
        for d, s in zip(sets, samples, strict=True)
    ]
    i, j = (
        next(i for i, x in enumerate(s) if x.key.startswith(k))
        for s, k in zip(samples, ("f5", "take"), strict=True)
    )
    far = [hamming_distance(seen[0][x].hashes, seen[1][j].hashes).mean() for x in (i, i - 1)]
    assert far[0] < far[1] / 1.5  # the scene is the same
    read = ShardFiles(dict(zip(("train", "test"), sets, strict=True)))
    files = read(("test", samples[1][j])), read(("train", samples[0][i]))
    assert compare(Candidate(j, i, 32, 2.0, 0.0, far[0]), *files) is None


def test_no_leak_is_exit_status_0(found, tmp_path, capsys):
    train = found[2][0]
    leaks.main([train, packed(tmp_path, "own", {"own.mp4": encode(film(60))}), "--workers", "1"])
    assert "0 of 1 test videos are among the 9" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no index\.json"):
        leaks.main([train, str(tmp_path / "own")])


def faulty_job(read, report, task, location, *rest):
    """Fingerprints a video; the decoder hangs on files named hang*, and dies of those named crash*."""
    name = location[1].key
    if name.startswith("hang"):
        time.sleep(1000)
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return matching_job(read, report, task, location, *rest)


def test_hanging_and_crashing_videos_are_reported(tmp_path):
    copy = encode(film(1, 1.0))
    train = Shards([packed(tmp_path, "train", {"a.mp4": copy})])
    test = Shards([packed(tmp_path, "test", {"b.mp4": copy, "crash.mp4": copy, "hang.mp4": copy})])
    lines = list(find_leaks(train, test, workers=2, timeout_s=5.0, job=faulty_job))
    found = {line["test"].rsplit("-", 1)[0]: line.get("error", line.get("match")) for line in lines}
    assert found == {"b": "bytes", "crash": "decoder_crash", "hang": "timeout"}


def greedy_job(report):
    """Takes 300 MB, then waits for its end."""
    taken = np.ones(300 << 20, np.uint8)
    time.sleep(1000)
    return len(taken)


def test_a_job_that_takes_too_much_memory_is_rejected():
    with closing(WorkerPool(greedy_job, 60.0, memory_bytes=100 << 20)) as pool:
        rejected = pool.run()
    assert rejected.reason == "too_large" and "grew by over" in rejected.detail


def test_videos_that_are_not_compared_are_named(capsys):
    records = [{"test": "a", "error": "timeout"}, {"train": "b", "error": "timeout"}]
    records += [
        {"test": "c", "train": "d", "error": "too_large"},
        {"test": "a", "train": "b", "match": "bytes"},
    ]
    assert list(leaks.not_compared_lines(records)) == [
        "  not compared, timeout: 2 (a of test, b of train)",
        "  not compared, too_large: 1 (c of test and d of train)",
    ]


def test_phash_is_a_dct_and_ignores_brightness():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (20, 32, 32)).astype(np.float64)
    want = []
    for p in pictures:  # from the definition
        u = np.arange(8)[:, None]
        basis = np.cos(np.pi * (2 * np.arange(32) + 1) * u / 64)
        low = np.array([[(np.outer(basis[i], basis[j]) * p).sum() for j in range(8)] for i in range(8)])
        want.append((low > np.median(low)).ravel())
    got = np.unpackbits(phash(pictures).view(np.uint8).reshape(20, 8), axis=1).astype(bool)
    assert (got == np.stack(want)).all()
    assert (hamming_distance(phash(pictures), phash(pictures * 0.7 + 20)) <= 2).all()
    far = hamming_distance(phash(pictures[:10]), phash(pictures[10:]))
    assert 20 <= far.mean() <= 44 and (got.sum(1) == 32).all()
    assert hamming_distance(np.array([0], np.uint64), np.array([2**64 - 1], np.uint64)).tolist() == [64]


def test_table_finds_what_exhaustive_comparison_finds():
    """Every hash that shares a quarter with the query and differs by at most MAX_HASH_DISTANCE bits, and no
    other."""
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**63, 3000).astype(np.uint64)
    flips = [np.uint64(sum(1 << int(b) for b in rng.choice(64, k, replace=False))) for k in (1, 3, 6, 9, 12)]
    near = np.concatenate([hashes[:50] ^ f for f in flips])
    digest = b""
    steps = np.arange(len(near) + 3000, dtype=np.int32)
    table = HashTable(
        [Fingerprint(digest, hashes, steps[:3000]), None, Fingerprint(digest, near, steps[3000:])]
    )
    for query in hashes[:50]:
        d = hamming_distance(table.hashes, np.full(len(table.hashes), query))
        share = (table.hashes[:, None].view(np.uint16) == query.reshape(1, 1).view(np.uint16)).any(1)
        assert table.lookup(query).tolist() == np.flatnonzero((d <= MAX_HASH_DISTANCE) & share).tolist()
    assert len(table.lookup(np.uint64(0))) == 0 and (table.video[3000:] == 2).all()


def test_full_buckets_are_sampled():
    same = Fingerprint(b"", np.zeros(1000, np.uint64), np.arange(1000, dtype=np.int32))
    assert len(HashTable([same], max_bucket=10).lookup(np.uint64(0))) == 10


def test_align():
    rng = np.random.default_rng(2)
    train = rng.normal(size=(100, 64)).astype(np.float32)
    assert align(train, train[30:80] * 0.5 + 9)[1:] == (30, 50)
    assert align(train, train[30:80])[0] == pytest.approx(1)
    assert align(train, rng.normal(size=(50, 64)).astype(np.float32))[0] < 0.3
    assert align(train, train[:5]) == (-1.0, 0, 0)  # less than MIN_OVERLAP_SECONDS


def test_black_frames_are_not_hashed():
    assert len(fingerprint(MediaFile(encode(np.zeros((48, 96, 128, 3), np.uint8)), "mp4")).hashes) == 0
    assert fingerprint(MediaFile(encode(film(1, 2.0)), "mp4")).steps.tolist() == list(range(16))


def test_pack_drops_near_duplicates_and_caches_them(tmp_path, monkeypatch):
    films = {i: film(i) for i in range(3)}
    back = np.asarray(Image.fromarray(np.median(films[2], 0).astype(np.uint8)))
    files = {f"a{i}.mp4": encode(frames) for i, frames in films.items()}
    files |= {"a8_part.mp4": encode(film(8)[20:70]), "b8_whole.mp4": encode(film(8), crf=26)}
    files |= {
        "b_same.mp4": files["a0.mp4"],
        "b_worse.mp4": encode(films[0], (96, 72), every=2, crf=34),
        "b_cut.mp4": encode(films[1][24:], crf=30),
        "b_take.mp4": encode(spots(back, np.random.default_rng(99), 4.0)),  # before the background of a2
        "b_broken.mp4": files["a2.mp4"][:300],
    }
    (tmp_path / "videos").mkdir()
    for name, data in files.items():
        (tmp_path / "videos" / name).write_bytes(data)
    command = [str(tmp_path / "videos"), str(tmp_path / "out"), "--workers", "1", "--drop-duplicates", "near"]
    with monkeypatch.context() as cut_off, pytest.raises(KeyboardInterrupt):
        cut_off.setattr("data_prep.engine.make", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        pack.main(command)
    monkeypatch.setattr("data_prep.copies.find_near_duplicates", lambda *_: pytest.fail("searched again"))
    pack.main(command)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    why = {r["path"]: r.get("duplicate_of", r["detail"]) for r in rejected if r["reason"] == "duplicate"}
    copies = {"b_same.mp4": "the same bytes as a0.mp4", "b_worse.mp4": "a0.mp4", "b_cut.mp4": "a1.mp4"}
    assert why == {
        **copies,
        "a8_part.mp4": "b8_whole.mp4",
    }  # the longer file is kept, even if its name is later
    seen = [json.loads(line) for line in (tmp_path / "out" / "near-out.jsonl").read_text().splitlines()[1:]]
    assert {line["path"] for line in seen if "error" in line} == {"b_broken.mp4"}
    assert [r["path"] for r in rejected if r["reason"] != "duplicate"] == ["b_broken.mp4"]
    kept = [s.meta["source"] for s in Shards([str(tmp_path / "out")]).list_samples()]
    assert sorted(kept) == ["a0.mp4", "a1.mp4", "a2.mp4", "b8_whole.mp4", "b_take.mp4"]
    (tmp_path / "videos" / "more.mp4").write_bytes(encode(film(60)))
    with pytest.raises(UserError, match="is of other files; choose another folder, or remove it"):
        pack.main(command)

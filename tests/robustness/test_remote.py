"""vidssl/data/remote.py, and Shards over the network: an HTTP server with faults, an S3 server, several
processes."""

import fcntl
import io
import multiprocessing
import os
import signal
import socket
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from server import Server, put_lengths, serving
from torch.utils.data import DataLoader, Dataset

from data_prep import scan, verify
from vidssl.core.errors import DecodeError, UserError
from vidssl.data import format as format_module
from vidssl.data import remote
from vidssl.data.addresses import ShardError, join
from vidssl.data.augment import RandomCrop
from vidssl.data.dataset import TrainClips
from vidssl.data.order import Order
from vidssl.data.remote import Cache
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards

FORK = multiprocessing.get_context("fork")
SHARDS, SAMPLES, PAYLOAD = 6, 5, 20_000
SHARD = 112_640  # bytes of a tar of these


def is_cached(shards: Shards, number: int) -> bool:
    return (shards.cache.folder / f"{shards.table.sha256[number].decode()}.tar").exists()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A data set of random bytes under the names of videos; only read it."""
    folder = tmp_path_factory.mktemp("made") / "set"
    rng = np.random.default_rng(0)
    folder.mkdir()
    for s in range(SHARDS):
        write_tar(folder / f"part {s}.tar", [(f"{s}-{i}.mp4", rng.bytes(PAYLOAD)) for i in range(SAMPLES)])
    scan.main([str(folder)])
    return folder


@pytest.fixture
def server(made):
    with serving(made.parent) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT_S", 30)
    monkeypatch.setattr(remote, "MIN_BLOCK_BYTES", 1 << 20)  # a shard takes one request
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01, 0.01, 0.02, 0.02, 0.03))


def open_remote(server: Server, cache: Path, **how) -> Shards:
    return Shards([server.url("set")], str(cache), **how)


def files(cache: Path, ext: str) -> list[Path]:
    return sorted(cache.glob(f"*{ext}"))


# --- what is read ---


@pytest.mark.parametrize("ranges", [True, False])
def test_url_equals_folder_and_files_are_fetched_once(made, tmp_path, ranges):
    here = Shards([str(made)])
    with serving(made.parent, ranges) as server:
        for _ in range(2):  # the second has all but the index in the cache
            there = open_remote(server, tmp_path)
            assert (there.hash, there.n, there.classes) == (here.hash, here.n, here.classes)
            assert there.list_samples() == here.list_samples()
            assert [there.read(s) for s in there.list_samples()] == [
                here.read(s) for s in here.list_samples()
            ]
        assert server.times_asked("index.json") == 2 and set(here.sizes) == {SHARD}
        assert server.times_asked(".tar") == server.times_asked(".jsonl") == SHARDS
    assert len(files(tmp_path, ".tar")) == len(files(tmp_path, ".jsonl")) == SHARDS and not files(
        tmp_path, ".part"
    )


def test_file_address(made):
    there = Shards([made.as_uri()])
    assert there.hash == Shards([str(made)]).hash and there.cache is None
    assert len(there.read(there.sample(2, 3))) == PAYLOAD


def test_signed_address():
    assert join("https://host/a%20b/?sig=x%2F1", "p 1.tar") == "https://host/a%20b/p%201.tar?sig=x%2F1"
    assert join("s3://bucket/set/", "p 1.tar") == "s3://bucket/set/p 1.tar"


def test_other_fsspec_address(made, tmp_path):
    import fsspec

    fsspec.filesystem("memory").put(str(made), "/set", recursive=True)
    there = Shards(["memory://set"], str(tmp_path))
    assert [there.read(s) for s in there.list_samples()] == [
        Shards([str(made)]).read(s) for s in there.list_samples()
    ]
    with pytest.raises(
        UserError, match=r"memory://none/index\.json: .*is this the address of a packed data set\?"
    ):
        Shards(["memory://none"], str(tmp_path))
    with pytest.raises(UserError, match=r"nosuch://set.*Protocol not known: nosuch"):
        Shards(["nosuch://set"], str(tmp_path))


# --- faults that pass ---


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        (["500"] * 5, 6),
        (["429", "503", "408"], 4),
        (["cut 30000", "cut 30000"], 3),
        (["cut 0", "stall 100", "500", "cut 0"], 5),
        (["slow 20000"], 1),
        (["wrong"], 2),
        (["short"], 2),
        (["cut 30000", "wrong"], 3),
    ],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("ranges", [True, False])
def test_temporary_faults(made, tmp_path, monkeypatch, faults, requests, ranges):
    if "stall 100" in faults:
        monkeypatch.setattr(remote, "REQUEST_TIMEOUT_S", 1.5)  # the server is silent for three
    with serving(made.parent, ranges) as server:
        shards = open_remote(server, tmp_path)
        server.faults["part 1.tar"] = list(faults)
        assert shards.read(shards.sample(1, 4)) == Shards([str(made)]).read(shards.sample(1, 4))
        assert server.times_asked("part 1.tar") == requests


@pytest.fixture
def small_blocks(monkeypatch):
    """A shard of 112,640 bytes takes four requests."""
    monkeypatch.setattr(remote, "MAX_BLOCK_BYTES", 30_000)
    monkeypatch.setattr(remote, "MIN_BLOCK_BYTES", 30_000)


def test_a_transfer_continues_at_the_block_that_failed(server, tmp_path, small_blocks):
    shards = open_remote(server, tmp_path)
    server.faults["part 0.tar"] = ["", "cut 10", "", "500"]
    shards.read(shards.sample(0, 0))
    begins = [begin for name, begin in server.asked if name == "part 0.tar"]
    assert begins == [0, 30_000, 30_000, 60_000, 60_000, 90_000]
    assert server.sent["part 0.tar"] == shards.sizes[0] + 10


def test_a_block_that_arrives_resets_the_count_of_retries(server, tmp_path, small_blocks):
    shards = open_remote(server, tmp_path)
    server.faults["part 0.tar"] = [*["cut 10"] * 4, ""] * 4
    assert len(shards.read(shards.sample(0, 0))) == PAYLOAD


def test_requests_shrink_after_failures_and_grow_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_BLOCK_BYTES", 80_000)
    monkeypatch.setattr(remote, "MIN_BLOCK_BYTES", 10_000)
    shards = open_remote(server, tmp_path)
    server.faults["part 0.tar"] = ["cut 10", "cut 10"]
    shards.read(shards.sample(0, 0))
    begins = [begin for name, begin in server.asked if name == "part 0.tar"]
    assert begins == [
        0,
        0,
        0,
        10_000,
        30_000,
        70_000,
    ]  # of 80,000, 20,000, 10,000, 20,000, 40,000, 80,000 bytes


# --- faults that stay ---


@pytest.mark.parametrize(
    ("fault", "requests", "says"),
    [
        ("500", 6, "gave up after 5 retries: the server answers 500 Internal Server Error"),
        ("cut 100", 6, "gave up after 5 retries: Response payload is not completed"),
        ("403", 1, "the server answers 403 Forbidden"),
        ("wrong", 2, r"its sha256 is \w+, the index says \w+; fetched twice"),
        ("short", 2, r"has \d+ bytes, the index says \d+; fetched twice"),
    ],
)
def test_permanent_faults(server, tmp_path, fault, requests, says):
    shards = open_remote(server, tmp_path)
    server.faults["part 2.tar"] = [fault] * 99
    with pytest.raises(
        UserError, match=rf"^http://[\w.:]+/set/part%202\.tar: {says}.*; .*run vidssl verify$"
    ):
        shards.read(shards.sample(2, 0))
    assert server.times_asked("part 2.tar") == requests and not files(tmp_path, ".tar")
    server.faults["part 2.tar"] = []
    assert len(shards.read(shards.sample(2, 0))) == PAYLOAD  # the cache is none the worse


@pytest.mark.parametrize("fault", ["stall 10", "slow 1"])
def test_silent_or_slow_server(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT_S", 0.1)
    shards = open_remote(server, tmp_path)
    server.faults["part 0.tar"] = [fault] * 99
    with pytest.raises(UserError, match=r"gave up after 5 retries: timed out"):
        shards.read(shards.sample(0, 0))
    assert server.times_asked("part 0.tar") <= 6  # a busy server does not see all of them


def test_dead_server(tmp_path):
    with socket.socket() as nobody:  # bound, but it does not listen: refused
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/set?secret"
        with pytest.raises(
            UserError, match=r"^http://[\w.:]+/set/index\.json: gave up after 5 retries: Cannot connect"
        ):
            Shards([url], str(tmp_path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk():
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(UserError, match=r"No space.*lower data\.cache_gb"),
    ):
        remote._write(full, b"x")


def test_wrong_addresses_and_cache_folders(server, tmp_path):
    with pytest.raises(UserError, match=r"none/index\.json: not found.*address of a packed data set\?"):
        Shards([server.url("none")], str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        open_remote(server, tmp_path / "file")
    with pytest.raises(
        UserError, match=r"data\.cache_gb is 0\.0001, but a shard has 0\.00011264 GB and must fit"
    ):
        open_remote(server, tmp_path, cache_gb=1e-4)


# --- foreign sizes ---


@pytest.mark.parametrize("encoding", ["", "gzip"])
@pytest.mark.parametrize("name", ["index.json", "part 0.jsonl", "part 0.tar"])
def test_no_more_is_read_than_a_file_may_have(made, tmp_path, monkeypatch, name, encoding):
    """From a server that sends whole files, larger ones than the index lists, perhaps compressed a
    thousandfold."""
    monkeypatch.setattr(format_module, "MAX_INDEX_BYTES", 50_000)
    with serving(made.parent, ranges=False) as server:
        server.encoding = encoding
        shards = open_remote(server, tmp_path)
        assert len(shards.read(shards.sample(1, 0))) == PAYLOAD
        server.larger[name] = 20_000_000
        with pytest.raises(
            UserError, match=rf"/{name.replace(' ', '%20')}: has more than \d+ bytes, the limit"
        ):
            shards = open_remote(server, tmp_path)
            shards.read(shards.sample(0, 0))
        assert server.sent[name] < 18_000_000


def test_a_jsonl_of_unknown_size_is_held_to_the_limit_of_the_cache(server, tmp_path):
    server.larger["part 0.jsonl"] = 10_000_000
    shards = open_remote(server, tmp_path, cache_gb=0.001)
    shards.table.index_sizes[:] = -1  # as in an index of an earlier version
    with pytest.raises(
        UserError, match=r"part%200\.jsonl: has more than 1000000 bytes, the limit; fetched twice"
    ):
        shards.sample(0, 0)


# --- shards that are skipped ---


def test_on_missing_skip(make_image, tmp_path):
    folder = tmp_path / "set"
    lost = "part 1.tar"
    folder.mkdir()
    for s in range(3):
        write_tar(folder / f"part {s}.tar", [(f"{s}-{i}.png", make_image("png")) for i in range(4)])
    scan.main([str(folder)])
    with serving(tmp_path) as server:
        shards = open_remote(server, tmp_path / "cache", on_missing="skip")
        server.faults[lost] = ["404"] * 99
        clips = TrainClips(
            shards, Order(shards.counts, 0, lanes=2), DataConfig(["x"], 1, stride=1), RandomCrop(16)
        )
        items = [clips[g] for g in range(12)]
        bad = [b for item in items for b in item.failures]
        assert len(bad) >= 4 and {(key[0], reason) for key, reason in bad} == {("1", "shard_missing")}
        assert all(item.key and item.key[0] != "1" for item in items)
        assert server.times_asked(lost) == 1  # given up once, not at each sample
        server.faults["part 0.jsonl"] = ["wrong"] * 99
        other = open_remote(server, tmp_path / "empty", on_missing="skip")
        for i in (1, 2):
            with pytest.raises(DecodeError) as e:
                other.read(other.sample(0, i))
        assert server.times_asked("part 0.jsonl") == 1 + 2  # the first for `shards`
        assert e.value.reason == "shard_changed" and "part%200.jsonl" in str(e.value)


# --- several processes, kills, the bound ---


def read_all(shards: Shards, gate, put) -> None:
    gate.wait()
    put.put([len(shards.read(shards.sample(s, 0))) for s in range(2)])


def test_concurrent_processes_fetch_a_shard_once(server, tmp_path):
    shards = open_remote(server, tmp_path)
    for s in range(2):
        server.faults[f"part {s}.tar"] = ["slow 10000"]  # a fifth of a second
    gate = FORK.Barrier(4)
    put = FORK.Queue()
    children = [FORK.Process(target=read_all, args=(shards, gate, put)) for _ in range(4)]
    for child in children:
        child.start()
    assert [put.get(timeout=300) for _ in children] == [[PAYLOAD] * 2] * 4
    for child in children:
        child.join()
    assert server.times_asked(".tar") == server.times_asked(".jsonl") == 2


def test_kill_during_a_transfer(server, tmp_path, made, monkeypatch):
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT_S", 1)  # a held answer keeps its connection
    monkeypatch.setattr(remote, "MAX_BLOCK_BYTES", 10_000)
    monkeypatch.setattr(remote, "MIN_BLOCK_BYTES", 10_000)
    shards = open_remote(server, tmp_path)
    sample = shards.sample(0, 4)
    server.faults["part 0.tar"] = ["hold 35000"] * 3
    for times in range(3):
        child = FORK.Process(target=shards.read, args=(sample,))
        child.start()
        had = (30_000 * times + 10_000) // 1000 * 1000
        while not any(p.stat().st_size > had for p in files(tmp_path, ".part")):
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert not files(tmp_path, ".tar")
    server.released.set()
    assert shards.read(sample) == Shards([str(made)]).read(sample)
    begins = [at for name, at in server.asked if name == "part 0.tar"]
    assert begins == sorted(begins) and begins[0] == 0 and begins[-1] > 60_000
    assert len(files(tmp_path, ".tar")) == 1 and not files(tmp_path, ".part")


def test_damaged_partial_file_is_fetched_again(server, tmp_path):
    shards = open_remote(server, tmp_path)
    part = tmp_path / f"{shards.table.sha256[0].decode()}.{shards.sizes[0]}.part"
    part.write_bytes(b"x" * 1000)  # as after a power cut
    assert len(shards.read(shards.sample(0, 0))) == PAYLOAD
    tar = files(tmp_path, ".tar")[0]
    tar.write_bytes(b"x" * 1000)  # someone wrote into the cache
    assert len(shards.read(shards.sample(0, 0))) == PAYLOAD and tar.stat().st_size == shards.sizes[0]


def read_some(shards: Shards, seed: int) -> None:
    for s in np.random.default_rng(seed).integers(0, SHARDS, 40).tolist():
        assert len(shards.read(shards.sample(s, 1))) == PAYLOAD


def test_cache_size_limit(server, tmp_path):
    limit = int(3.1 * SHARD)  # three shards and their lines
    shards = open_remote(server, tmp_path, cache_gb=limit / 1e9)
    children = [FORK.Process(target=read_some, args=(shards, seed)) for seed in range(3)]
    for child in children:
        child.start()
    most = 0
    while any(child.is_alive() for child in children):
        sizes = []
        for p in tmp_path.iterdir():
            try:
                sizes.append(p.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
        time.sleep(0.001)
    assert [child.exitcode for child in children] == [0, 0, 0]
    left = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert left > 2 * SHARD and max(most, left) <= limit + 2_000  # a .jsonl counts once it is there
    assert server.times_asked(".tar") > SHARDS  # some came twice
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= limit


def test_the_order_of_uses_does_not_depend_on_the_clock(tmp_path, monkeypatch):
    """Two processes share the folder, and a clock that stands still or goes back."""
    times = iter([5, 5, 5, 5, 3, 3, 9, 9, *[1] * 20])
    caches = [Cache(str(tmp_path), 1000), Cache(str(tmp_path), 1000)]
    monkeypatch.setattr(remote.time, "time_ns", lambda: next(times))
    names = [f"{i:064x}" for i in range(6)]
    for name in names:
        (tmp_path / f"{name}.tar").write_bytes(b"x" * 100)
    with caches[0]._lock():
        pass
    used = [3, 1, 4, 0, 5, 2, 3, 0, 1, 1, 4]
    for turn, i in enumerate(used):
        with caches[turn % 2].open("unused://", names[i], 100):
            pass
    stamps = {i: (tmp_path / f"{name}.tar").stat().st_mtime_ns for i, name in enumerate(names)}
    assert sorted(stamps, key=stamps.__getitem__) == [5, 2, 3, 0, 1, 4]


def fetch(shards: Shards, shard: int) -> None:
    with suppress(ShardError, UserError), shards._open_tar(shard):
        pass


def test_least_recently_used_unlocked_files_are_removed_first(server, tmp_path):
    shards = open_remote(server, tmp_path, cache_gb=3.5 * SHARD / 1e9)

    def there() -> set[int]:
        return {s for s in range(SHARDS) if is_cached(shards, s)}

    for s in (0, 1, 2, 0):  # 0 was read last
        fetch(shards, s)
    fetch(shards, 3)
    assert there() == {0, 2, 3}
    with shards._open_tar(2) as file:  # in use
        fetch(shards, 0), fetch(shards, 3)
        fetch(shards, 4)
        assert there() == {2, 3, 4} and len(file.read()) == shards.sizes[2]
    fetch(shards, 5)
    assert there() == {3, 4, 5}


def test_forked_child_holds_no_lock(server, tmp_path):
    shards = open_remote(server, tmp_path)
    with shards._open_tar(0):
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
    try:
        with open(files(tmp_path, ".tar")[0], "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        child.kill()
        child.join()


def test_fetch_waits_for_room(server, tmp_path):
    """Two shards, room for one: the second is fetched when the first is free."""
    shards = open_remote(server, tmp_path, cache_gb=1.5 * SHARD / 1e9)
    done = threading.Thread(target=fetch, args=(shards, 1))
    with shards._open_tar(0):
        done.start()
        done.join(0.3)
        assert done.is_alive()
    done.join(60)
    assert not done.is_alive() and is_cached(shards, 1)


class Bytes(Dataset):
    """Lengths of all samples, read in a worker."""

    def __init__(self, shards: Shards):
        self.shards = shards

    def __len__(self) -> int:
        return self.shards.n

    def __getitem__(self, i: int) -> int:
        return len(self.shards.read(self.shards.sample(i // SAMPLES, i % SAMPLES)))


def test_in_loader_workers(server, tmp_path):
    shards = open_remote(server, tmp_path)
    shards.read(shards.sample(0, 0))
    loader = DataLoader(Bytes(shards), SAMPLES, num_workers=2)
    assert [batch.tolist() for batch in loader] == [[PAYLOAD] * SAMPLES] * SHARDS
    assert server.times_asked(".tar") == SHARDS


def test_in_a_spawned_process(server, tmp_path):
    shards = open_remote(server, tmp_path)
    spawn = multiprocessing.get_context("spawn")
    shards.read(shards.sample(0, 0))
    put = spawn.Queue()
    child = spawn.Process(target=put_lengths, args=(shards, put))
    child.start()
    assert put.get(timeout=300) == [PAYLOAD] * SAMPLES * SHARDS
    child.join()
    assert server.times_asked("index.json") == 1 and server.times_asked(".tar") == SHARDS


# --- other readers ---


def test_verify_reads_urls(server, capsys):
    verify.main([server.url("set"), "--decode", "0"])
    assert "no problems" in capsys.readouterr().out
    server.faults["part 3.tar"], server.faults["part 4.jsonl"] = ["wrong"], ["404"]
    with pytest.raises(SystemExit):
        verify.main([server.url("set"), "--decode", "0"])
    said = capsys.readouterr().out
    assert "part%203.tar: sha256 differs" in said and "part%204.jsonl: not found" in said
    assert "2 problems" in said


def test_default_folder_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache(None, 1).folder == tmp_path / "vidssl" and (tmp_path / "vidssl").is_dir()


def test_s3(made, tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="pip install s3fs")
    moto = pytest.importorskip("moto.server", reason="pip install moto[server]")
    import s3fs

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "MAX_BLOCK_BYTES", 30_000)  # four requests a shard
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        fs = s3fs.S3FileSystem()
        fs.mkdir("bucket")
        fs.put(str(made), "bucket/set", recursive=True)
        here = Shards([str(made)])
        there = Shards(["s3://bucket/set"], str(tmp_path))
        assert there.hash == here.hash and there.list_samples() == here.list_samples()
        assert [there.read(s) for s in there.list_samples()] == [here.read(s) for s in here.list_samples()]
        loader = DataLoader(Bytes(Shards(["s3://bucket/set"], str(tmp_path / "2"))), SAMPLES, num_workers=2)
        assert [batch.tolist() for batch in loader] == [[PAYLOAD] * SAMPLES] * SHARDS  # fsspec after a fork
        fs.rm("bucket/set/part 1.tar")
        again = Shards(["s3://bucket/set"], str(tmp_path / "3"))
        with pytest.raises(UserError, match=r"^s3://bucket/set/part 1\.tar: .*run vidssl verify"):
            again.read(again.sample(1, 0))
    finally:
        server.stop()

"""Decoding in a child process: a hang, crash or memory blow-up costs one sample; no process stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from limits import set_limit
from training_clips import copy_with_damage, make_clips, train_batches

from tools import chaos_loader, fuzz_decode
from vidssl.core.errors import DecodeError, UserError
from vidssl.data import isolation
from vidssl.data.dataset import EXHAUSTED, MAX_ATTEMPTS, ClipReader, DecodeFailure, Example
from vidssl.data.decoding import open_video
from vidssl.data.isolated_dataset import IsolatedDataset
from vidssl.data.loader import DecodeErrorMonitor

ROOT = Path(__file__).parents[2]


class FaultyDataset:
    """faults: (position, attempt) -> what goes wrong there; all others return a clip."""

    def __init__(self, faults: dict[tuple[int, int], str]):
        self.faults = faults
        self.kept = []
        self.on_decode = lambda: None

    def key(self, position: int, attempt: int) -> str:
        return f"{position}.{attempt}"

    def try_position(self, position: int, attempt: int) -> Example | DecodeFailure:
        fault = self.faults.get((position, attempt), "")
        if fault == "slow read":
            time.sleep(4)
        self.on_decode()
        if fault == "bad":
            return DecodeFailure(self.key(position, attempt), "not_a_video")
        if fault == "hang":
            time.sleep(1000)
        if fault == "spin":
            while True:
                pass
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "exit":
            os._exit(0)
        if fault == "raise":
            raise ZeroDivisionError("a mistake in the decoder")
        if fault == "keep":
            self.kept.append(np.ones(30 << 20, np.uint8))
        if fault == "out of memory":
            raise MemoryError
        if fault == "user error":
            raise UserError("shard-000001.tar: gone")
        while fault == "memory":
            self.kept.append(np.ones(20 << 20, np.uint8))
            time.sleep(0.01)
        video = torch.arange(3 * 2 * 4 * 4, dtype=torch.uint8).reshape(3, 2, 4, 4) + position
        return Example(position, self.key(position, attempt), attempt, video, [])


def isolated(faults: dict[tuple[int, int], str], **settings) -> IsolatedDataset:
    return IsolatedDataset(
        FaultyDataset(faults), **{"timeout_s": 60.0, "memory_bytes": 200 << 20, **settings}
    )


REASONS = {
    "hang": "hang",
    "spin": "hang",
    "crash": "crash",
    "exit": "crash",
    "raise": "crash",
    "memory": "memory",
}
REASONS |= {"bad": "not_a_video", "out of memory": "memory"}


@pytest.mark.parametrize("fault, reason", REASONS.items())
def test_a_fault_costs_one_attempt(fault, reason):
    deadline = 3.0 if reason == "hang" else 60.0
    data = isolated({(1, 0): fault, (1, 1): "bad"}, timeout_s=deadline)
    reference = isolated({(1, 0): "bad", (1, 1): "bad"}, timeout_s=60.0)
    for position in range(3):
        got, want = data[position], reference[position]
        assert got._replace(video=0, failures=0) == want._replace(video=0, failures=0)
        assert got.video.equal(want.video)
        assert got.failures == ([("1.0", reason), ("1.1", "not_a_video")] if position == 1 else [])
    for one in (data, reference):
        one.close()


def test_one_child_serves_all_samples_until_it_is_closed():
    data = isolated({})
    pids = {data[i].position: data.sandbox.pid for i in range(5)}
    assert len(set(pids.values())) == 1 and psutil.pid_exists(pids[0])
    data.close()
    assert not psutil.pid_exists(pids[0])
    assert data[7].position == 7 and data.sandbox.pid != pids[0]  # it starts again when needed
    data.close()


def test_reading_has_no_deadline():
    data = isolated({(0, 0): "slow read"}, timeout_s=3.0)
    assert data[0].failures == []
    data.close()


def test_a_child_that_grows_over_many_samples_is_replaced_without_a_failure():
    data = isolated({(i, 0): "keep" for i in range(20)}, memory_bytes=100 << 20)
    pids = []
    for i in range(20):
        assert data[i].failures == []
        pids.append(data.sandbox.pid)
    assert 3 <= len(set(pids)) <= 7
    data.close()


@pytest.mark.parametrize("extra, outcome", [(0, "memory"), (100, "result")])
def test_a_job_may_take_more_memory_than_others(extra, outcome, monkeypatch):
    monkeypatch.setattr(isolation, "POLL_S", -1.0)
    bytes_held = iter([50, 200])
    monkeypatch.setattr(isolation, "rss_bytes", lambda _: next(bytes_held))
    answers = iter([False, True])
    conn = SimpleNamespace(send=list, poll=lambda _: next(answers), recv=lambda: ("result", "result"))
    child = SimpleNamespace(process=SimpleNamespace(pid=1), conn=conn, memory=None)
    sandbox = isolation.Sandbox(list, 60.0, start_method="fork", memory_bytes=100)
    got = sandbox._supervise(child, (0,), extra)
    assert (got.reason if isinstance(got, isolation.Failure) else got) == outcome


def test_a_child_killed_between_two_samples_is_replaced_without_a_failure():
    data = isolated({})
    data[0]
    os.kill(data.sandbox.pid, signal.SIGKILL)
    os.waitid(os.P_PID, data.sandbox.pid, os.WEXITED | os.WNOWAIT)
    assert data[1].failures == []
    data.close()


def test_user_errors_are_raised_in_the_parent():
    data = isolated({(0, 0): "user error"})
    with pytest.raises(UserError, match=r"shard-000001\.tar: gone"):
        data[0]
    data.close()


def test_all_attempts_may_fail():
    data = isolated({(0, a): "bad" for a in range(MAX_ATTEMPTS)})
    assert data[0].key == EXHAUSTED and len(data[0].failures) == MAX_ATTEMPTS
    data.close()


def test_a_clip_larger_than_the_shared_memory(monkeypatch):
    monkeypatch.setattr(isolation, "SHARED_BYTES", 4096)
    data = isolated({})
    small = data[1].video
    data.close()
    monkeypatch.setattr(isolation, "SHARED_BYTES", 95)
    data = isolated({})
    assert data[1].video.equal(small)
    data.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_isolated_batches_are_the_same_batches(workers, synthetic_shards, tmp_path):
    folder = copy_with_damage(synthetic_shards / "train", tmp_path / "damaged", {(1, 3): 0.0, (0, 2): 0.5})
    plain = list(train_batches(make_clips(folder, max_decode_error_rate=0.5), 0, 8, 8, 0, 1, 0))
    apart = list(
        train_batches(make_clips(folder, max_decode_error_rate=0.5), 0, 8, 8, 0, 1, workers, isolate=True)
    )
    assert sum(len(b.failures) for b in plain) > 0
    for a, b in zip(plain, apart, strict=True):
        assert (
            a.video.equal(b.video) and a.key == b.key and a.failures == b.failures and a.label.equal(b.label)
        )


class FaultyReader(ClipReader):
    """faults: key -> what goes wrong with this sample; without `real`, decoding fails with that reason."""

    def __init__(self, shards, faults: dict[str, str], real: bool):
        super().__init__(shards)
        self.faults = faults
        self.real = real

    def read(self, sample, use):
        if sample.key not in self.faults:
            return super().read(sample, use)
        self.on_decode()
        if self.real:
            FaultyDataset({(0, 0): self.faults[sample.key]}).try_position(0, 0)
        raise DecodeError(self.faults[sample.key])


# On a busy machine memory fills slowly, so that a short deadline would come first.
@pytest.mark.parametrize("kinds, deadline_s", [(("hang",), 6.0), (("crash", "memory"), 60.0)])
def test_a_file_that_hangs_or_crashes_is_replaced_like_a_damaged_one(kinds, deadline_s, synthetic_shards):
    train = synthetic_shards / "train"
    keys = [s.key for s in make_clips(train).shards.list_samples()][5:50:20]
    faults = dict(zip(keys, kinds, strict=False))

    def run(real: bool) -> list:
        clips = make_clips(train, max_decode_error_rate=0.5, decode_timeout_s=deadline_s, memory_mb=200)
        clips.clip_reader = FaultyReader(clips.shards, faults, real)
        return list(train_batches(clips, 0, 8, 8, 0, 1, workers=2 if real else 0, isolate=real))

    damaged = run(real=False)
    faulty = run(real=True)
    assert sorted({b for batch in damaged for b in batch.failures}) == sorted(faults.items())
    for a, b in zip(damaged, faulty, strict=True):
        assert a.video.equal(b.video) and a.key == b.key and a.failures == b.failures


def test_hangs_count_as_decode_errors():
    monitor = DecodeErrorMonitor(0.05)
    with pytest.raises(UserError, match="'hang': 11"):
        monitor.add(200, [DecodeFailure("a", "hang")] * 11)


ORPHANS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + '/tests']
from training_clips import make_clips
from limits import set_limit
from training_clips import train_batches
for batch in train_batches(make_clips({folder!r}), 0, 10**6, 8, 0, 1, {workers}, isolate=True):
    print("going", flush=True)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_no_process_stays_when_the_run_is_killed(workers, synthetic_shards):
    code = ORPHANS.format(root=str(ROOT), folder=str(synthetic_shards / "train"), workers=workers)
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    for _ in range(5):
        assert run.stdout.readline() == b"going\n"
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) >= (1 if workers == 0 else 4)
    run.kill()
    run.wait()
    run.stdout.close()
    # A loader worker looks every five seconds whether its parent lives.
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not [c for c in alive if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]


def test_mutated_files_neither_hang_nor_crash_the_loader(tiny_corpus):
    outcomes, _ = fuzz_decode.run(sorted(tiny_corpus.rglob("*.mp4")), count=100, seed=0, deadline=60.0)
    assert sum(outcomes.values()) == 100 and outcomes["decoded"] >= 20
    assert sum(outcomes.values()) - outcomes["decoded"] >= 10  # the mutations bite
    assert outcomes["hang"] == outcomes["memory"] == 0


def test_mutations_are_functions_of_the_seed(make_video):
    files = [make_video(), make_video(7), b"abc"]
    for seed in range(30):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        one, two = (fuzz_decode.mutate(files[0], files[1], rng) for rng in rngs)
        assert one == two and one[1] != files[0]
    assert len(
        {fuzz_decode.mutate(files[0], files[1], np.random.default_rng(s))[0] for s in range(60)}
    ) == len(fuzz_decode.MUTATIONS)


def test_repeated_kills_lose_and_repeat_nothing(synthetic_shards):
    report = chaos_loader.run(synthetic_shards / "train", kills=5, seed=0, min_epochs=2)
    assert report["kills"] == 5 and len(report["settings"]) >= 3
    assert report["wrong"] == [] and report["epochs"] >= 2


def test_a_bomb_is_refused_before_decoding(make_video, monkeypatch):
    data = make_video()
    for name, limit, reason in (("MAX_FRAMES", 19, "too_long"), ("MAX_BYTES", 100, "too_large")):
        set_limit(monkeypatch, name, limit)
        for decoder in ("auto", "decord"):
            with pytest.raises(DecodeError) as e:
                open_video(data, "mp4", None, decoder)
            assert e.value.reason == reason
        monkeypatch.undo()
    set_limit(monkeypatch, "MAX_DECODED", 5 * 48 * 64 * 3)
    video = open_video(data, "mp4")
    assert len(video.get(range(5))) == 5
    with pytest.raises(DecodeError) as e:
        video.get(range(6))
    assert e.value.reason == "too_large"

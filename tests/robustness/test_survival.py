"""Robustness of a run: damaged checkpoints, full disks, skipped steps, signals, lost processes."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fork_threads import threads_at_forks
from safetensors import SafetensorError
from safetensors.torch import load_file

from vidssl import train
from vidssl.core.errors import EXIT_REQUEUE, Interrupted, Preempted, UserError, run_cli
from vidssl.core.launch import free_port
from vidssl.core.log import configure_logging
from vidssl.pretrained import files as native_files
from vidssl.training import checkpoint, collapse, feature_stats, metrics_log
from vidssl.training.distributed import Strategy, copy_to_cpu
from vidssl.training.loss_guard import MIN_HISTORY, LossGuard

ROOT = Path(__file__).parents[2]
FILES = [
    f"configs/{name}.yaml"
    for name in ("method/vjepa_tiny", "model/vit_micro", "data/quickstart", "run/smoke")
]
SMALL = ["model.dim=32", "model.depth=1", "method.predictor.width=16", "augment.size=16", "run.steps=12"]
SMALL += [
    "run.save_every=4",
    "optim.warmup=2",
    "data.cache=host",
    "efficiency.decode_in_subprocess=false",
]


@pytest.fixture(autouse=True)
def log_to_stderr():
    configure_logging()


@pytest.fixture
def run(synthetic_shards, monkeypatch):
    """Trains in this process: run(out, "key=value", ...) returns the rows of the log."""
    monkeypatch.chdir(ROOT)

    def call(out: Path, *more: str) -> list[dict]:
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main([*FILES, *SMALL, f"data.train={synthetic_shards / 'train'}", f"run.out={out}", *more])
        return rows(out)

    return call


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a: Path, b: Path) -> bool:
    names = (
        "encoder.safetensors",
        "encoder_online.safetensors",
        "checkpoints/step-00000012/optimizer.safetensors",
    )
    pairs = [(load_file(a / n), load_file(b / n)) for n in names]
    return all(x[k].equal(y[k]) for x, y in pairs for k in x)


def spoil(monkeypatch, steps: set[int], factor: float = float("nan")) -> None:
    """Multiplies the loss and the gradients of some steps (1..)."""
    original = train.forward_backward

    def spoiled(strategy, model, parts):
        got = original(strategy, model, parts)
        if parts[0].rng.step + 1 in steps:
            got["loss"] = got["loss"] * factor
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(factor)
        return got

    monkeypatch.setattr(train, "forward_backward", spoiled)


# Checkpoints


def state(value: float) -> dict:
    optimizer = {
        "state": {"w": {"step": torch.tensor(3.0), "exp_avg": torch.full((4,), value)}},
        "param_groups": [{}],
    }
    plain = {"guard": {}, "feature_stats": {}, "scaler": None, "provenance": {"lr": 0.1}}
    return {"model": {"w": torch.full((500,), value)}, "optimizer": optimizer, **plain}


def test_checkpoint_round_trip_and_retention(tmp_path):
    for step in range(10, 70, 10):
        checkpoint.save_checkpoint(tmp_path, step, state(float(step)), keep=2, keep_every=30)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [f"step-{s:08d}" for s in (30, 50, 60)]
    got = checkpoint.load_checkpoint(tmp_path)
    assert got["step"] == 60 and got["model"]["w"].equal(torch.full((500,), 60.0))
    assert got["optimizer"]["state"]["w"]["step"].equal(torch.tensor(3.0)) and got["provenance"] == {
        "lr": 0.1
    }


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_reported_and_kept(name, how, tmp_path, capsys):
    for step in (10, 20):
        checkpoint.save_checkpoint(tmp_path, step, state(float(step)), keep=2)
    path = tmp_path / "step-00000020" / name
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 64
        path.write_bytes(data[: len(data) // 2] if how == "cut" else data)
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 10
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"{path.parent}: cannot be read" in said
    checkpoint.quarantine(tmp_path, 10)
    checkpoint.save_checkpoint(tmp_path, 20, state(2.0), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000010",
        "step-00000020",
        "step-00000020.unreadable-1",
    ]


def test_a_run_without_a_readable_checkpoint_does_not_start_from_scratch(tmp_path):
    checkpoint.save_checkpoint(tmp_path, 10, state(1.0), keep=2)
    (tmp_path / "step-00000010" / "state.json").unlink()
    with pytest.raises(UserError, match="none of its 1 checkpoints can be read"):
        checkpoint.load_checkpoint(tmp_path)


def test_the_background_writer_gets_copies(tmp_path):
    weights = torch.zeros(4)
    tree = {"a": weights, "b": [weights, {"c": weights.view(2, 2)}]}
    got = copy_to_cpu(tree)
    weights += 1
    assert got["a"].sum() == got["b"][0].sum() == 0 and got["b"][1]["c"].shape == (2, 2)


# A disk that is full


def test_a_full_disk_costs_only_checkpoints(run, tmp_path, monkeypatch, capfd):
    run(tmp_path / "whole")
    original = native_files.save_file
    full = [True]

    def save_file(tensors, path, metadata=None):
        if full[0] and "step-00000008" in str(path):
            Path(path).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path, metadata)

    monkeypatch.setattr(native_files, "save_file", save_file)
    run(tmp_path / "run")
    assert "the checkpoint of step 8 could not be written: model.safetensors" in capfd.readouterr().err
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000012",
    ]
    assert same(tmp_path / "whole", tmp_path / "run")


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="the state after step 12 could not be written: File exists"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_log_rows_outlive_a_full_disk(tmp_path, monkeypatch):
    lines = metrics_log.JsonlWriter(tmp_path / "x.jsonl")
    honest = os.write
    room = [5]

    def write(number: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: room[0]]
        room[0] -= len(part)
        return honest(number, part)

    monkeypatch.setattr(os, "write", write)
    assert lines.add({"step": 1}) == "No space left on device"
    with pytest.raises(OSError, match="No space"):
        lines.sync()
    room[0] = 1 << 20
    assert lines.add({"step": 2}) is None
    lines.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [1, 2]


def test_jsonl_rows_are_strict_json(tmp_path):
    writer = metrics_log.JsonlWriter(tmp_path / "x.jsonl")
    writer.add({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    writer.close()
    text = (tmp_path / "x.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}


# Skipped steps


def test_a_bad_step_is_skipped_and_counted(run, tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, {6})
    got = run(tmp_path / "run")
    assert [r["skipped"] for r in got] == [0] * 5 + [1] * 7
    assert [r["loss"] is None for r in got] == [step == 5 for step in range(12)]
    assert [r["skip_reason"] for r in got] == [None] * 5 + ["loss nan"] + [None] * 6
    assert "step 6: skipped: loss nan" in capfd.readouterr().err
    assert all(w.isfinite().all() for w in load_file(tmp_path / "run" / "encoder.safetensors").values())


def test_rollback_and_its_continuation(run, tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, {6, 7})
    whole = run(tmp_path / "whole", "run.max_consecutive_skips=1")
    assert (
        "restored the checkpoint of step 4; data and schedule continue from step 8" in capfd.readouterr().err
    )
    original = train.schedule

    def cut_off(optim, step, steps, momentum):
        if step == 9:
            raise KeyboardInterrupt
        return original(optim, step, steps, momentum)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, "schedule", cut_off)
        run(tmp_path / "run", "run.max_consecutive_skips=1")
    got = run(tmp_path / "run", "run.max_consecutive_skips=1")
    assert [r["samples_hash"] for r in got] == [r["samples_hash"] for r in whole] and len(
        {r["samples_hash"] for r in got}
    ) == 12
    assert [r["skipped"] for r in got] == [r["skipped"] for r in whole]
    assert same(tmp_path / "whole", tmp_path / "run")


def test_the_run_stops_after_max_rollbacks(run, tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(6, 13)))
    with pytest.raises(UserError, match=r"step 11: loss nan \(2 steps in a row, 2 rollbacks\)"):
        run(tmp_path / "run", "run.max_consecutive_skips=1")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    last = rows(tmp_path / "run")[-1]
    assert last["step"] == 11 and last["skip_reason"] == "loss nan"


def test_spikes():
    guard = LossGuard(2, 1, loss_spike_std=6.0)
    usual = [1.0 + 0.01 * (i % 5) for i in range(MIN_HISTORY)]
    assert all(guard.check_step({"loss": v, "grad_norm": v}) is None for v in usual)
    for _ in range(3):  # skipped steps do not count as history
        assert "loss 1.5 exceeds 1.1" in guard.check_step({"loss": 1.5, "grad_norm": 1.0})
    assert guard.should_rollback
    assert "grad_norm 9 exceeds" in guard.check_step({"loss": 1.0, "grad_norm": 9.0})
    again = LossGuard(2, 1, loss_spike_std=6.0)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state() and again.skipped == 4
    assert again.check_step({"loss": 1.02, "grad_norm": 1.02}) is None and again.consecutive_skips == 0
    assert LossGuard(2, 1, None).check_step({"loss": 1e9, "grad_norm": 1.0}) is None


# SIGTERM and lost processes


def terminate_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Sends a signal in a step (1..)."""
    original = Strategy.clip

    def clip(self, model, config, index):
        if index + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, model, config, index)

    monkeypatch.setattr(Strategy, "clip", clip)


@pytest.fixture
def sigterm_restored():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_the_run_after_its_step(run, tmp_path, monkeypatch, sigterm_restored):
    run(tmp_path / "whole")
    with monkeypatch.context() as m, pytest.raises(Preempted, match="ended after step 6"):
        terminate_at(m, 6)
        run(tmp_path / "run")
    assert checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == 6
    run(tmp_path / "run")
    assert same(tmp_path / "whole", tmp_path / "run")


def test_ctrl_c_ends_the_run_after_its_step(run, tmp_path, monkeypatch):
    terminate_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(Interrupted, match="Ctrl-C: ended after step 2, which is saved"):
        run(tmp_path / "run", "run.save_every=100")
    assert checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == 2


def test_sigterm_in_a_skipped_step_saves_the_accepted_weights(run, tmp_path, monkeypatch, sigterm_restored):
    with monkeypatch.context() as m, pytest.raises(Preempted):
        spoil(m, {6})
        terminate_at(m, 6)
        run(tmp_path / "run", "run.save_every=100")
    saved = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints")
    assert saved["step"] == 6 and saved["guard"]["consecutive_skips"] == 1
    moments = saved["optimizer"]["state"].values()
    assert {float(m["step"]) for m in moments} == {5.0}
    assert all(w.isfinite().all() for w in saved["model"].values())
    assert [r["skipped"] for r in run(tmp_path / "run", "run.save_every=100")] == [0] * 5 + [1] * 7


def test_preempted_has_the_exit_status_of_a_requeue(monkeypatch):
    def main(argv):
        raise Preempted("ended")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == EXIT_REQUEUE == 75


ALL_PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
PEER = """
import os, signal, sys
from vidssl import train
from vidssl.core.errors import run_cli
# On a loaded machine the imports may end further apart than a process waits for the other one.
print("ready", flush=True)
input()
original = train.forward_backward
def spoiled(strategy, model, parts):
    got = original(strategy, model, parts)
    step = parts[0].rng.step
    if strategy.rank == 1 and step == 2:
        got["loss"] = got["loss"] * float("nan")
    if strategy.rank == 1 and step == 6:
        os.kill(os.getpid(), signal.{number})
    return got
train.forward_backward = spoiled
run_cli(train.main)
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_bad_step_and_lost_peer_with_two_processes(number, synthetic_shards, tmp_path):
    """A dead process is noticed at once, one that hangs after efficiency.peer_timeout_s seconds."""
    more = [
        f"data.train={synthetic_shards / 'train'}",
        f"run.out={tmp_path / 'run'}",
        # a loaded machine does not answer at once, either
        f"efficiency.peer_timeout_s={600 if number == 'SIGKILL' else 20}",
        "efficiency.workers=0",
    ]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    script = [sys.executable, "-c", PEER.replace("{number}", number), *FILES, *SMALL, *more]
    both = [
        subprocess.Popen(script, cwd=ROOT, env={**env, "RANK": r, "LOCAL_RANK": r}, text=True, **ALL_PIPES)
        for r in "01"
    ]
    try:
        for process in both:
            assert process.stdout.readline() == "ready\n"
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = both[0].communicate(timeout=600)[1].strip().splitlines()
    finally:
        both[1].kill()
        both[1].communicate()
    assert both[0].returncode == EXIT_REQUEUE, said
    assert "another process of this run is gone or does not answer" in said[-1]
    assert "step 3: skipped: loss nan" in "".join(said)
    assert [r["skipped"] for r in rows(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]


def test_five_faults(synthetic_shards, tmp_path):
    """The disturbed run has a row for two steps, the undisturbed one for each."""
    call = [
        "tools/chaos.py",
        "--faults",
        "5",
        "--steps",
        "60",
        "--log-every",
        "2",
        "--shards",
        synthetic_shards,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, call)], cwd=ROOT, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal the undisturbed run's" in done.stdout


# Diagnostics and trackers


def test_online_probe_and_trackers(run, tmp_path, synthetic_shards):
    pytest.importorskip("tensorboard")
    watch = [f"online_probe.{part}={synthetic_shards / part}" for part in ("train", "test")]
    got = run(
        tmp_path / "run",
        *watch,
        "online_probe.every=5",
        "online_probe.samples=40",
        "run.trackers=[tensorboard]",
    )
    assert [r["step"] for r in got if "online_probe_knn" in r] == [5, 10, 12]
    assert all(
        0 <= r[k] <= 100
        for r in got
        if "online_probe_knn" in r
        for k in ("online_probe_knn", "online_probe_linear")
    )
    assert all(0 < r["matmul_utilization"] < 2 and r["memory"] > 1e8 for r in got)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "vidssl")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in got])
    for name in ("masks", "prediction", "features"):
        pictures = events.Images(f"pictures/{name}")
        assert {1, 12} <= {e.step for e in pictures} and pictures[0].width > 100
    assert all("pictures_s" in got[e.step - 1] for e in pictures)


def test_a_tracker_that_is_not_installed(run, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    with pytest.raises(UserError, match=r"run\.trackers: wandb is not installed: pip install wandb"):
        run(tmp_path / "run", "run.trackers=[wandb]")
    assert not (tmp_path / "run").exists()


def test_a_collapse_can_stop_the_run(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(collapse, "COLLAPSES", (("all is alike", (collapse.Sign("rank"),)),))
    monkeypatch.setattr(feature_stats, "MIN_CLIPS", 1)
    with pytest.raises(UserError, match="stopped at step 4: the features have collapsed"):
        run(tmp_path / "run", "run.feature_stats_every=3", "run.stop_on_collapse=true")
    assert capfd.readouterr().err.count("step 3: the features have collapsed: all is alike: rank") == 1
    assert checkpoint.load_checkpoint(tmp_path / "run" / "checkpoints")["step"] == 4


def test_no_thread_of_a_run_is_there_when_it_forks(run, tmp_path):
    with threads_at_forks() as threads:
        run(tmp_path / "run", "run.steps=2", "run.save_every=1", "efficiency.workers=2")
    # two workers decode for data.cache, then two serve the training
    assert threads == [[]] * 4


def test_checkpoints_are_written_in_the_background():
    writer = checkpoint.AsyncWriter()
    order = []
    started_second = threading.Event()

    def write() -> None:
        assert started_second.wait(60)
        order.append("written")

    writer.start("it", lambda: None, write)
    order.append("going on")
    started_second.set()
    writer.wait()
    assert order == ["going on", "written"] and not writer.pop_errors()
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def test_reduce_in_one_process():
    AcceleratorState._reset_state(reset_partial_state=True)
    got = Strategy(Accelerator(cpu=True)).all_reduce_metrics(
        {"loss": torch.tensor(0.5)}, {"undecodable_samples": 2, "stop": True}
    )
    assert got == {"loss": 0.5, "undecodable_samples": 2, "stop": 1}

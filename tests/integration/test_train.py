"""train.py as a user meets it: killed and continued, on other numbers of workers and processes, and wrongly
called."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import run_here
from safetensors.torch import load_file
from signal_at import signalled

from vidssl import train as train_program
from vidssl.core.errors import EXIT_REQUEUE, UserError
from vidssl.data.shards import Shards
from vidssl.pretrained.files import load_weights
from vidssl.pretrained.load import load_encoder
from vidssl.training.checkpoint import load_checkpoint
from vidssl.training.distributed import Strategy

ROOT = Path(__file__).parents[2]
FILES = ["configs/method/vjepa_tiny.yaml", "configs/model/vit_micro.yaml", "configs/data/quickstart.yaml"]
FILES += ["configs/run/smoke.yaml"]
STEPS = 12


def command(shards: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    run = [sys.executable]
    if processes > 1:
        run += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    settings = [
        f"data.train={shards}",
        f"run.out={out}",
        f"run.steps={STEPS}",
        "run.save_every=4",
        "model.depth=2",
        # sums do not depend on the process in which they are computed
        "efficiency.threads=1",
    ]
    return [*run, "vidssl/train.py", *FILES, *settings, *more]


def train(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, timeout=600)


def train_here(*args, **kwargs) -> int:
    """Trains in this process. Returns the exit status."""
    return run_here(train_program.main, *command(*args, **kwargs)[2:])


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(synthetic_shards, tmp_path_factory) -> Path:
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = train(synthetic_shards / "train", out)
    assert done.returncode == 0, done.stderr
    (out / "stderr.txt").write_text(done.stderr)
    return out


def test_start_and_end_are_said(whole, synthetic_shards):
    """In a file there is no progress bar; a run of seconds has no line of progress."""
    lines = (whole / "stderr.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("warning: ")]
    start = lines[:4]
    end = lines[-3:]
    assert [line.split(" ")[0] for line in start] == ["machine:", "data:", "model:", "run:"]
    assert start[0].startswith("machine: 1 process on cpu (1 thread), fp32, ")
    assert start[1] == f"data: 60 videos in 8 shards of {synthetic_shards / 'train'}"
    assert start[3].startswith(f"run: steps 1 to {STEPS}, each of 8 clips of 8 frames at 32 px; output ")
    assert end[0].startswith(f"{whole}: {STEPS} steps are done, loss {log(whole)[-1]['loss']:.4f} (")
    assert end[1] == f"encoder: {whole / 'encoder.safetensors'}"
    assert end[2].startswith("next: ")
    assert end[2].endswith(f"data.test={synthetic_shards / 'test'} out={whole / 'probe'}")


def test_the_run_folder(whole, synthetic_shards):
    rows = log(whole)
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    for key in (
        "loss",
        "loss_0",
        "lr",
        "weight_decay",
        "ema",
        "grad_norm",
        "clips_per_s",
        "wait",
        "samples_hash",
        "undecodable_samples",
        "skip_reason",
    ):
        assert key in rows[0]
    assert 0 < rows[0]["context_ratio_0"] < 1 and 0 < rows[0]["target_ratio_0"] < 1
    assert rows[-1]["feature_std_time"] > 0
    assert len({r["samples_hash"] for r in rows}) == STEPS
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    target, online = (load_file(whole / f"{n}.safetensors") for n in ("encoder", "encoder_online"))
    assert target.keys() == online.keys()
    assert not target["norm.weight"].equal(online["norm.weight"])
    (last,) = (whole / "checkpoints").glob("step-00000012")
    of_step = load_encoder(last)  # a step checkpoint is an encoder, too
    assert all(of_step.encoder.state_dict()[name].equal(value) for name, value in target.items())
    assert (
        of_step.metadata["step"] == 12 and of_step.metadata["model"] == load_encoder(whole).metadata["model"]
    )
    about = load_checkpoint(whole / "checkpoints")["provenance"]
    assert about["data"] == Shards([str(synthetic_shards / "train")]).hash
    assert about["config"]["run"]["steps"] == STEPS and about["libraries"]["torch"] == torch.__version__
    assert (
        about["revision"] and about["revision"] in load_weights(whole / "encoder.safetensors")[1]["revision"]
    )


@pytest.mark.parametrize(
    "workers, kill_at, number", [(0, 6, "SIGKILL"), (2, 9, "SIGKILL"), (2, 5, "SIGTERM")]
)
def test_resume_is_bitwise(workers, kill_at, number, whole, synthetic_shards, tmp_path):
    """The signal goes to all of its processes, as schedulers send it."""
    call = command(synthetic_shards / "train", tmp_path / "run", f"efficiency.workers={workers}")
    status = signalled(number, "row", kill_at, *call[1:])
    assert status == (-signal.SIGKILL if number == "SIGKILL" else EXIT_REQUEUE)
    with open(tmp_path / "run" / "log.jsonl", "a") as f:
        f.write('{"step": 11, "los')  # an incomplete line, as a kill can leave it
    more = f"efficiency.workers={workers}"
    assert train_here(synthetic_shards / "train", tmp_path / "run", more) == 0
    volatile = ("clips_per_s", "wait", "memory", "mfu", "matmul_utilization", "diagnostics_s", "save_s")
    for a, b in zip(log(whole), log(tmp_path / "run"), strict=True):
        assert {k: v for k, v in a.items() if k not in volatile} == {
            k: v for k, v in b.items() if k not in volatile
        }
    for name in ("encoder", "encoder_online"):
        want = load_file(whole / f"{name}.safetensors")
        got = load_file(tmp_path / "run" / f"{name}.safetensors")
        assert all(want[k].equal(got[k]) for k in want)


def test_two_processes_equal_one(whole, synthetic_shards, tmp_path):
    done = train(synthetic_shards / "train", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr
    one = log(whole)
    two = log(tmp_path / "run")
    assert [r["samples_hash"] for r in one] == [r["samples_hash"] for r in two]
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-5)


def test_micro_batches(whole, synthetic_shards, tmp_path):
    assert train_here(synthetic_shards / "train", tmp_path / "run", "efficiency.micro_batches=4") == 0
    assert [r["loss"] for r in log(tmp_path / "run")] == pytest.approx(
        [r["loss"] for r in log(whole)], rel=1e-5
    )


def test_a_row_of_several_steps(whole, synthetic_shards, tmp_path, monkeypatch):
    """The steps are the same, also those of a run that ends in the middle of a row and goes on."""
    out = tmp_path / "run"
    more = ("run.log_every=5",)
    with monkeypatch.context() as patched:
        clip = Strategy.clip

        def end_in_step_7(self, model, config, step):
            if step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return clip(self, model, config, step)

        patched.setattr(Strategy, "clip", end_in_step_7)
        assert train_here(synthetic_shards / "train", out, *more) == EXIT_REQUEUE
    assert [p.name for p in (out / "checkpoints").iterdir()][-1:] == ["step-00000007"]
    assert train_here(synthetic_shards / "train", out, *more) == 0
    want, got = log(whole), log(out)
    # a row ends with 5 steps, a measurement, a checkpoint, the run
    assert [(r["step"], r.get("steps", 1)) for r in got] == [
        *((1, 1), (4, 3), (5, 1), (7, 2)),
        *((8, 1), (10, 2), (12, 2)),
    ]
    assert "steps" not in want[0] and got[0].keys() == want[0].keys()
    for row in got:
        steps = want[row["step"] - row.get("steps", 1) : row["step"]]
        assert row["loss"] == pytest.approx(sum(r["loss"] for r in steps) / len(steps), rel=1e-12)
        assert row["flops"] == pytest.approx(sum(r["flops"] for r in steps) / len(steps), abs=1)
        assert [row[name] for name in ("lr", "ema")] == [steps[-1][name] for name in ("lr", "ema")]
        hashed = sum(int(r["samples_hash"], 16) for r in steps) % 2**63
        assert int(row["samples_hash"], 16) == hashed
    assert {k: v for k, v in got[-1].items() if k.startswith("feature_")} == {
        k: v for k, v in want[-1].items() if k.startswith("feature_")
    }
    for name in ("encoder", "encoder_online"):
        same = load_file(out / f"{name}.safetensors")
        assert all(v.equal(same[k]) for k, v in load_file(whole / f"{name}.safetensors").items())


def test_a_finished_run_is_left_alone(whole, synthetic_shards, capfd):
    before = (whole / "log.jsonl").read_bytes()
    assert train_here(synthetic_shards / "train", whole) == 0
    assert f"{whole}: {STEPS} steps are done, loss " in capfd.readouterr().err
    assert (whole / "log.jsonl").read_bytes() == before


def test_a_folder_holds_one_run(whole, synthetic_shards, capfd):
    assert train_here(synthetic_shards / "train", whole, "optim.lr=0.5") == 2
    assert "optim.lr is 0.003 there, 0.5 here" in capfd.readouterr().err


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["run.stepz=3"], "'run.stepz=3': unknown key 'run.stepz'; did you mean run.steps?"),
        (["method.mask.kind=tubes"], "no kind 'tubes'; allowed: random, "),
        (["optim.lr=fast"], "'fast'"),
        (["data.train=nowhere"], "nowhere: no such folder"),
        (["run.batch=12"], "run.batch 12 is not a multiple of run.lanes 8"),
        (["augment.size=30"], "augment.size 30 is not a multiple of model.patch 8: give 24 or 32"),
        (["model.heads=5"], "model.heads 5 does not divide model.dim 128: give 4 or 8"),
        (["method.target.kind=pixel"], "no kind 'pixel'; allowed: pixels, ema"),
        (["configs/method/nothing.yaml"], "configs/method/nothing.yaml: no such file"),
        (["configs/method/videomae_tiny.yaml"], "vjepa_tiny.yaml; give one of the two files"),
        (["efficiency.micro_batches=3"], "efficiency.micro_batches 3 does not divide 8"),
        (["data.fps=4"], "data: give either stride"),
        (["run.steps=0"], "'run.steps=0': input should be greater than or equal to 1"),
        (["data.stride=-1"], "greater than or equal to 1"),
        (["optim.lr=.nan"], "finite number"),
        (["optim.clip_grad=-1"], "greater than 0"),
        (["method.mask.visible=5"], "less than or equal to 1"),
        (["method.mask.past=4"], "method.mask.past: 4 must lie in 1..3"),
        (["augment.scale=[1,0.3]"], "the first must not be larger than the second"),
        (["run.batch=???"], "'run.batch=???': input should be a valid integer"),
        (["run.out=/proc/nothing"], "/proc/nothing: cannot be"),
        (["run.out=README.md/run"], "README.md is not a folder; choose another place"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(wrong, words, synthetic_shards, tmp_path, capfd):
    assert train_here(synthetic_shards / "train", tmp_path / "run", *wrong) == 2
    message = capfd.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1 and message.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_process_is_refused_before_data_are_decoded(
    synthetic_shards, tmp_path, monkeypatch, capfd
):
    def refuse(*_):
        raise UserError("held by another process")

    monkeypatch.setattr("vidssl.train.claim_run", refuse)
    for work in ("load_steps", "TrainState.restore"):
        monkeypatch.setattr(f"vidssl.train.{work}", lambda *_: pytest.fail("the folder is not ours"))
    assert train_here(synthetic_shards / "train", tmp_path / "out") == 2
    assert "held by another process" in capfd.readouterr().err


def test_a_diverged_run_keeps_its_last_checkpoint(synthetic_shards, tmp_path, capfd):
    more = ["optim.lr=1e18", "optim.warmup=0", "run.save_every=1", "run.max_consecutive_skips=1"]
    assert train_here(synthetic_shards / "train", tmp_path / "run", *more) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert (
        "(2 steps in a row, 2 rollbacks); the limit max_rollbacks=2 is reached; the last checkpoint is in"
        in message
    )
    kept = load_file(tmp_path / "run" / "encoder.safetensors")
    assert all(w.isfinite().all() for w in kept.values())


def test_a_mistake_from_the_shell(synthetic_shards, tmp_path):
    done = train(synthetic_shards / "train", tmp_path / "run", "run.stepz=3")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]

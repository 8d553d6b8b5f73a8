"""--processes: how the command line asks for it, and what becomes of statuses, signals and error lines."""

import os
import sys

import pytest

from vidssl.commands import embed
from vidssl.config import command_line
from vidssl.core import launch
from vidssl.core.errors import UserError
from vidssl.training.schema import TrainConfig


def run(code: str, count: int = 2) -> int:
    """Status of so many processes of `code`, which knows its rank."""
    setup = "import os, sys, signal\nrank = int(os.environ['RANK'])\n"
    return launch.run_processes([sys.executable, "-c", setup + code], count)


@pytest.mark.parametrize("words", [["--processes", "3"], ["--processes=3"]])
def test_the_option_is_taken_from_a_command_line(words):
    line = ["vidssl", "train", *words, "run.steps=3"]
    assert launch.take_processes(line) == 3
    assert line == ["vidssl", "train", "run.steps=3"]
    assert launch.take_processes(line) == 1


@pytest.mark.parametrize("value", ["0", "x", "-2", ""])
def test_a_number_that_is_none(value):
    with pytest.raises(UserError, match="give a number of processes, from 1 on"):
        launch.take_processes(["--processes", value])


def test_processes_of_a_launcher_start_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="a launcher has started this process already"):
        launch.take_processes(["--processes=2"])


def test_what_is_wrong_for_so_many_processes_is_said_before_they_start(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    files = ["method/vjepa_tiny", "model/vit_micro", "data/quickstart", "run/smoke"]
    with pytest.raises(UserError, match=r"run\.lanes 8 is not a multiple of the 3 processes"):
        command_line.check_processes(
            [*(f"configs/{name}.yaml" for name in files), "--processes=3", "data.train=tests"], TrainConfig
        )


def test_each_process_has_a_gpu_where_there_are_any(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    # Without a driver nothing asks torch
    monkeypatch.setattr(launch, "GPU_DRIVERS", (tmp_path / "no",))
    launch.check_gpus(3)
    monkeypatch.setattr(launch, "GPU_DRIVERS", (tmp_path,))
    launch.check_gpus(2)
    more = ["--processes=3", "data.train=tests", "run.lanes=12"]
    files = ["method/vjepa_tiny", "model/vit_micro", "data/quickstart", "run/smoke"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="--processes 3: each process takes a GPU, and 2 can be seen here"):
        command_line.check_processes([*(f"configs/{name}.yaml" for name in files), *more], TrainConfig)
    monkeypatch.setattr(embed, "relaunch", lambda count: pytest.fail("started"))
    arguments = ["tests", "--encoder", "timm:x", "--out", str(tmp_path / "out"), "--processes", "3"]
    with pytest.raises(UserError, match="--processes 3: each process takes a GPU"):
        embed.main(arguments)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    launch.check_gpus(3)


def test_processes_know_each_other(capfd):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"print(*(os.environ[n] for n in {names}), os.environ['OMP_NUM_THREADS'])"
    assert run(code) == 0
    lines = sorted(line.split() for line in capfd.readouterr().out.splitlines())
    assert [line[:5] for line in lines] == [[rank, rank, "2", "2", "127.0.0.1"] for rank in "01"]
    assert lines[0][5:] == lines[1][5:] and int(lines[0][6]) >= 1


@pytest.mark.parametrize(
    "ended, status",
    [
        ([], 0),
        ([0, 75], 75),
        ([75, 2], 2),
        ([75, 1, 2], 1),
        ([-9, 75], 137),
        ([-6, 75], 75),
        ([130, 130], 130),
    ],
)
def test_the_status_for_all(ended, status):
    assert launch.joint_status(ended) == status


def test_an_error_is_told_once(capfd):
    code = "from vidssl.core.errors import UserError, run_cli\n"
    code += "def main(argv): raise UserError(f'bad {rank // 2}')\nrun_cli(main)"
    assert run(code, 3) == 2
    assert capfd.readouterr().err.splitlines() == ["error: bad 0", "error: bad 1"]


def test_the_others_end_when_one_has_failed(monkeypatch):
    """Here one that does not heed SIGTERM."""
    monkeypatch.setattr(launch, "GRACE_S", (0.0, 0.0))
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 1: sys.exit(2)\nsignal.pause()"
    assert run(code) == 2


def test_signals_are_passed_on(tmp_path):
    """Sent by the first process once both are ready for it: both ends of a pipe are open."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
    code += f"open({str(pipe)!r}, 'rw'[rank])\n"
    code += "if rank == 0: os.kill(os.getppid(), signal.SIGTERM)\n"
    assert run(code + "signal.sigwait({signal.SIGTERM})\nsys.exit(75)") == 75

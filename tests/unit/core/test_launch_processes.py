"""--processes: how the command line asks for it, and what becomes of statuses, signals and error lines."""

import importlib.util
import os
import sys

import pytest

from vidssl.cli import COMMANDS, usage
from vidssl.commands import embed
from vidssl.commands.programs import PROGRAMS
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


ALONE = {  # programs that share no work, and arguments
    "vidssl.commands.zoo_run": ["configs/zoo/quickstart.yaml"],
    "vidssl.commands.adapt": ["--from=runs/x", "--videos=videos", "--out=x"],
    "vidssl.commands.quickstart": [],
    "vidssl.commands.convert": ["a", "b"],
    "vidssl.commands.decode": ["runs/x"],
    "data_prep.pack": ["videos", "x"],
    "data_prep.scan": ["shards"],
    "data_prep.synthetic": ["x"],
}


@pytest.mark.parametrize("name", ALONE)
def test_a_program_that_shares_no_work_refuses_several_processes(name, monkeypatch, tmp_path):
    """With the option, or started several times by a launcher."""
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(name).main
    for words in (["--processes", "2"], ["--processes=2"]):
        with pytest.raises(UserError, match="--processes: this program runs in one process"):
            main([*ALONE[name], *words])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="WORLD_SIZE is 2: this program runs in one process"):
        main(ALONE[name])
    assert not [*tmp_path.iterdir()]


def test_one_process_of_a_launcher_and_a_variable_of_the_whole_job_are_no_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.check_one_process([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK")
    launch.check_one_process([])


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_command_line_takes_processes_where_the_program_shares_its_work(command, monkeypatch, capsys):
    """What is answered before torch is imported, of programs with a configuration; help says the same."""
    program = PROGRAMS[command]
    source = importlib.util.find_spec(COMMANDS[command][0]).loader.get_source(COMMANDS[command][0])
    assert ("shares_work=False" not in source) == program.shares_work
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit):
        command_line.check_command_line(program.cls(), "", program.folders, program.shares_work)
    assert ("--processes N" in capsys.readouterr().out) == program.shares_work
    if not program.shares_work:
        monkeypatch.setattr(sys, "argv", [command, "no.such=1", "--processes=2"])
        with pytest.raises(SystemExit, match="2"):
            command_line.check_command_line(program.cls(), "", program.folders, program.shares_work)
        assert capsys.readouterr().err.startswith("error: --processes: this program runs in one process")


def test_the_usage_names_the_programs_that_share_their_work():
    line = usage().splitlines()[-1]
    named = [word.strip("(),.") for word in line.split("also")[1].split()]
    assert named == [
        name for name, program in PROGRAMS.items() if program.shares_work and name != "train"
    ] + ["embed"]


def test_an_error_line_takes_names_that_are_not_utf_8(capfd):
    code = "from vidssl.core.errors import print_last_line; print_last_line('error: caf\\udce9.mp4')"
    run(code)
    assert capfd.readouterr().err == "error: caf\\udce9.mp4\n"

"""The command `vidssl` runs the modules that it names, and doctor says what it finds."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from vidssl import cli, doctor
from vidssl.core.errors import DecodeError, UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_runs_its_module_as_a_script(command, monkeypatch):
    module, about = cli.COMMANDS[command]
    assert importlib.util.find_spec(module) is not None and about
    seen = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda *args, **options: seen.append((args, options)))
    monkeypatch.setattr(sys, "argv", ["vidssl"])
    cli.main([command, "a=1", "--help"])
    assert seen == [((module,), {"run_name": "__main__", "alter_sys": True})]
    assert sys.argv[1:] == ["a=1", "--help"]


def test_quiet_reaches_the_program(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda *args, **options: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["vidssl", "--quiet", "train", "a=1"])
    cli.console()
    assert seen == [["train", "a=1", "--quiet"]]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage_lists_all_commands(arguments, capsys):
    cli.main(arguments)
    out = capsys.readouterr().out
    grouped = [name for names in cli.GROUPS.values() for name in names]
    grouped += [name for name in cli.COMMANDS if name not in grouped]
    assert len(grouped) == len(cli.COMMANDS)
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == grouped


@pytest.mark.parametrize("wrong, words", [("trian", "did you mean train?"), ("xyz", "synthetic, pack, scan")])
def test_an_unknown_command(wrong, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vidssl", wrong])
    with pytest.raises(SystemExit) as end:
        cli.console()
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_mistake_ends_in_a_line_and_status_2_without_torch():
    code = "import sys; from vidssl.cli import console\n"
    code += "sys.argv = ['vidssl', 'train', 'configs/method/vjepa_tiny.yaml', 'run.stepz=1']\n"
    code += "try: console()\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n"
    assert done.stderr.splitlines() == [
        "error: 'run.stepz=1': unknown key 'run.stepz'; did you mean run.steps?"
    ]


def test_doctor_decodes_takes_a_step_and_names_what_extras_lack(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "ray" else "1.0")
    doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "decoder pyav: works" in lines and "extra ray: lacks ray: pip install 'vidssl[ray]'" in lines
    assert any(line.startswith("step on cpu: loss ") for line in lines)
    with pytest.raises(UserError, match="no arguments"):
        doctor.main(["x"])


def test_doctor_fails_where_no_video_can_be_decoded(capsys, monkeypatch):
    def broken(*args):
        raise DecodeError("corrupt", "made")

    monkeypatch.setattr(doctor, "open_video", broken)
    with pytest.raises(UserError, match="PyAV does not decode here"):
        doctor.main([])
    assert "decoder pyav: corrupt: made" in capsys.readouterr().out


def test_doctor_fails_where_no_step_can_be_taken(capsys, monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: no kernel image\nmore")

    monkeypatch.setattr(doctor, "take_step", broken)
    with pytest.raises(UserError, match="no step can be taken on cpu"):
        doctor.main([])
    assert "step on cpu: FAILS: CUDA error: no kernel image" in capsys.readouterr().out.splitlines()


def test_every_requirement_is_named_once():
    found = doctor.requirements()
    assert "torch" in found[""] and found["ray"] == ["ray"] and "test" in found

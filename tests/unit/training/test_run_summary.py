"""training/run_summary.py: what a run says when it starts and when it has ended."""

import json
import shlex

import pytest
import torch
from torch import nn

from vidssl.config import load_config
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.training.run_summary import RunEnd, machine_line, model_line, probe_command


def test_the_start_names_machine_and_model():
    line = machine_line(torch.device("cpu"), 2, "fp32", 1)
    assert line.startswith("machine: 2 processes on cpu (") and line.endswith("), fp32, 1 loader worker each")
    assert machine_line(torch.device("cpu"), 1, "bf16", None).endswith("), bf16")
    whole = nn.Sequential(nn.Linear(999, 1000), nn.Linear(999, 1000))
    assert model_line(whole[0], whole) == "model: encoder of 1.00 M parameters, 2.00 M in all"


def test_the_end_names_step_loss_and_files(tmp_path, capsys):
    rows = [json.dumps({"step": step, "loss": step / 10}) + "\n" for step in range(1, 4000)]
    (tmp_path / "log.jsonl").write_text("".join(rows))
    RunEnd(tmp_path).log_training("encoder: E")
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"{tmp_path}: 3999 steps are done, loss 399.9000 (00:00)" and second == "encoder: E"


def test_the_next_command_probes_test_beside_train(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    assert "data.test=LABELLED_TEST" in probe_command(tmp_path / "run", [str(tmp_path / "train")])
    (tmp_path / "test" / "index.json").write_text("{}")
    command = probe_command(tmp_path / "run", [str(tmp_path / "train")])
    assert f"data.train={tmp_path / 'train'} data.test={tmp_path / 'test'} " in command
    assert command.endswith(f"out={tmp_path / 'run' / 'probe'}")


@pytest.mark.parametrize("name", ["my videos, 2024", "a #1", "it's", "$HOME"])
def test_the_next_command_can_be_pasted(name, tmp_path):
    run = tmp_path / name
    (run / "test").mkdir(parents=True)
    (run / "test" / "index.json").write_text("{}")
    _, *words = shlex.split(probe_command(run, [str(run / "train")]))
    cfg = load_config(words[2:], ProbeConfig)
    assert words[:2] == ["vidssl", "probe"] and cfg.encoder == str(run) and cfg.out == str(run / "probe")
    assert cfg.data.train == [str(run / "train")] and cfg.data.test == [str(run / "test")]

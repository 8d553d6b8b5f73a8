"""`vidssl complete` knows commands, files, keys and values; the script for bash hands them over."""

import os
import shutil
import subprocess
import sys

import pytest

from vidssl.cli import COMMANDS
from vidssl.commands import completion
from vidssl.core.errors import UserError


def completed(capsys, *words):
    try:
        completion.complete(list(words), list(COMMANDS))
    except SystemExit as e:
        assert e.code == 1
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    "words, found",
    [
        (["pro"], ["probe"]),
        (["train", "--pr"], ["--print-config", "--processes"]),
        (["train", "--d"], ["--dry-run"]),
        (["probe", "--d"], ["--dry-run"]),
        (["train", "optim.lr_s"], ["optim.lr_scaling="]),
        (["train", "method.mas"], ["method.mask.", "method.masks_per_clip="]),
        (["train", "method.mask.k"], ["method.mask.kind=", "method.mask.keep_quantile="]),
        (["train", "x.yaml", "method.mask.kind=tu"], ["method.mask.kind=tube"]),
        (["train", "optim.lr_decay=c"], ["optim.lr_decay=cosine", "optim.lr_decay=constant"]),
        (["probe", "random_init="], ["random_init=true", "random_init=false"]),
        (["train", "configs/me"], ["configs/method/"]),
        (["train", "configs/method/vjepa2_1_"], ["configs/method/vjepa2_1_distilled.yaml"]),
        (["train", "--help", "method.mask.qu"], ["method.mask.quadrants"]),
        (["train", "run.out=x"], []),
        (["pack", "x"], []),
        (["list", "mod"], ["models"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
)  # fmt: skip
def test_the_last_word_is_completed(words, found, capsys):
    assert completed(capsys, *words) == found


def test_a_script_is_printed_for_each_shell(capsys):
    for shell in ("bash", "zsh", "fish"):
        completion.main([shell])
        assert "vidssl complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="bash, zsh, fish"):
        completion.main(["tcsh"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_gets_what_follows_the_equals_sign(tmp_path):
    program = tmp_path / "vidssl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vidssl.cli "$@"\n')
    program.chmod(0o755)
    ask = "COMP_LINE='vidssl train a.yaml optim.lr_decay=e'; COMP_POINT=${#COMP_LINE}; _vidssl"
    script = f'{completion.SCRIPTS["bash"]}\ncompopt() {{ :; }}; {ask}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, **path})
    assert done.stdout == "exponential\n" and done.stderr == ""

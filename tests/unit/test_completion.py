"""`vidssl complete` knows commands, files, keys and values; the script for bash hands them over."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def answer_of(shell: list[str], script: str, folder: Path) -> list[str]:
    """The lines that a shell prints with `vidssl` on its PATH."""
    program = folder / "vidssl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vidssl.cli "$@"\n')
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run([*shell, "-c", script], capture_output=True, text=True, env=env)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_gets_what_follows_the_equals_sign(tmp_path):
    ask = "COMP_LINE='vidssl train a.yaml optim.lr_decay=e'; COMP_POINT=${#COMP_LINE}; _vidssl"
    script = f'{completion.SCRIPTS["bash"]}\ncompopt() {{ :; }}; {ask}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    assert answer_of(["bash"], script, tmp_path) == ["exponential"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_gets_whole_words(tmp_path):
    """The commands of its completion system, which work on a terminal alone, print what they are given."""
    stubs = "compdef() { : }\ncompadd() { [[ $1 == -S ]] && shift 2; shift; print -l -- $@ }\n"
    ask = "words=(vidssl train a.yaml optim.lr_decay=e)\nCURRENT=4\n_vidssl"
    assert answer_of(["zsh", "-f"], f"{stubs}{completion.SCRIPTS['zsh']}\n{ask}", tmp_path) == [
        "optim.lr_decay=exponential"
    ]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_gets_whole_words_and_paths_behind_the_equals_sign(tmp_path):
    (tmp_path / "shards").mkdir()
    ask = f"complete -C 'vidssl train optim.lr_decay=e'\ncomplete -C 'vidssl train data.train={tmp_path}/sh'"
    found = answer_of(["fish", "--no-config"], f"{completion.SCRIPTS['fish']}\n{ask}", tmp_path)
    assert found == ["optim.lr_decay=exponential", f"data.train={tmp_path}/shards/"]

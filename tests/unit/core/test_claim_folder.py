"""Two processes, one folder: core.io.claim_folder, and the programs of data_prep that use it."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import pack, scan, synthetic
from vidssl.commands import convert
from vidssl.core.errors import UserError
from vidssl.core.io import LEFTOVER_AGE_S, LOCK_FILE, atomic_write, claim_folder, remove_leftovers
from vidssl.evaluation.processes import ONE_PROCESS
from vidssl.training.peers import claim_for_all
from vidssl.training.run_folder import claim_run

HOLD = """
import os, sys
from pathlib import Path
from vidssl.core.io import claim_folder
with claim_folder(Path(sys.argv[1]), "pack"):
    if os.fork() == 0:  # a child does not hold the lock when its parent has been killed
        sys.stdin.readline()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen]:
    """A process that holds tmp_path / "out" until it is killed or gets a line."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_says_who_holds_the_folder(holder, tmp_path):
    out = tmp_path / "out"
    who = rf"out: pack, process {holder.pid} on \S+, writes into this folder"
    with pytest.raises(UserError, match=who), claim_folder(out, "pack"):
        pass
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        pack.main([str(tmp_path / "src"), str(tmp_path / "out")])
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        synthetic.main([str(tmp_path / "out"), "--train", "1"])
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        convert.main([str(tmp_path / "src"), str(tmp_path / "out")])
    (tmp_path / "out/a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        scan.main([str(tmp_path / "out")])
    one_process = Namespace(run_on_main=lambda function: function())
    with pytest.raises(UserError, match=f"process {holder.pid}"), claim_run(out, "train", one_process):
        pass
    with pytest.raises(UserError, match=f"process {holder.pid}"), claim_for_all(out, "probe", ONE_PROCESS):
        pass
    assert (tmp_path / "out" / LOCK_FILE).exists()


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "out" / LOCK_FILE).read_text())["pid"] == holder.pid
    with claim_folder(tmp_path / "out", "pack"):
        assert json.loads((tmp_path / "out" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"pid": 1}', "\xff" * 5000])
def test_a_lock_file_of_any_content_is_taken_over(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    with claim_folder(tmp_path, "pack"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["program"] == "pack"
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_nothing_was_written_to_does_not_stay(tmp_path):
    with pytest.raises(UserError, match="no input"), claim_folder(tmp_path / "out", "pack"):
        raise UserError("no input")
    assert not (tmp_path / "out").exists()
    with claim_folder(tmp_path / "out", "pack"):
        (tmp_path / "out/file").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    half = []

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        half.append(temporary.name)
        for name in (temporary.name, "at-work.0123abcd.tmp"):
            (tmp_path / "killed" / name).write_text("half")
        hours_ago = time.time() - LEFTOVER_AGE_S - 1
        os.utime(tmp_path / "killed" / temporary.name, (hours_ago, hours_ago))

    (tmp_path / "killed").mkdir()
    atomic_write(tmp_path / "index.json", write)
    kept = ["model.tmp", "index.json.tmp", "index.json", "at-work.0123abcd.tmp"]
    for name in kept:
        (tmp_path / "killed" / name).write_text("x")
    with claim_folder(tmp_path / "killed", "pack"):
        pass
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(kept)
    assert len(half) == 1


def test_a_temporary_file_that_its_writer_renames_meanwhile_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda folder: ["index.json.0123abcd.tmp"])
    remove_leftovers(tmp_path, 0)


def test_a_killed_convert_is_started_again(tmp_path, monkeypatch):
    (tmp_path / "encoder.safetensors.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / LOCK_FILE).write_text("{}")

    def read(src: str) -> None:
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        raise UserError("read")

    monkeypatch.setattr("vidssl.commands.convert.check_source", lambda src: None)
    monkeypatch.setattr("vidssl.pretrained.load.read_checkpoint_file", read)
    with pytest.raises(UserError, match="read"):
        convert.main(["x", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is there already"):
        convert.main(["x", str(tmp_path)])

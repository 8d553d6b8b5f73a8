"""Checkpoint files and the background writer."""

import errno
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from vidssl.training import checkpoint
from vidssl.training.checkpoint import AsyncWriter, flatten_optimizer, revision, unflatten_optimizer

ROOT = Path(__file__).parents[3]


def failing(error: BaseException):
    def write() -> None:
        raise error

    return write


def test_a_full_disk_is_reported_and_the_run_continues():
    with AsyncWriter() as writer:
        writer.start("step 4", lambda: None, failing(OSError(errno.ENOSPC, "No space left on device")))
        writer.wait()
        assert writer.failed == "No space left on device"
        assert writer.pop_errors() == ["step 4 could not be written: No space left on device"]
        assert writer.pop_errors() == []
        written = []
        writer.start("step 8", lambda: None, lambda: written.append(8))
    assert writer.failed is None and written == [8]


@pytest.mark.parametrize("kind", [MemoryError, ValueError, SafetensorError, ZeroDivisionError])
@pytest.mark.parametrize("where", ["wait", "start", "pop_errors", "exit"])
def test_any_other_error_of_the_writer_ends_the_run(kind, where):
    with pytest.raises(kind, match="broken"), AsyncWriter() as writer:
        writer.start("step 4", lambda: None, failing(kind("broken")))
        if where == "wait":
            writer.wait()
        elif where == "start":
            writer.start("step 8", lambda: None, lambda: None)
        while where == "pop_errors":
            writer.pop_errors()


def test_nothing_is_written_when_the_log_cannot_be():
    with AsyncWriter() as writer:
        writer.start("step 4", failing(OSError("read-only")), failing(AssertionError()))
        assert writer.failed == "read-only"


def test_optimizer_tensors_are_named_after_parameters():
    moments = {"step": torch.tensor(2.0), "exp_avg": torch.ones(3)}
    state = {
        "state": {"encoder.norm.weight": moments},
        "param_groups": [{"params": ["encoder.norm.weight"]}],
    }
    tensors, groups = flatten_optimizer(state)
    assert list(tensors) == ["encoder.norm.weight.step", "encoder.norm.weight.exp_avg"]
    assert unflatten_optimizer(tensors, groups) == state


def test_a_folder_without_checkpoints_holds_none(tmp_path):
    assert checkpoint.load_checkpoint(tmp_path) is None


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_revision_is_that_of_the_checkout():
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--tags"]
    assert revision() == subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

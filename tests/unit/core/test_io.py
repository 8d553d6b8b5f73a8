"""Files follow the umask; a lock can be shared by users who may only read its file."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidssl.core.io import atomic_write, exclusive_lock
from vidssl.pretrained.files import save_weights


def write_text(path: Path) -> None:
    path.write_text("x")


def write_safetensors(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path)


def write_torch(path: Path) -> None:
    torch.save({"x": 1}, path)


def replace_by_a_private_file(path: Path) -> None:
    path.unlink()
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


@pytest.mark.parametrize(
    "write",
    [write_text, write_safetensors, write_torch, replace_by_a_private_file, None],
    ids=lambda write: write.__name__ if write else "save_weights",
)
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask(write, umask, tmp_path):
    previous = os.umask(umask)
    try:
        path = tmp_path / "file"
        if write is None:
            save_weights(path, {"x": torch.zeros(1)}, {})
        else:
            atomic_write(path, write)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_needs_no_right_to_write(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with exclusive_lock(path):
        assert path.exists()
    opened = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda *a, **k: opened.append(a[1]) or original(*a, **k))
    with exclusive_lock(path):
        assert opened == [os.O_RDONLY]

"""Files follow the umask; a lock can be shared by users who may only read its file."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write, check_free_space, exclusive_lock
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


def test_two_writers_of_a_file_do_not_share_a_temporary_one(tmp_path):
    path = tmp_path / "file"

    def write_first(temporary: Path) -> None:
        temporary.write_text("first")
        atomic_write(path, lambda other: other.write_text("second"))
        assert path.read_text() == "second" and temporary.read_text() == "first"

    atomic_write(path, write_first)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "full"), UserError("no"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_only(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("total", "free", "fits"), [(9, 7, True), (9, 6, False), (0, 0, True)])
def test_room_on_a_disk_that_counts_it(total, free, fits, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(total=total, free=free))
    expected = contextlib.nullcontext() if fits else pytest.raises(UserError, match=r"x take .* GB free; y")
    with expected:
        check_free_space(tmp_path / "not" / "yet", 7, "x", "y")


def test_a_lock_needs_no_right_to_write(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with exclusive_lock(path):
        assert path.exists()
    original = os.open
    refused = [errno.EACCES]

    def open_read_only(name, flags, *mode):
        if flags & os.O_RDWR:
            raise OSError(refused[0], os.strerror(refused[0]))
        return original(name, flags, *mode)

    monkeypatch.setattr(os, "open", open_read_only)
    for refused[0] in (errno.EACCES, errno.EROFS):
        with exclusive_lock(path):
            pass
    with pytest.raises(OSError, match="Read-only"), exclusive_lock(tmp_path / "other"):
        pass
    refused[0] = errno.EIO
    with pytest.raises(OSError, match="Input/output"), exclusive_lock(path):
        pass


def test_a_lock_is_of_a_file_open_for_writing(tmp_path, monkeypatch):
    """As NFS needs it, also where the file is there."""
    flags = []
    monkeypatch.setattr(
        fcntl, "flock", lambda descriptor, _: flags.append(fcntl.fcntl(descriptor, fcntl.F_GETFL))
    )
    for _ in range(2):
        with exclusive_lock(tmp_path / "lock"):
            pass
    assert len(flags) == 4 and all(found & os.O_ACCMODE == os.O_RDWR for found in flags)

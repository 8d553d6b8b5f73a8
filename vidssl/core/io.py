"""Atomic writes (a killed process leaves the old or the new file, never half of one), hashes, and checks of
folders."""

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vidssl.core.errors import UserError


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path), syncs the file to the disk and renames it to `path`; an OSError leaves no
    temporary file. The mode follows the umask, also where `write` replaces the file by one for its owner
    alone."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            mode = os.fstat(f.fileno()).st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:
            temporary.chmod(stat.S_IMODE(mode))
        fsync_path(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Forces the content of a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stream_sha256(file: BinaryIO) -> str:
    """SHA-256 of a whole file as hex; the file is then at its beginning."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return stream_sha256(f)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is created if it does not exist. Users who may only read the file share
    it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing is not enough: a child forked meanwhile has the file open, too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def check_writable(out: Path) -> None:
    """Raises UserError unless files can be written to the folder, or it can be created; called before any
    work."""
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(existing):
        raise UserError(f"{out}: {existing} is not a folder; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {existing} cannot be written to; choose another place")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:  # a name that is too long, a file system that takes no folders
        raise UserError(f"{folder}: cannot be made: {e.strerror}") from e


@contextlib.contextmanager
def os_errors_as_user_errors(out: Path) -> Iterator[None]:
    """Converts an OSError raised in this block to a UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{e.filename or out}: cannot be written: {e.strerror or e}") from e

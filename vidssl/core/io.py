"""Files that a kill leaves old or new, never half-written; and folders that can be written."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vidssl.core.errors import UserError


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary path), sync it to the disk, rename it to `path`; what cannot be written leaves nothing behind."""
    beside = path.with_name(path.name + ".tmp")
    try:
        write(beside)
        fsync_path(beside)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """What is in a file, or which files are in a folder, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def stream_sha256(file: BinaryIO) -> str:
    """Of the whole file, whose beginning is what is read next."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return stream_sha256(f)


def check_writable(out: Path) -> None:
    """A folder that files can be written into, or can become one; asked before any work is done."""
    at = next(p for p in (out.absolute(), *out.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(at):
        raise UserError(f"{out}: {at} is not a folder; choose another place")
    if not os.access(at, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {at} cannot be written to; choose another place")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:  # a name that is too long, a file system that takes no folders
        raise UserError(f"{folder}: cannot be made: {e.strerror}") from e


@contextlib.contextmanager
def os_errors_as_user_errors(out: Path) -> Iterator[None]:
    """What cannot be written in here is a UserError that says so."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{e.filename or out}: cannot be written: {e.strerror or e}") from e

"""Files that a kill leaves old or new, never half-written; and folders that can be written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidssl.errors import UserError


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary path), sync it to the disk, rename it to `path`."""
    beside = path.with_name(path.name + ".tmp")
    write(beside)
    with open(beside, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(beside, path)


def check_out(out: Path) -> None:
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

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


def check_out(folder: Path) -> None:
    """The folder exists or can be made, and can be written: asked before any work is done."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written ({there} is {'not writable' if there.is_dir() else 'a file'})")

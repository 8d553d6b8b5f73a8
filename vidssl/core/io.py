"""Atomic writes (a killed process leaves the old or the new file, never half of one), hashes, and checks of
folders."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vidssl.core.errors import UserError

LOCK_FILE = ".lock"
LEFTOVER = re.compile(r".*\.[0-9a-f]{8}\.tmp")  # names of atomic_write's temporary files
MAX_ROW_BYTES = 1 << 16  # of a log
MAX_HEADER_BYTES = 1 << 24  # of a safetensors file
LEFTOVER_AGE_S = 3600  # seconds since the last write, after which a temporary file has no writer any more


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls write(temporary path), syncs the file to the disk and renames it to `path`; a failure leaves no
    temporary file. The mode follows the umask, also where `write` replaces the file by one for its owner
    alone. Of two processes that write a file at the same time, the last one wins."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as f:
            mode = os.fstat(f.fileno()).st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:
            temporary.chmod(stat.S_IMODE(mode))
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        # Once it is renamed, there is none
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes the text as UTF-8, whole or not at all."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode()))


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
        # NFS locks exclusively only what is open for writing
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EROFS) or not path.exists():
            raise
        descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing is not enough: a child forked meanwhile has the file open, too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def claim_folder(out: Path, program: str) -> Iterator[None]:
    """Makes a folder and holds it while this process writes into it.

    Temporary files of killed writers are removed (see remove_leftovers). Raises UserError with the holder's
    process and host if another process holds it. The lock of a process that has ended is free, whatever its
    file says. It is not shared with children.
    """
    is_new = not os.path.exists(out)
    make_folder(out)
    path = out / LOCK_FILE
    try:
        descriptor = _open_locked(path)
        try:
            holder = {"program": program, "pid": os.getpid(), "host": socket.gethostname()}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            remove_leftovers(out, LEFTOVER_AGE_S)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        if is_new:
            # A folder that nothing was written to does not stay
            with contextlib.suppress(OSError):
                out.rmdir()


def remove_leftovers(folder: Path, min_age_s: float) -> None:
    """Removes temporary files of atomic_write that were last written at least `min_age_s` seconds ago:
    writers that do not claim the folder may be at work on younger ones."""
    for name in filter(LEFTOVER.fullmatch, os.listdir(folder)):
        # its writer may rename or remove it meanwhile
        with contextlib.suppress(FileNotFoundError):
            if time.time() - (folder / name).stat().st_mtime >= min_age_s:
                (folder / name).unlink()


def _open_locked(path: Path) -> int:
    """Returns the descriptor of a lock file of which this process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A lock of the process: a child that outlives it does not hold it, as it would with flock.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except (BlockingIOError, PermissionError):
            text = os.pread(descriptor, 1000, 0).decode("utf-8", "replace")
            os.close(descriptor)
            raise UserError(
                f"{path.parent}: {_holder(text)}; wait for it, or choose another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        # The holder has removed the file in between
        os.close(descriptor)


def _holder(text: str) -> str:
    """Says who holds a lock, by the contents of its file."""
    try:
        holder = json.loads(text)
        who = f"{holder['program']}, process {holder['pid']} on {holder['host']},"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"{who} writes into this folder"


def check_writable(out: Path) -> None:
    """Raises UserError unless files can be written to the folder, or it can be created; called before any
    work."""
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(existing):
        raise UserError(f"{out}: {existing} is not a folder; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {existing} cannot be written to; choose another place")


def check_run_folder(folder: Path) -> None:
    """Raises UserError unless this is the folder of a training run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run folder: it has no config.yaml; give the run.out of a training")


def check_no_shards(out: Path, option: str) -> None:
    """Raises UserError if the output folder is one of packed shards."""
    if (out / "index.json").exists() or any(out.glob("*.tar")):
        raise UserError(f"{option} {out}: is a folder of shards; give the run a folder of its own")


def check_free_space(out: Path, needed: int, what: str, correction: str) -> None:
    """Raises UserError unless the disk of the folder, which may not exist yet, has `needed` bytes free."""
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    disk = shutil.disk_usage(existing)
    # Some file systems do not count their space.
    if disk.total and needed > disk.free:
        free = f"{disk.free / 1e9:.3g} GB free"
        raise UserError(f"{out}: {what} take {needed / 1e9:.3g} GB, the disk has {free}; {correction}")


def raise_open_file_limit() -> None:
    """Raises the soft limit of open files to the hard one: shards and waiting batches hold many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def last_json_row(path: Path) -> dict[str, Any]:
    """The last whole row of a file of JSON lines that may still grow; {} if there is none."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_ROW_BYTES))
        *rows, _ = file.read().split(b"\n")
    return json.loads(rows[-1]) if rows else {}


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without a last one that is cut short. Raises UserError for a line
    that is damaged."""
    lines = path.read_bytes().split(b"\n")[:-1]
    again = "run again in a new folder"
    return [_json_object(line, f"{path}: line {n} is", again) for n, line in enumerate(lines, 1)]


def native_description(path: Path) -> dict[str, Any]:
    """Our description in the header of a safetensors file, without torch; {} if there is none."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, MAX_HEADER_BYTES)))
        found = json.loads(header["__metadata__"]["vidssl"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json_object(path: Path, correction: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises UserError, with the correction, if it holds anything else: a
    power cut may leave it empty."""
    return _json_object(path.read_bytes(), f"{path}:", correction)


def _json_object(text: bytes, what: str, correction: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} damaged ({e}); {correction}") from None
    if not isinstance(found, dict):
        raise UserError(f"{what} damaged (no JSON object); {correction}")
    return found


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

"""Files that lie elsewhere, fetched whole: with time limits and retries, into a cache that a node's processes share.

http and https are read with the standard library; s3://, gs:// and others with fsspec and its package for them (s3fs,
gcsfs, ...), which take endpoint and credentials from the usual places (AWS_* variables, ~/.aws, FSSPEC_S3_*).
"""

import asyncio
import errno
import fcntl
import http.client
import io
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from vidssl.core.errors import UserError
from vidssl.core.io import check_writable, make_folder, stream_sha256

READ_TIMEOUT_S = 30.0  # seconds without a byte, until a connection counts as dead
BLOCK_BYTES = 8 << 20  # bytes of one request where fsspec reads; must arrive within 2 * QUIET
MIN_PROGRESS_BYTES = (
    64 << 10
)  # bytes; what brings less in 2 * QUIET counts as dead, and a retry that brings less as failed
RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each of the retries


class ShardError(Exception):
    """A file of a data set cannot be had, or is not the one that the index means.

    reason: "shard_missing" (not there, or the server cannot be reached) or "shard_changed" (other bytes than indexed).
    """

    def __init__(self, message: str, reason: str = "shard_missing"):
        super().__init__(message)
        self.reason = reason


def is_url(folder: str) -> bool:
    return "://" in folder


def local(folder: str) -> str:
    """A file:// address as a path; other addresses and paths as they are, a path in its shortest form."""
    if folder.startswith("file://"):
        return unquote(urlsplit(folder).path)
    return folder if is_url(folder) else str(Path(folder))


def join(folder: str, name: str) -> str:
    """The address of a file in a folder; what follows a "?" (signed addresses) stays at the end."""
    if not is_url(folder):
        return os.path.join(folder, name)
    if folder.startswith("http"):
        parts = urlsplit(folder)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{folder.rstrip('/')}/{name}"


def shown(url: str) -> str:
    """An address without what signs it."""
    return url.split("?")[0] if is_url(url) else url


def fetch_small(url: str) -> bytes:
    out = io.BytesIO()
    fetch(url, out)
    return out.getvalue()


def fetch(url: str, out: BinaryIO, size: int | None = None) -> None:
    """All of `url` into `out`, which may hold its beginning already. size: in bytes, if it is known what it must be.

    An interrupted transfer goes on where it stopped if the server can. It is an error after 5 retries in a row that
    brought next to nothing: within 20 s if the server refuses, 200 s if it is silent, 380 s if it trickles.
    """
    failed, furthest = 0, out.seek(0, os.SEEK_END)
    while problem := _attempt(url, out, size):
        if out.tell() >= furthest + MIN_PROGRESS_BYTES:
            failed, furthest = 0, out.tell()
        if failed == len(RETRY_DELAYS_S):
            raise ShardError(f"{shown(url)}: given up after {failed} retries: {problem}")
        time.sleep(RETRY_DELAYS_S[failed])
        failed += 1


def _attempt(url: str, out: BinaryIO, size: int | None) -> str:
    """Go on from the end of `out`. Returns what another attempt may mend; "": all is there."""
    at = out.seek(0, os.SEEK_END)
    if at == size:
        return ""
    try:
        begin, total, blocks = (_from_http if url.startswith(("http://", "https://")) else _from_fsspec)(
            url, at
        )
        if size is not None and total not in (size, None):
            raise ShardError(f"{shown(url)}: has {total} bytes, the index says {size}", "shard_changed")
        out.seek(begin)
        out.truncate()
        for block in blocks:
            _write(out, block)
    except (FileNotFoundError, PermissionError) as e:
        raise ShardError(f"{shown(url)}: {e.strerror or e}") from e
    except urllib.error.HTTPError as e:
        if e.code < 500 and e.code not in (408, 429):
            raise ShardError(f"{shown(url)}: the server answers {e.code} {e.reason}") from e
        return f"the server answers {e.code} {e.reason}"
    except network_errors() as e:
        return str(e) or type(e).__name__
    want = total if size is None else size
    return "" if want in (out.tell(), None) else f"the connection ended after {out.tell()} of {want} bytes"


def _write(out: BinaryIO, block: bytes) -> None:
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[out.write(rest) :]
    except OSError as e:
        more = "; lower data.cache_gb, or choose another data.cache_dir" if e.errno == errno.ENOSPC else ""
        raise UserError(f"{out.name}: {e.strerror}{more}") from e


def _from_http(url: str, at: int) -> tuple[int, int | None, Iterator[bytes]]:
    """-> (where the bytes begin: `at`, or 0 if the server has no ranges; bytes of the whole file, if told; bytes)"""
    headers = {"User-Agent": "vidssl"} | ({"Range": f"bytes={at}-"} if at else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=READ_TIMEOUT_S)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing from there on: the file has become shorter
            raise ShardError(
                f"{shown(url)}: has no more than {at} bytes, the index says more", "shard_changed"
            ) from e
        raise
    begin = at if answer.status == 206 else 0

    def blocks() -> Iterator[bytes]:
        since, got = time.monotonic(), 0
        with answer:
            while block := answer.read1(1 << 20):
                yield block
                got += len(block)
                if time.monotonic() > since + 2 * READ_TIMEOUT_S:
                    if got < MIN_PROGRESS_BYTES:
                        raise TimeoutError(f"only {got} bytes in {2 * READ_TIMEOUT_S:.0f} s")
                    since, got = time.monotonic(), 0

    return begin, None if answer.length is None else begin + answer.length, blocks()


def _from_fsspec(url: str, at: int) -> tuple[int, int | None, Iterator[bytes]]:
    """The same, by ranges of BLOCK bytes."""
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError) as e:  # its package is not installed; no such protocol
        raise UserError(f"{url}: {e}") from e

    def call(name: str, **between: int) -> Any:
        if fs.async_impl:
            return sync(fs.loop, getattr(fs, f"_{name}"), path, timeout=2 * READ_TIMEOUT_S, **between)
        return getattr(fs, name)(path, **between)

    total = call("info")["size"]
    return (
        at,
        total,
        (call("cat_file", start=i, end=min(i + BLOCK_BYTES, total)) for i in range(at, total, BLOCK_BYTES)),
    )


def network_errors() -> tuple[type[Exception], ...]:
    """What a bad connection raises; the packages behind fsspec have errors of their own."""
    found: list[type[Exception]] = [OSError, http.client.HTTPException, asyncio.TimeoutError]
    for module, name in (("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError")):
        with suppress(ImportError):
            found.append(getattr(import_module(module), name))
    return tuple(found)


class Cache:
    """Fetched files under the names of their checksums, at most `limit` bytes, for all processes of the node.

    <sha256>.tar and .jsonl are whole and checked. <sha256>.<size>.part is being fetched, or was when its process was
    killed: the next one goes on with it. Whoever reads or fetches a file holds a lock on it, which a killed process
    loses; names change only while the folder's `lock` is held. Room for a file is made before it is fetched, by
    removing those that were read longest ago and are not held. The folder must be on a disk of the node.
    """

    def __init__(self, folder: str | None, limit: int):
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder).absolute() if folder else Path(base) / "vidssl"
        self.limit = limit
        check_writable(self.folder)
        make_folder(self.folder)

    def has(self, sha256: str) -> bool:
        return (self.folder / f"{sha256}.tar").exists()

    @contextmanager
    def open(self, url: str, sha256: str, size: int | None) -> Iterator[BinaryIO]:
        """The file, open for reading; fetched if need be. size: of a tar, in bytes; None: a .jsonl, of unknown size."""
        path = self.folder / (f"{sha256}.jsonl" if size is None else f"{sha256}.tar")
        file = self._found(path, size) or self._get(url, path, sha256, size)
        try:
            yield file
        finally:
            _release(file)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        file = open(self.folder / "lock", "ab")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            _release(file)

    @staticmethod
    def _found(path: Path, size: int | None) -> BinaryIO | None:
        try:
            file = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if size is not None and os.fstat(file.fileno()).st_size != size:  # someone wrote into it
            path.unlink(missing_ok=True)
            _release(file)
            return None
        os.utime(file.fileno())
        return file

    def _get(self, url: str, path: Path, sha256: str, size: int | None) -> BinaryIO:
        part = self.folder / f"{sha256}.{size or 0}.part"
        wait = 0.01
        while True:  # while another process fetches it, or all room is held by files that others fetch
            with self._lock():
                if file := self._found(path, size):
                    return file
                file = self._begin(part, size or 0)
            if file:
                break
            time.sleep(wait)
            wait = min(2 * wait, 0.5)
        with ExitStack() as failed:
            failed.callback(_release, file)
            _fetch_checked(url, file, sha256, size)
            with self._lock():
                os.replace(part, path)
                fcntl.flock(file, fcntl.LOCK_SH)
                self._make_room(0)
            failed.pop_all()
        return file

    def _begin(self, part: Path, size: int) -> BinaryIO | None:
        """The file to fetch into, if nobody else does and there is room."""
        file = open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)  # noqa: SIM115
        if _take(file) and self._make_room(size, part.name):
            return file
        _release(file)
        return None

    def _make_room(self, size: int, but: str = "") -> bool:
        """Remove what was read longest ago until `size` bytes more fit; file `but` does not count."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".tar", ".jsonl", ".part")) and entry.name != but:
                stat = entry.stat()
                reserved = int(entry.name.split(".")[1]) if entry.name.endswith(".part") else 0
                found.append((stat.st_mtime_ns, max(stat.st_size, reserved), entry.path))
        free = self.limit - sum(n for _, n, _ in found)
        for _, n, path in sorted(found):
            if free >= size:
                break
            with open(path, "rb") as file:
                if _take(file):
                    os.unlink(path)
                    free += n
        return free >= size


def _take(file: BinaryIO) -> bool:
    """Lock it for ourselves alone; False if someone has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _release(file: BinaryIO) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile has the file open, too
    file.close()


def _fetch_checked(url: str, file: BinaryIO, sha256: str, size: int | None) -> None:
    """`url` into `file`; once more from the beginning if the bytes are not those that the index means."""
    problem = ""
    for _ in range(2):
        try:
            fetch(url, file, size)
            if (found := stream_sha256(file)) == sha256:
                os.fsync(file.fileno())
                return
            problem = f"{shown(url)}: its sha256 is {found}, the index says {sha256}"
        except ShardError as e:
            if e.reason != "shard_changed":
                raise
            problem = str(e)
        file.truncate(0)
    raise ShardError(f"{problem}; fetched twice", "shard_changed")

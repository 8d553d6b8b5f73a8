"""Remote files, read through fsspec, and a cache of them that the processes of a node share.

http(s)://, s3://, gs:// and other addresses; the packages behind them (s3fs, gcsfs, ...) take endpoint and
credentials from the usual places (AWS_* variables, ~/.aws, FSSPEC_S3_*), http(s) takes proxies from the
environment. A file of known size is fetched in ranges, so that an interrupted transfer continues. A server
without ranges must send a whole file within REQUEST_TIMEOUT_S.
"""

import asyncio
import errno
import fcntl
import io
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
from fsspec.asyn import sync
from fsspec.core import url_to_fs
from fsspec.implementations.http import HTTPFileSystem

from vidssl.core.errors import UserError
from vidssl.core.io import check_writable, exclusive_lock, make_folder, stream_sha256
from vidssl.data.addresses import ShardError, too_large, without_query

REQUEST_TIMEOUT_S = 60.0  # seconds that one request may take
MAX_BLOCK_BYTES = 8 << 20  # bytes of one request
# a request is a quarter as large after a failure, and twice as large after a success
MIN_BLOCK_BYTES = 64 << 10
RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each retry; a block that arrives resets the count
RETRIED_STATUS = (408, 429)  # and 5xx: HTTP statuses worth a retry


def filesystem(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of an address, and the path in it."""
    # encoded: a signed address is sent as it is; trust_env: proxies from the environment
    options = {"encoded": True, "client_kwargs": {"trust_env": True}} if url.startswith("http") else {}
    try:
        return url_to_fs(url, **options)
    except (ImportError, ValueError) as e:  # its package is not installed, or there is no such protocol
        raise UserError(f"{without_query(url)}: {e}") from e


def fetch_small(url: str, limit: int) -> bytes:
    """Returns the contents of a file; raises ShardError if it has more than `limit` bytes."""
    out = io.BytesIO()
    fetch(url, out, None, limit)
    return out.getvalue()


def fetch(url: str, out: BinaryIO, size: int | None, limit: int = MAX_BLOCK_BYTES) -> None:
    """Writes the contents of `url` to `out`, which may hold their beginning if `size` (bytes) is known.

    limit: bytes of a file of unknown size. Raises ShardError if the file is not there, has another size or is
    larger, or after 5 retries in a row without a block.
    """
    position = out.seek(0, os.SEEK_END)
    block_bytes = MAX_BLOCK_BYTES
    retries = 0
    while position != size:
        end = None if size is None else min(position + block_bytes, size)
        try:
            block = _request(url, position, end, limit if size is None else size)
        except network_errors() as e:
            if retries == len(RETRY_DELAYS_S):
                raise ShardError(
                    f"{without_query(url)}: gave up after {retries} retries: {_description(e)}"
                ) from e
            time.sleep(RETRY_DELAYS_S[retries])
            retries += 1
            block_bytes = max(MIN_BLOCK_BYTES, block_bytes // 4)
            continue
        if size is None or end is None:
            _write(out, block)
            return
        retries = 0
        block_bytes = min(MAX_BLOCK_BYTES, 2 * block_bytes)
        if len(block) > end - position:  # the server has no ranges and sent the whole file
            if len(block) != size:
                raise _wrong_size(url, len(block), size)
            block = block[position:]
        elif len(block) < end - position:
            raise _wrong_size(url, position + len(block), size)
        _write(out, block)
        position += len(block)


def _request(url: str, start: int, end: int | None, limit: int) -> bytes:
    """Returns the bytes start..end-1 (end None: the whole file), or the whole file from a server without
    ranges.

    Reads no more than `limit` bytes, whatever the server announces. Raises ShardError if a retry is useless.
    """
    fs, path = filesystem(url)
    try:
        if isinstance(fs, HTTPFileSystem):
            return sync(fs.loop, _read_http, fs, path, start, end, limit, timeout=REQUEST_TIMEOUT_S)
        # One byte more than the limit tells that the file is too large.
        limits = {"start": start, "end": limit + 1 if end is None else end}
        if fs.async_impl:
            data = sync(fs.loop, fs._cat_file, path, timeout=REQUEST_TIMEOUT_S, **limits)
        else:
            data = fs.cat_file(path, **limits)
        if len(data) > limit:
            raise too_large(url, limit)
        return data
    except (FileNotFoundError, PermissionError) as e:
        default = "not found" if isinstance(e, FileNotFoundError) else "permission denied"
        raise ShardError(f"{without_query(url)}: {e.strerror or default}") from e
    except aiohttp.ClientResponseError as e:
        if e.status == 416:  # the file ends before `start`
            raise ShardError(f"{without_query(url)}: has no more than {start} bytes", "shard_changed") from e
        if e.status < 500 and e.status not in RETRIED_STATUS:
            raise ShardError(f"{without_query(url)}: {_description(e)}") from e
        raise


async def _read_http(fs: HTTPFileSystem, url: str, start: int, end: int | None, limit: int) -> bytes:
    """`_request` over HTTP, part by part: a server may ignore the range, or pack much into a compressed
    answer."""
    options = dict(fs.kwargs)
    if end is not None:
        options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **options) as response:
        fs._raise_not_found_for_status(response, url)
        data = bytearray()
        async for part in response.content.iter_any():
            data += part
            if len(data) > limit:
                raise too_large(url, limit)
        return bytes(data)


def _description(e: Exception) -> str:
    if isinstance(e, aiohttp.ClientResponseError):  # its own text holds the address with its signature
        return f"the server answers {e.status} {e.message}"
    if isinstance(e, asyncio.TimeoutError):
        return f"timed out: a request took over {REQUEST_TIMEOUT_S:g} s"
    return str(e) or type(e).__name__


def _wrong_size(url: str, found: int, size: int) -> ShardError:
    return ShardError(f"{without_query(url)}: has {found} bytes, the index says {size}", "shard_changed")


def _write(out: BinaryIO, block: bytes) -> None:
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[out.write(rest) :]
    except OSError as e:
        hint = "; lower data.cache_gb, or choose another data.cache_dir" if e.errno == errno.ENOSPC else ""
        raise UserError(f"{out.name}: {e.strerror}{hint}") from e


def network_errors() -> tuple[type[Exception], ...]:
    """The exceptions of a bad connection; the packages behind fsspec have some of their own."""
    found: list[type[Exception]] = [OSError, asyncio.TimeoutError, aiohttp.ClientError]
    with suppress(ImportError):
        found.append(import_module("botocore.exceptions").BotoCoreError)
    return tuple(found)


class Cache:
    """Fetched files, named by their checksums, at most `limit` bytes, for all processes of the node.

    <sha256>.tar and .jsonl are complete and checked. <sha256>.<size>.part is being fetched, or was when its
    process was killed, and then the next process continues it. A process that reads or fetches a file holds a
    lock on it, which it loses when it is killed; names change only under the lock of the file `lock`. Room
    for a file is made before it is fetched, by removing the least recently used files that are not locked.
    The folder must be on a disk of the node.

    The modification time of a file is the time of its last use, and that of `lock` the last of all. Each use
    gets a later one, in nanoseconds, so that no clock's resolution decides the order: a file system stamps
    files every 4 ms, and the clocks of two processes may read the same.
    """

    def __init__(self, folder: str | None, limit: int):
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder).absolute() if folder else Path(base) / "vidssl"
        self.limit = limit
        self._last_use_ns = 0
        check_writable(self.folder)
        make_folder(self.folder)

    @contextmanager
    def open(self, url: str, sha256: str, size: int | None, ext: str = ".tar") -> Iterator[BinaryIO]:
        """Yields the file, open for reading, after it was fetched if it is not in the cache.

        size: bytes; None: unknown, as of a .jsonl in older indexes. ext: of the name in the cache.
        """
        path = self.folder / f"{sha256}{ext}"
        file = self._open_cached(path, size) or self._fetch(url, path, sha256, size)
        try:
            yield file
        finally:
            _release(file)

    def _lock(self) -> AbstractContextManager[None]:
        return exclusive_lock(self.folder / "lock")

    def _mark_used(self, file: BinaryIO) -> None:
        lock = self.folder / "lock"
        last = lock.stat().st_mtime_ns if lock.exists() else 0
        self._last_use_ns = max(time.time_ns(), self._last_use_ns + 1, last + 1)
        # Only the owner may set a time. A file that another user has fetched keeps the time of its last use
        # by its owner.
        for used in (file.fileno(), lock):
            with suppress(PermissionError, FileNotFoundError):
                os.utime(used, ns=(self._last_use_ns, self._last_use_ns))

    def _open_cached(self, path: Path, size: int | None) -> BinaryIO | None:
        try:
            file = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if size is not None and os.fstat(file.fileno()).st_size != size:  # damaged from outside
            path.unlink(missing_ok=True)
            _release(file)
            return None
        self._mark_used(file)
        return file

    def _fetch(self, url: str, path: Path, sha256: str, size: int | None) -> BinaryIO:
        part = self.folder / f"{sha256}.{size or 0}.part"
        wait = 0.01  # seconds
        while True:  # while another process fetches this file, or other files take up the room
            with self._lock():
                if file := self._open_cached(path, size):
                    return file
                file = self._open_part(part, size or 0)
            if file:
                break
            time.sleep(wait)
            wait = min(2 * wait, 0.5)
        with ExitStack() as failed:
            failed.callback(_release, file)
            _fetch_checked(url, file, sha256, size, self.limit)
            with self._lock():
                self._mark_used(file)
                os.replace(part, path)
                fcntl.flock(file, fcntl.LOCK_SH)
                self._make_room(0)
            failed.pop_all()
        return file

    def _open_part(self, part: Path, size: int) -> BinaryIO | None:
        """Returns the file to fetch into, or None if another process fetches it or there is no room."""
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # of another user, whose umask forbids to continue it
            with open(part, "rb") as other:
                if not _lock_exclusively(other):
                    return None
            os.unlink(part)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        if _lock_exclusively(file) and self._make_room(size, part.name):
            return file
        _release(file)
        return None

    def _make_room(self, size: int, excluded: str = "") -> bool:
        """Removes least recently used files until `size` more bytes fit; `excluded` names a file not to
        count.
        """
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".tar", ".jsonl", ".part")) and entry.name != excluded:
                stat = entry.stat()
                reserved = int(entry.name.split(".")[1]) if entry.name.endswith(".part") else 0
                found.append((stat.st_mtime_ns, max(stat.st_size, reserved), entry.path))
        free = self.limit - sum(n for _, n, _ in found)
        for _, n, path in sorted(found):
            if free >= size:
                break
            with open(path, "rb") as file:
                if _lock_exclusively(file):
                    os.unlink(path)
                    free += n
        return free >= size


def _lock_exclusively(file: BinaryIO) -> bool:
    """Returns False if another process holds a lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _release(file: BinaryIO) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile has the file open, too
    file.close()


def _fetch_checked(url: str, file: BinaryIO, sha256: str, size: int | None, limit: int) -> None:
    """Fetches `url` into `file`; once more from the beginning if its bytes are not those that the index
    lists. limit: bytes of a file of unknown size.
    """
    problem = ""
    for _ in range(2):
        try:
            fetch(url, file, size, limit)
            if (found := stream_sha256(file)) == sha256:
                os.fsync(file.fileno())
                return
            problem = f"{without_query(url)}: its sha256 is {found}, the index says {sha256}"
        except ShardError as e:
            if e.reason != "shard_changed":
                raise
            problem = str(e)
        file.truncate(0)
    raise ShardError(f"{problem}; fetched twice", "shard_changed")

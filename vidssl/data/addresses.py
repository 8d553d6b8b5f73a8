"""Where data sets lie: paths and URLs as text, without the packages that fetch them."""

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit


class ShardError(Exception):
    """A file of a data set cannot be read, or its bytes are not those that the index lists.

    reason: "shard_missing" (not there, or the server cannot be reached) or "shard_changed" (other bytes than
    indexed).
    """

    def __init__(self, message: str, reason: str = "shard_missing"):
        super().__init__(message)
        self.reason = reason


def is_url(folder: str) -> bool:
    return "://" in folder


def canonical_address(folder: str) -> str:
    """Returns the path of a file:// address, the shortest form of a path, and other addresses as they are."""
    if folder.startswith("file://"):
        return unquote(urlsplit(folder).path)
    return folder if is_url(folder) else str(Path(folder))


def join(folder: str, name: str) -> str:
    """Returns the address of a file in a folder; the query of a signed address stays at the end."""
    if not is_url(folder):
        return os.path.join(folder, name)
    if folder.startswith("http"):
        parts = urlsplit(folder)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{folder.rstrip('/')}/{name}"


def without_query(url: str) -> str:
    """Returns an address without its signature, for messages."""
    return url.split("?")[0] if is_url(url) else url


def read_bounded(path: str, limit: int) -> bytes:
    """Returns the contents of a local file; raises ShardError if it has more than `limit` bytes."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise too_large(path, limit)
        return file.read()


def too_large(where: str, limit: int) -> ShardError:
    """Returns the error of a file beyond `limit` bytes."""
    return ShardError(f"{without_query(where)}: has more than {limit} bytes, the limit", "shard_changed")

"""Videos and images on the disk as samples, without shards."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vidssl.core.errors import DecodeError
from vidssl.data.shards import Sample


def media_extension(path: str) -> str:
    return Path(path).suffix.lower().lstrip(".")


class MediaFiles:
    """Files as a MediaSource; the key of a sample is its path, relative to `root`."""

    def __init__(self, paths: Sequence[str], root: str = ""):
        self.root = Path(root)
        self.paths = paths
        self.samples = [Sample(path, media_extension(path), 0, 0, 0, {}) for path in paths]

    @property
    def hash(self) -> str:
        """SHA-256 of paths, sizes and times of change."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                facts = (self.root / path).stat()
                digest.update(
                    f"{path} {facts.st_size} {facts.st_mtime_ns}\n".encode(errors="surrogateescape")
                )
            except OSError:
                digest.update(f"{path}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def read(self, sample: Sample) -> bytes:
        try:
            return (self.root / sample.key).read_bytes()
        except OSError as e:
            raise DecodeError("unreadable", e.strerror or str(e)) from e

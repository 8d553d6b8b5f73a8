"""Where the bytes are: WebDataset tar shards and their index.

A data set is a folder, or a URL of one, with `index.json` (classes, and a line for each shard), `shard-*.tar` and,
beside each tar, a `.jsonl` that tells where each sample's bytes are; `data_prep.pack` writes all three,
`data_prep.scan` makes the index of shards written by others. Only `index.json` is read to open a data set; a shard's
`.jsonl` when it is first needed. Local shards are read where they are, others from the node's cache.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, BinaryIO, Literal

import numpy as np

from vidssl.core.errors import DecodeError, UserError
from vidssl.data.format import Sample, ShardTable, parse_index, parse_sample, read_index_bytes, shard_table
from vidssl.data.remote import Cache, ShardError, canonical_address, is_url, join, without_query

LINES_BYTES = 64 << 20  # of .jsonl files kept in a process


class IndexLines(Sequence[Sample]):
    """The samples of a shard: the bytes of its .jsonl, of which a line is parsed when it is asked for."""

    def __init__(self, data: bytes, shard: int, where: str):
        self.data, self.shard, self.where = data, shard, where
        self.ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        self.nbytes = len(data) + self.ends.nbytes + 500  # the objects themselves

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        try:
            start = self.ends[number - 1] + 1 if number else 0
            return parse_sample(self.data[start : self.ends[number]], self.shard)
        except (ValueError, KeyError, TypeError) as e:
            raise ShardError(
                f"{self.where}: line {number + 1} is not of a sample ({e})", "shard_changed"
            ) from e


class Shards:
    """One or several data sets, end to end; `counts` and `sizes` (i64 [S]) are of their S shards.

    on_missing: what a shard is that is missing, cannot be fetched or is not the one indexed: an error, or ("skip")
    samples that cannot be decoded, for as long as the process lives.
    """

    def __init__(
        self,
        folders: list[str],
        cache_dir: str | None = None,
        cache_gb: float = 100,
        on_missing: Literal["error", "skip"] = "error",
    ):
        if not folders:
            raise UserError("no shards given: name at least one packed folder")
        self.folders: list[str] = []
        self.classes: dict[str, list[str]] = {}
        digest, parts = hashlib.sha256(), []
        for folder in map(canonical_address, folders):
            if folder in self.folders:
                raise UserError(f"{folder}: named twice")
            self.folders.append(folder)
            text = read_index_bytes(folder)
            digest.update(text)
            index = parse_index(text, folder)
            for name, names in index["classes"].items():
                if self.classes.setdefault(name, names) != names:
                    raise UserError(
                        f"{folder}: the classes of label '{name}' differ from those of {folders[0]}"
                    )
            parts.append(shard_table(index, folder))
        self.table = ShardTable(*map(np.concatenate, zip(*parts, strict=True)))
        self.folder_of = np.repeat(np.arange(len(parts)), [len(p.names) for p in parts])
        self.counts, self.sizes = self.table.samples, self.table.sizes
        self.n = int(self.counts.sum())
        self.hash = digest.hexdigest()  # the index holds each shard's checksum, so this names the data
        if not self.n:
            raise UserError(f"{', '.join(folders)}: the index lists no samples")
        self.on_missing = on_missing
        self.cache = self._make_cache(cache_dir, cache_gb)
        self._forget()

    def _make_cache(self, folder: str | None, gb: float) -> Cache | None:
        remote = np.array([is_url(f) for f in self.folders])[self.folder_of]
        if not remote.any():
            return None
        largest = self.sizes[remote].max() / 1e9
        if largest > gb:
            raise UserError(f"data.cache_gb is {gb}, but a shard has {largest:.6g} GB and must fit")
        return Cache(folder, int(gb * 1e9))

    def _forget(self) -> None:
        """What a process has of its own."""
        self._kept: OrderedDict[int, IndexLines] = OrderedDict()  # the last asked for at the end
        self._kept_bytes = 0
        self._lost: dict[int, tuple[str, str]] = {}  # reason and detail
        self._open = lru_cache(maxsize=64)(lambda path: open(path, "rb"))  # noqa: SIM115

    def __getstate__(self) -> dict[str, Any]:  # workers open files of their own
        own = ("_kept", "_kept_bytes", "_lost", "_open")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def path(self, shard: int, ext: str = ".tar") -> str:
        """Path or address of its tar or .jsonl."""
        name = self.table.names[shard].decode().removesuffix(".tar")
        return join(self.folders[self.folder_of[shard]], name + ext)

    def sample(self, shard: int, number: int) -> Sample:
        """Of a shard that is skipped: a sample that `read` says is bad."""
        if shard in self._kept or shard not in self._lost:
            try:
                return self._lines(shard)[number]
            except ShardError as e:
                self._lose(shard, e)
        return Sample(f"{without_query(self.path(shard))}:{number}", "", shard, 0, 0, {})

    def all(self) -> list[Sample]:
        """Every sample in stored order (for evaluation and health; training asks by number)."""
        return [self.sample(shard, i) for shard, n in enumerate(self.counts.tolist()) for i in range(n)]

    def read(self, sample: Sample) -> bytes:
        """The media bytes, as they were packed. DecodeError: its shard is one that is skipped."""
        if sample.shard not in self._lost:
            try:
                with self._tar(sample.shard) as file:
                    return self._part(sample, file)
            except ShardError as e:
                self._lose(sample.shard, e)
        raise DecodeError(*self._lost[sample.shard])

    def _lose(self, shard: int, e: ShardError) -> None:
        if self.on_missing == "error":
            raise UserError(f"{e}; the index lists this shard: run data_prep.verify") from e
        self._lost[shard] = e.reason, str(e)

    def _tar(self, shard: int) -> AbstractContextManager[BinaryIO]:
        path = self.path(shard)
        if self.cache and is_url(path):
            return self.cache.open(path, self.table.sha256[shard].decode(), int(self.sizes[shard]))
        try:
            return nullcontext(self._open(path))
        except OSError as e:
            raise ShardError(f"{path}: {e.strerror}") from e

    def _part(self, sample: Sample, file: BinaryIO) -> bytes:
        path, want = without_query(self.path(sample.shard)), self.sizes[sample.shard]
        try:
            there = os.fstat(file.fileno()).st_size
            data = os.pread(file.fileno(), sample.size, sample.offset)
        except OSError as e:
            raise ShardError(f"{path}: {e.strerror}") from e
        if there != want:
            raise ShardError(f"{path}: has {there} bytes, index.json says {want}", "shard_changed")
        if len(data) < sample.size:
            raise ShardError(f"{path}: ends before the sample {sample.key}", "shard_changed")
        return data

    def _lines(self, shard: int) -> IndexLines:
        if shard in self._kept:
            self._kept.move_to_end(shard)
            return self._kept[shard]
        lines = self._kept[shard] = self._read_lines(shard)
        self._kept_bytes += lines.nbytes
        while self._kept_bytes > LINES_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return lines

    def _read_lines(self, shard: int) -> IndexLines:
        path, sha256 = self.path(shard, ".jsonl"), self.table.index_sha256[shard].decode()
        if self.cache and is_url(path):
            with self.cache.open(path, sha256, None) as file:
                data = file.read()
        else:
            try:
                with open(path, "rb") as file:
                    data = file.read()
            except OSError as e:
                raise ShardError(f"{path}: {e.strerror}") from e
        lines, want = IndexLines(data, shard, without_query(path)), self.counts[shard]
        if len(lines) != want:
            raise ShardError(
                f"{lines.where}: {len(lines)} samples, but index.json says {want}", "shard_changed"
            )
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ShardError(f"{lines.where}: its sha256 differs from index.json's", "shard_changed")
        return lines

"""Reads samples from WebDataset tar shards by their index.

A data set is a folder or its URL (see `vidssl.data.format`). Opening it reads index.json only; the .jsonl of
a shard is read at its first use. Local shards are read in place, remote ones from the node's cache.
"""

import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, BinaryIO, Literal

import numpy as np

from vidssl.core.errors import DecodeError, UserError
from vidssl.data.addresses import (
    ShardError,
    canonical_address,
    is_url,
    join,
    read_bounded,
    without_query,
)
from vidssl.data.format import (
    MAX_RECORDS_BYTES,
    Sample,
    ShardTable,
    parse_index,
    parse_sample,
    read_index_bytes,
    shard_table,
)
from vidssl.data.remote import Cache

MAX_KEPT_BYTES = 64 << 20  # of .jsonl files kept in a process


class ShardRecords(Sequence[Sample]):
    """The samples of a shard: the bytes of its .jsonl, each line parsed on access."""

    def __init__(self, data: bytes, shard: int, path: str, packed: bool = True):
        """packed: see `parse_sample`."""
        self.data = data
        self.packed = packed
        self.shard = shard
        self.path = path
        self.line_ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        self.nbytes = len(data) + self.line_ends.nbytes + 500  # 500: the Python objects themselves

    def __len__(self) -> int:
        return len(self.line_ends)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        start = self.line_ends[number - 1] + 1 if number else 0
        try:
            return parse_sample(self.data[start : self.line_ends[number]], self.shard, self.packed)
        except (ValueError, KeyError, TypeError) as e:
            raise ShardError(f"{self.path}: line {number + 1} is not a sample ({e})", "shard_changed") from e


Renumbered = dict[str, list[int]]  # label set -> number of each of its classes among those of all data sets


def merge_names(lists: list[list[str]]) -> list[str]:
    names = list(dict.fromkeys(name for names in lists for name in names))
    if all(name.isdecimal() for name in names):
        names.sort(key=lambda name: (int(name), name))
    return names


def align_classes(folders: list[dict[str, list[str]]]) -> tuple[dict[str, list[str]], list[Renumbered]]:
    """Returns the classes of all data sets by label set, and for each data set the label sets whose numbers
    change.

    Classes are the same if their names are. Those of the first data set keep their numbers, unless all names
    are numbers: then they are in the order of these.
    """
    classes: dict[str, list[str]] = {}
    for label_set in dict.fromkeys(label_set for sets in folders for label_set in sets):
        lists = [sets[label_set] for sets in folders if label_set in sets]
        classes[label_set] = lists[0] if all(names == lists[0] for names in lists) else merge_names(lists)
    renumbered = []
    for sets in folders:
        changed: Renumbered = {}
        for label_set, names in sets.items():
            number_of = {name: i for i, name in enumerate(classes[label_set])}
            numbers = [number_of[name] for name in names]
            if numbers != list(range(len(numbers))):
                changed[label_set] = numbers
        renumbered.append(changed)
    return classes, renumbered


def renumber(label: int | list[int], numbers: list[int]) -> int | list[int]:
    """Returns the new number of a class, or of each of several; -1 (none) stays."""
    if isinstance(label, list):
        return [numbers[i] if i >= 0 else i for i in label]
    return numbers[label] if label >= 0 else label


class Shards:
    """One or several data sets, concatenated; `counts` and `sizes` (i64 [S]) are the samples and bytes of
    each shard. `classes` (label set -> names) are those of all of them, and labels are numbers of these.

    on_missing: a shard that is missing, cannot be fetched or differs from its index entry is an error, or
    ("skip") its samples fail to decode for the lifetime of the process.
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
        self.packed: list[bool] = []  # by folder: whether pack measured its samples
        folder_classes: list[dict[str, list[str]]] = []
        digest = hashlib.sha256()
        tables = []
        for folder in map(canonical_address, folders):
            if folder in self.folders:
                raise UserError(f"{folder}: is listed twice in data.train")
            self.folders.append(folder)
            text = read_index_bytes(folder)
            digest.update(text)
            index = parse_index(text, folder)
            folder_classes.append(index["classes"])
            self.packed.append("plan" in index.get("pack", {}))
            tables.append(shard_table(index, folder))
        self.classes, self._renumbered = align_classes(folder_classes)
        self.table = ShardTable(*map(np.concatenate, zip(*tables, strict=True)))
        self.folder_of = np.repeat(np.arange(len(tables)), [len(t.names) for t in tables])
        self.counts = self.table.samples
        self.sizes = self.table.sizes
        self.n = int(self.counts.sum())
        self.hash = digest.hexdigest()  # index.json holds each shard's checksum, so this identifies the data
        if not self.n:
            raise UserError(f"{', '.join(folders)}: the index lists no samples")
        self.on_missing = on_missing
        self.cache = self._make_cache(cache_dir, cache_gb)
        self._reset_process_state()

    def _make_cache(self, folder: str | None, gb: float) -> Cache | None:
        remote = np.array([is_url(f) for f in self.folders])[self.folder_of]
        if not remote.any():
            return None
        largest = max(self.sizes[remote].max(), self.table.index_sizes[remote].max()) / 1e9
        if largest > gb:
            raise UserError(f"data.cache_gb is {gb}, but a shard has {largest:.6g} GB and must fit")
        return Cache(folder, int(gb * 1e9))

    def _reset_process_state(self) -> None:
        self._records: OrderedDict[int, ShardRecords] = OrderedDict()  # least recently used first
        self._records_bytes = 0
        self._skipped: dict[int, tuple[str, str]] = {}  # shard -> reason and detail
        self._open = lru_cache(maxsize=64)(lambda path: open(path, "rb"))  # noqa: SIM115

    def __getstate__(self) -> dict[str, Any]:  # each worker opens its own files
        process_state = ("_records", "_records_bytes", "_skipped", "_open")
        return {k: v for k, v in self.__dict__.items() if k not in process_state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_process_state()

    def path(self, shard: int, ext: str = ".tar") -> str:
        """Returns the path or address of the tar, or with ext ".jsonl" of its records."""
        name = self.table.names[shard].decode().removesuffix(".tar")
        return join(self.folders[self.folder_of[shard]], name + ext)

    def sample(self, shard: int, number: int) -> Sample:
        """Returns sample `number` of a shard; if the shard is skipped, a placeholder that `read` refuses."""
        if shard in self._records or shard not in self._skipped:
            try:
                return self._with_aligned_labels(self._shard_records(shard)[number])
            except ShardError as e:
                self._skip_or_raise(shard, e)
        return Sample(f"{without_query(self.path(shard))}:{number}", "", shard, 0, 0, {})

    def _with_aligned_labels(self, sample: Sample) -> Sample:
        """Returns a sample with the numbers that `classes` gives to its classes."""
        renumbered = self._renumbered[self.folder_of[sample.shard]]
        if not renumbered:
            return sample
        stored = sample.meta.get("labels")
        stored = stored if isinstance(stored, dict) else {}
        labels: dict[str, Any] = {
            label_set: renumber(value, renumbered[label_set]) if label_set in renumbered else value
            for label_set, value in stored.items()
        }
        label = sample.meta.get("label", -1)
        name = sample.meta.get("class")
        # "label" and "class" are those of one of the label sets.
        for label_set, value in labels.items():
            names = self.classes.get(label_set, [])
            if stored[label_set] == label and (name is None or (label >= 0 and names[value] == name)):
                label = value
                break
        return sample._replace(meta={**sample.meta, "labels": labels, "label": label})

    def list_samples(self) -> list[Sample]:
        """Returns every sample in stored order (for evaluation; training accesses samples by number)."""
        return [self.sample(shard, i) for shard, n in enumerate(self.counts.tolist()) for i in range(n)]

    def list_named_samples(self) -> list[Sample]:
        """Returns what list_samples does, with keys that tell samples apart where shards of other tools
        repeat them: SHARD/KEY, or N/SHARD/KEY in the Nth folder where folders repeat the names of shards."""
        samples = self.list_samples()
        keys = [s.key for s in samples]
        for with_folder in (False, True):
            counts = Counter(keys)
            keys = [
                self._long_key(s, with_folder) if counts[key] > 1 else key
                for s, key in zip(samples, keys, strict=True)
            ]
        return [s if s.key == key else s._replace(key=key) for s, key in zip(samples, keys, strict=True)]

    def _long_key(self, sample: Sample, with_folder: bool) -> str:
        key = f"{self.table.names[sample.shard].decode().removesuffix('.tar')}/{sample.key}"
        return f"{self.folder_of[sample.shard] + 1}/{key}" if with_folder else key

    def read(self, sample: Sample) -> bytes:
        """Returns the media bytes as they were packed. Raises DecodeError if the shard is skipped."""
        if sample.shard not in self._skipped:
            try:
                with self._open_tar(sample.shard) as file:
                    return self._read_range(sample, file)
            except ShardError as e:
                self._skip_or_raise(sample.shard, e)
        raise DecodeError(*self._skipped[sample.shard])

    def _skip_or_raise(self, shard: int, e: ShardError) -> None:
        if self.on_missing == "error":
            raise UserError(f"{e}; the index lists this shard: run vidssl verify") from e
        self._skipped[shard] = e.reason, str(e)

    def _open_tar(self, shard: int) -> AbstractContextManager[BinaryIO]:
        path = self.path(shard)
        if self.cache and is_url(path):
            return self.cache.open(path, self.table.sha256[shard].decode(), int(self.sizes[shard]))
        try:
            return nullcontext(self._open(path))
        except OSError as e:
            raise ShardError(f"{path}: {e.strerror}") from e

    def _read_range(self, sample: Sample, file: BinaryIO) -> bytes:
        path = without_query(self.path(sample.shard))
        expected = self.sizes[sample.shard]
        try:
            found = os.fstat(file.fileno()).st_size
            if found != expected:
                raise ShardError(f"{path}: has {found} bytes, index.json says {expected}", "shard_changed")
            # Checked before: a size that is not true would be allocated.
            if sample.offset + sample.size > found:
                raise ShardError(f"{path}: ends before the sample {sample.key}", "shard_changed")
            data = os.pread(file.fileno(), sample.size, sample.offset)
        except OSError as e:
            raise ShardError(f"{path}: {e.strerror}") from e
        return data

    def _shard_records(self, shard: int) -> ShardRecords:
        if shard in self._records:
            self._records.move_to_end(shard)
            return self._records[shard]
        records = self._records[shard] = self._read_records(shard)
        self._records_bytes += records.nbytes
        while self._records_bytes > MAX_KEPT_BYTES and len(self._records) > 1:
            self._records_bytes -= self._records.popitem(last=False)[1].nbytes
        return records

    def _read_records(self, shard: int) -> ShardRecords:
        path = self.path(shard, ".jsonl")
        sha256 = self.table.index_sha256[shard].decode()
        if self.cache and is_url(path):
            size = int(self.table.index_sizes[shard])
            with self.cache.open(path, sha256, None if size < 0 else size, ".jsonl") as file:
                data = file.read()
        else:
            try:
                data = read_bounded(path, MAX_RECORDS_BYTES)
            except OSError as e:
                raise ShardError(f"{path}: {e.strerror}") from e
        records = ShardRecords(data, shard, without_query(path), self.packed[self.folder_of[shard]])
        expected = self.counts[shard]
        if len(records) != expected:
            raise ShardError(
                f"{records.path}: {len(records)} samples, but index.json says {expected}", "shard_changed"
            )
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ShardError(f"{records.path}: its sha256 differs from index.json's", "shard_changed")
        return records

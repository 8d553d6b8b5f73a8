"""Frozen features on disk: a flat file of rows, and a checksum record for each written block of rows.

FOLDER/KEY/provenance.json lists everything that decides the bytes (KEY is its hash), features.bin holds [n,
C, N, D], and blocks/000003.json the checksum of rows 192 to 255 and which of them cannot be decoded. A block
without a record, or whose bytes do not match its record, is written again: a kill costs one block, and each
process writes its own blocks.

Several users may share a folder. Features that this user may not write are read if they are complete; else
this user's own are written beside them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, check_writable, exclusive_lock, make_folder
from vidssl.evaluation.isolated_clips import FAILURES_OF_A_PROCESS

ROWS_PER_BLOCK = 64  # samples
NOT_FINITE = "not_finite"  # reason why a sample has no features: they are not finite


class FeatureShape(NamedTuple):
    """Shape of the features of a data set."""

    samples: int
    clips: int  # per sample
    tokens: int  # per clip
    width: int

    def gigabytes(self, dtype: torch.dtype) -> float:
        return self.samples * self.clips * self.tokens * self.width * dtype.itemsize / 1e9


class FeatureStore:
    """The features of one data set under one view, encoder and storage type."""

    def __init__(self, folder: Path, provenance: dict[str, Any], shape: FeatureShape, dtype: torch.dtype):
        """provenance: everything that decides the features. The storage type and the shape are a part of the
        key, so that stores of other types never share a file."""
        self.shape = shape
        self.dtype = dtype
        self.provenance = {**provenance, "shape": list(shape), "dtype": str(dtype)}
        text = json.dumps(self.provenance, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.row_bytes = shape.clips * shape.tokens * shape.width * dtype.itemsize
        self.num_blocks = -(-shape.samples // ROWS_PER_BLOCK)
        self.folder = folder / key
        if not self.is_writable and not all(map(self.is_valid, range(self.num_blocks))):
            self.folder = folder / f"{key}-user{os.getuid()}"

    @property
    def file(self) -> Path:
        return self.folder / "features.bin"

    @property
    def is_writable(self) -> bool:
        """Whether the features do not exist yet, or this user may write all their files."""
        paths = (self.folder, self.folder / "blocks", self.file)
        return all(os.access(path, os.W_OK) for path in paths if path.exists())

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are recorded."""
        return all(self.record_path(block).exists() for block in range(self.num_blocks))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the files and holds the lock of this store: a second job waits, and then finds the
        features."""
        make_folder(self.folder / "blocks")
        with exclusive_lock(self.folder / "lock"):
            if not self.is_writable:  # of another user, and complete
                yield
                return
            if not (self.folder / "provenance.json").exists():
                text = json.dumps(self.provenance, indent=1, sort_keys=True)
                atomic_write_text(self.folder / "provenance.json", text)
            with open(self.file, "ab") as rows:
                size = self.shape.samples * self.row_bytes
                if rows.tell() < size:  # only grows: another process may have the file mapped
                    rows.truncate(size)
            yield

    def block_rows(self, block: int) -> range:
        return range(block * ROWS_PER_BLOCK, min((block + 1) * ROWS_PER_BLOCK, self.shape.samples))

    def record_path(self, block: int) -> Path:
        return self.folder / "blocks" / f"{block:06d}.json"

    def is_valid(self, block: int) -> bool:
        """Whether the block is written and its bytes match the checksum of its record. A sample that hung or
        crashed its decoder is tried again: that may have been the machine's fault."""
        try:
            record = json.loads(self.record_path(block).read_text())
            expected = record["sha256"]
            reasons = set(record["unreadable"].values())
        except (OSError, ValueError, KeyError):
            return False
        if reasons & set(FAILURES_OF_A_PROCESS):
            return False
        digest = hashlib.sha256()
        with open(self.file, "rb") as f:
            f.seek(block * ROWS_PER_BLOCK * self.row_bytes)
            for _ in self.block_rows(block):
                digest.update(f.read(self.row_bytes))
        return digest.hexdigest() == expected

    def write(self, rows: Iterator[tuple[int, Tensor | str]]) -> None:
        """Writes (number of a sample, features [C, N, D] or reason why it has none) of whole blocks, in
        order. The row of a sample without features, or whose features the storage type cannot hold, is
        zeros."""
        digest = hashlib.sha256()
        unreadable: dict[int, str] = {}
        with open(self.file, "rb+") as f:
            for number, value in rows:
                if isinstance(value, Tensor):
                    stored = value.to(self.dtype).contiguous()
                    data = stored.view(torch.uint8).numpy().tobytes()
                    value = "" if stored.isfinite().all() else NOT_FINITE
                if value:
                    unreadable[number] = value
                    data = bytes(self.row_bytes)
                f.seek(number * self.row_bytes)
                f.write(data)
                digest.update(data)
                block = number // ROWS_PER_BLOCK
                if number == self.block_rows(block)[-1]:
                    f.flush()
                    os.fsync(f.fileno())
                    text = json.dumps({"sha256": digest.hexdigest(), "unreadable": unreadable})
                    atomic_write_text(self.record_path(block), text)
                    digest = hashlib.sha256()
                    unreadable = {}

    def read(self) -> tuple[Tensor, dict[int, str]]:
        """Returns all rows [n, C, N, D], mapped from the disk, and the samples that cannot be decoded: number
        -> reason."""
        unreadable: dict[int, str] = {}
        for block in range(self.num_blocks):
            if not self.record_path(block).exists():
                raise UserError(f"{self.folder}: block {block} is missing; do all nodes share this disk?")
            record = json.loads(self.record_path(block).read_text())
            unreadable |= {int(number): reason for number, reason in record["unreadable"].items()}
        size = self.shape.samples * self.row_bytes // self.dtype.itemsize
        rows = torch.from_file(str(self.file), shared=False, size=size, dtype=self.dtype)
        return rows.view(self.shape), unreadable


def check_disk(folder: Path, stores: Sequence[FeatureStore]) -> None:
    """Raises UserError if the rows of these stores that are not written yet do not fit on the disk of the
    cache folder, or cannot be written there."""
    missing = [store for store in stores if not store.is_complete]
    if not missing:
        return
    check_writable(folder)
    free = free_gb(folder)
    needed = missing_gb(missing)
    if needed > free:
        raise UserError(
            f"probe.cache: {needed:.3g} GB of features are to be written to {folder}, whose disk has "
            f"{free:.3g} GB left; free some, choose another folder, or set probe.cache_dtype=bf16"
        )


def free_gb(folder: Path) -> float:
    """Free space of the disk that holds the folder, or will hold it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free / 1e9


def missing_gb(stores: Sequence[FeatureStore]) -> float:
    """Size of the rows of these stores, none of them complete, that are not written yet."""
    written = sum(store.file.stat().st_blocks * 512 for store in stores if store.file.exists()) / 1e9
    return sum(store.shape.gigabytes(store.dtype) for store in stores) - written


def used_gb(folder: Path, excluded: Sequence[FeatureStore], planned: Sequence[FeatureStore] = ()) -> float:
    """Disk space of a cache folder without the `excluded` stores, when the `planned` ones are written; files
    are sparse until they are."""
    own = {store.folder for store in excluded}
    files = [path for path in folder.glob("*/features.bin") if path.parent not in own]
    to_write = [store for store in planned if store.folder not in own and not store.is_complete]
    return sum(path.stat().st_blocks * 512 for path in files) / 1e9 + missing_gb(to_write)

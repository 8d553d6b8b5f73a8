"""Frozen features on disk: a flat file of rows, and a record with a checksum for each block of them that is written.

FOLDER/KEY/about.json says what they are of, features.bin holds [n, C, N, D], blocks/000003.json the checksum of rows
192 to 255 and which of them could not be read. A block without a record, or whose bytes are not those of its record, is
written (again); so a kill costs a block, and processes write blocks of their own.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write, make_folder

ROWS_PER_BLOCK = 64  # samples


class FeatureShape(NamedTuple):
    """Of the features of a data set: samples, clips of each, tokens of a clip, width."""

    samples: int
    clips: int
    tokens: int
    width: int

    def gb(self, dtype: torch.dtype) -> float:
        return self.samples * self.clips * self.tokens * self.width * dtype.itemsize / 1e9


def key_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def used_gb(folder: Path, but: list[dict[str, Any]]) -> float:
    """What lies in a cache folder, without the features of `but` (abouts); files are sparse until they are written."""
    mine = {key_of(about) for about in but}
    files = [p for p in folder.glob("*/features.bin") if p.parent.name not in mine]
    return sum(p.stat().st_blocks * 512 for p in files) / 1e9


class FeatureStore:
    """The file of one data set under one view and encoder; about: all that decides its content."""

    def __init__(self, folder: Path, about: dict[str, Any], shape: FeatureShape, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        self.folder = folder / key_of(about)
        make_folder(self.folder / "blocks")
        self.file = self.folder / "features.bin"
        self.bytes = shape.clips * shape.tokens * shape.width * dtype.itemsize  # of a row
        self.blocks = -(-shape.samples // ROWS_PER_BLOCK)
        self.about = {**about, "shape": list(shape), "dtype": str(dtype)}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One job at a time; a second one waits, and finds the features there."""
        with open(self.folder / "lock", "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if not (self.folder / "about.json").exists():
                text = json.dumps(self.about, indent=1, sort_keys=True)
                atomic_write(self.folder / "about.json", lambda beside: beside.write_text(text))
            with open(self.file, "ab") as rows:
                rows.truncate(self.shape.samples * self.bytes)
            yield

    def range(self, block: int) -> range:
        return range(block * ROWS_PER_BLOCK, min((block + 1) * ROWS_PER_BLOCK, self.shape.samples))

    def record(self, block: int) -> Path:
        return self.folder / "blocks" / f"{block:06d}.json"

    def whole(self, block: int) -> bool:
        """Whether the block is written and its bytes are those of its record."""
        try:
            want = json.loads(self.record(block).read_text())["sha256"]
        except (OSError, ValueError, KeyError):
            return False
        digest = hashlib.sha256()
        with open(self.file, "rb") as f:
            f.seek(block * ROWS_PER_BLOCK * self.bytes)
            for _ in self.range(block):
                digest.update(f.read(self.bytes))
        return digest.hexdigest() == want

    def write(self, rows: Iterator[tuple[int, Tensor | str]]) -> None:
        """rows: the number of a sample, and its features [C, N, D] or why it cannot be read; of whole blocks, in order.
        A sample that cannot be read has zeros."""
        digest, bad = hashlib.sha256(), {}
        with open(self.file, "rb+") as f:
            for number, value in rows:
                if isinstance(value, str):
                    bad[number], data = value, bytes(self.bytes)
                else:
                    data = value.to(self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
                f.seek(number * self.bytes)
                f.write(data)
                digest.update(data)
                if number == self.range(number // ROWS_PER_BLOCK)[-1]:
                    f.flush()
                    os.fsync(f.fileno())
                    text = json.dumps({"sha256": digest.hexdigest(), "unreadable": bad})
                    atomic_write(self.record(number // ROWS_PER_BLOCK), partial(Path.write_text, data=text))
                    digest, bad = hashlib.sha256(), {}

    def read(self) -> tuple[Tensor, dict[int, str]]:
        """-> (all rows [n, C, N, D], mapped from the disk; number of a sample -> why it cannot be read)."""
        missing = [b for b in range(self.blocks) if not self.record(b).exists()]
        if missing:
            raise UserError(
                f"{self.folder}: block {missing[0]} is missing; is it on a disk that all nodes share?"
            )
        bad: dict[int, str] = {}
        for block in range(self.blocks):
            told = json.loads(self.record(block).read_text())["unreadable"]
            bad |= {int(number): why for number, why in told.items()}
        size = self.shape.samples * self.bytes // self.dtype.itemsize
        return torch.from_file(str(self.file), shared=False, size=size, dtype=self.dtype).view(
            self.shape
        ), bad

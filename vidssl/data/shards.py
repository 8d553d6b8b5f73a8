"""Where the bytes are: WebDataset tar shards and their index.

A data set is a folder with `index.json` (classes, and a line for each shard), `shard-*.tar` and, beside each tar, a
`.jsonl` that tells where each sample's bytes are; `data_prep.pack` writes all three, `data_prep.scan` makes the index
of shards written by others. Only `index.json` is read to open a data set; a shard's `.jsonl` when it is first needed.
"""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vidssl.errors import UserError


class Sample(NamedTuple):
    key: str
    ext: str  # of the media file, lower case
    shard: int
    offset: int  # of the media bytes in the tar
    size: int  # bytes
    meta: dict[str, Any]  # label, labels, fps, frames, ...: see data_prep.pack


class Shards:
    """One or several data sets, end to end."""

    def __init__(self, folders: list[str]):
        if not folders:
            raise UserError("no shards given: name at least one packed folder")
        self.paths: list[Path] = []
        self.counts: list[int] = []
        self.classes: dict[str, list[str]] = {}
        digest = hashlib.sha256()
        for folder in map(Path, folders):
            text, index = self._read_index(folder)
            digest.update(text)
            for name, names in index["classes"].items():
                if self.classes.setdefault(name, names) != names:
                    raise UserError(f"{folder}: the classes of label '{name}' differ from those of {folders[0]}")
            paths = [folder / shard["name"] for shard in index["shards"]]
            if set(paths) & set(self.paths):
                raise UserError(f"{folder}: named twice")
            self.paths += paths
            self.counts += [shard["samples"] for shard in index["shards"]]
        self.n = sum(self.counts)
        self.hash = digest.hexdigest()  # the index holds each shard's checksum, so this names the data
        if not self.n:
            raise UserError(f"{', '.join(folders)}: the index lists no samples")
        self._make_caches()

    def _make_caches(self) -> None:
        self._lines = lru_cache(maxsize=256)(self._read_lines)
        self._open = lru_cache(maxsize=64)(lambda path: open(path, "rb"))  # noqa: SIM115

    @staticmethod
    def _read_index(folder: Path) -> tuple[bytes, dict[str, Any]]:
        """index.json as it is written, and what it says."""
        try:
            text = (folder / "index.json").read_bytes()
            index = json.loads(text)
            if not isinstance(index, dict) or not {"classes", "shards"} <= index.keys():
                raise UserError(f"{folder / 'index.json'}: not an index of shards")
            return text, index
        except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
            raise UserError(f"{folder / 'index.json'}: not an index of shards ({e})") from None
        except (FileNotFoundError, NotADirectoryError):
            inside = sorted(p.parent.name for p in folder.glob("*/index.json"))
            hint = f"; did you mean one of {inside} in it?" if inside else "; make one with python -m data_prep.pack"
            raise UserError(f"{folder}: no index.json, so this is not a packed data set{hint}") from None

    def _read_lines(self, shard: int) -> list[Sample]:
        path = self.paths[shard].with_suffix(".jsonl")
        try:
            with open(path, encoding="utf-8") as f:
                rows = [json.loads(line) for line in f]
            samples = [Sample(r["key"], r["ext"], shard, r["offset"], r["size"], r["meta"]) for r in rows]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path}: {e}: run data_prep.verify") from e
        if len(rows) != self.counts[shard]:
            raise UserError(
                f"{path}: {len(rows)} samples, but index.json says {self.counts[shard]}: run data_prep.verify"
            )
        return samples

    def sample(self, shard: int, number: int) -> Sample:
        return self._lines(shard)[number]

    def all(self) -> list[Sample]:
        """Every sample in stored order (for evaluation and health; training asks by number)."""
        return [s for shard in range(len(self.paths)) for s in self._lines(shard)]

    def read(self, sample: Sample) -> bytes:
        """The media bytes, as they were packed."""
        path = self.paths[sample.shard]
        try:
            return os.pread(self._open(path).fileno(), sample.size, sample.offset)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}; the index lists this shard: run data_prep.verify") from e

    def __getstate__(self) -> dict[str, Any]:  # workers open files of their own
        return {k: v for k, v in self.__dict__.items() if k not in ("_lines", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

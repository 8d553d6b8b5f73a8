"""What lies beside a shard: its jsonl, the data set's index.json; and where samples stand inside a tar.

Written by pack and by scan, read by verify (and by the loader).
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_prep.sources import EXTENSIONS
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write, file_sha256
from vidssl.data.index import VERSION


class Member(NamedTuple):
    """One file inside a tar: payload position and size in bytes."""

    ext: str
    offset: int
    size: int


def dumps(value: Any) -> str:
    """One line of JSON that is the same for the same value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(", ", ": "), allow_nan=False)


def key_of(path: str, start: float | None = None, end: float | None = None) -> str:
    """Sample key of a relative path, or of a piece of that file (start, end in seconds; None: of the file): readable,
    unique, without slash or dot (WebDataset cuts at the first dot)."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.splitext(path)[0]).strip("-")[-80:]
    if start is None and end is None:
        return f"{slug}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    times = "-".join(
        "end" if t is None else f"{round(1000 * t):08d}" for t in (start or 0.0, end)
    )  # milliseconds
    return f"{slug}-{times}-{hashlib.sha256(f'{path} {times}'.encode()).hexdigest()[:8]}"


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Whole or not at all."""
    text = "".join(line + "\n" for line in lines)
    atomic_write(path, lambda beside: beside.write_bytes(text.encode()))


def read_lines(path: Path) -> list[str]:
    """What write_text wrote. (str.splitlines would also cut at U+2028 and its like, which JSON leaves in names.)"""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def shard_entry(tar: Path, samples: int) -> dict:
    """A line of index.json's "shards"."""
    return {
        "name": tar.name,
        "samples": samples,
        "bytes": tar.stat().st_size,
        "sha256": file_sha256(tar),
        "index_sha256": file_sha256(tar.with_suffix(".jsonl")),
    }


def write_index(
    folder: Path, classes: dict[str, list[str]], shards: list[dict], rejected: int, made_by: dict
) -> None:
    """index.json, the last file of a data set: where it stands, the data set is complete."""
    index = {
        "version": VERSION,
        "samples": sum(s["samples"] for s in shards),
        "classes": classes,
        "shards": shards,
        "rejected": rejected,
        "pack": made_by,
    }
    write_text(folder / "index.json", [json.dumps(index, sort_keys=True, ensure_ascii=False, indent=1)])


def class_lists(names: dict[str, set[str]]) -> dict[str, list[str]]:
    """Label set -> class names, sorted; by value where all are whole numbers, so that class 10 follows class 9."""
    return {
        s: sorted(n, key=_value if all(x.isdecimal() for x in n) else None) for s, n in sorted(names.items())
    }


def _value(name: str) -> tuple[int, str]:
    return int(name), name  # 1 and 01 are two classes; a set's own order differs from run to run


def tar_samples(tar: Path, file: BinaryIO | None = None) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {ext: member}) in order, from the headers. WebDataset's rule: the key ends at the first dot of the name.

    file: the tar, open; None: it is opened. A name that is not UTF-8 makes a key that cannot be encoded.
    """
    key = ""
    members: dict[str, Member] = {}
    try:
        with tarfile.open(tar, "r:", fileobj=file) as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, ext = name.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if this != key and members:
                    yield key, members
                    members = {}
                key = this
                members[ext.lower()] = Member(ext, info.offset_data, info.size)
    except tarfile.TarError as e:
        raise UserError(f"{tar}: not a plain tar file: {e}") from e
    if members:
        yield key, members


def media_of(members: dict[str, Member]) -> Member | None:
    """The video or image of a sample; of several the first in the order of EXTENSIONS."""
    return next((members[ext]._replace(ext=ext) for ext in EXTENSIONS if ext in members), None)


def line_of(key: str, media: Member, meta: dict) -> dict:
    """A line of a shard's jsonl."""
    return {"key": key, "ext": media.ext, "offset": media.offset, "size": media.size, "meta": meta}

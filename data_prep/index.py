"""Helpers of every tool that reads or writes shards: sample keys, class lists, lines of text, members of a
tar.

The format itself is defined in vidssl/data/format.py.
"""

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, read_json_rows
from vidssl.data.format import read_index
from vidssl.data.tar_files import TarFiles, split_name


class Member(NamedTuple):
    """Position and size, in bytes, of a file's contents inside a tar."""

    offset: int
    size: int


def sample_key(path: str, start: float | None = None, end: float | None = None) -> str:
    """Returns the key of a relative path, or of the piece of that file from `start` to `end` seconds.

    A key is readable, unique, and without slash or dot (WebDataset cuts names at the first dot). The name of
    a tar's member, KEY.json or KEY.webm, has at most 100 bytes.
    """
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.splitext(path)[0]).strip("-")
    if start is None and end is None:
        return f"{slug[-80:]}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    milliseconds = ["end" if t is None else f"{round(1000 * t):08d}" for t in (start or 0.0, end)]
    times = "-".join(milliseconds)
    return f"{slug[-68:]}-{times}-{hashlib.sha256(f'{path} {times}'.encode()).hexdigest()[:8]}"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes `path` atomically, one line each."""
    text = "".join(line + "\n" for line in lines)
    atomic_write_text(path, text)


def read_lines(path: Path) -> list[str]:
    """Returns what write_lines wrote. (str.splitlines also cuts at U+2028 and the like, which JSON leaves in
    names.)
    """
    return path.read_text(encoding="utf-8").split("\n")[:-1]


class Contents(NamedTuple):
    """What the files of a data set say beside its tars."""

    # index.json; the name hides tuple.index
    index: dict[str, Any]  # type: ignore[assignment]
    records: list[dict]  # of the .jsonl of all shards
    rejected: list[dict]  # records of rejected.jsonl; none if scan made the index


def read_contents(folder: Path) -> Contents:
    """Reads index.json of a data set, the .jsonl of its shards and rejected.jsonl."""
    index = read_index(folder)
    shards = [(folder / entry["name"]).with_suffix(".jsonl") for entry in index["shards"]]
    rejected = folder / "rejected.jsonl"
    return Contents(
        index,
        [row for shard in shards for row in read_json_rows(shard)],
        read_json_rows(rejected) if rejected.exists() else [],
    )


def class_lists(names: dict[str, set[str]]) -> dict[str, list[str]]:
    """Label set -> class names, sorted; by value where all are whole numbers, so that class 10 follows class
    9.
    """
    return {
        label_set: sorted(classes, key=_number_and_name if all(x.isdecimal() for x in classes) else None)
        for label_set, classes in sorted(names.items())
    }


def _number_and_name(name: str) -> tuple[int, str]:
    return int(name), name  # "1" and "01" are two classes, and the order of a set differs from run to run


COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip"}


class TarSamples(NamedTuple):
    """The samples of a tar and what else is in it."""

    samples: dict[str, dict[str, Member]]  # key -> lower-case extension -> member, by first appearance
    ignored: Counter[str]  # reason -> members that belong to no sample
    scattered: int  # samples whose members do not follow each other
    has_end: bool  # whether the tar ends as it should; if not, it may be cut


def tar_samples(tar: Path, file: BinaryIO | None = None) -> TarSamples:
    """Returns the samples of a tar; reads its headers only.

    Members are joined by their key wherever they are; WebDataset's rule: a key ends at the first dot of the
    file name. Archives that follow each other in one file are read to the end. file: the open tar; None: it
    is opened here. A name that is not UTF-8 gives a key that cannot be encoded. Raises UserError for a
    damaged tar and for a member that occurs twice.
    """
    samples: dict[str, dict[str, Member]] = {}
    scattered = set()
    previous = ""
    try:
        with tarfile.open(tar, "r:", fileobj=file) as archive:
            files = TarFiles(archive)
            for info in files:
                key, ext = split_name(info.name) or ("", "")
                members = samples.setdefault(key, {})
                if ext in members:
                    raise UserError(
                        f"{tar}: {info.name!r} occurs twice; give each sample of a shard a key of its own"
                    )
                if members and key != previous:
                    scattered.add(key)
                members[ext] = Member(info.offset_data, info.size)
                previous = key
    except tarfile.TarError as e:
        raise UserError(f"{tar}: not a plain tar file: {_kind_of_archive(tar, file) or e}") from e
    return TarSamples(samples, files.ignored, len(scattered), files.has_end)


def _kind_of_archive(tar: Path, file: BinaryIO | None) -> str:
    """Says how an archive is compressed, if it is."""
    if file is None:
        with open(tar, "rb") as opened:
            return _kind_of_archive(tar, opened)
    file.seek(0)
    kind = COMPRESSED.get(file.read(2))
    return f"it is compressed ({kind}); unpack it, since samples are read at their offsets" if kind else ""

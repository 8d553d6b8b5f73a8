"""The shard format: WebDataset tars, a .jsonl beside each tar, and one index.json for the data set.

A sample is one media file `KEY.mp4` (or another extension) followed by `KEY.json` with its metadata.
`shard-NAME.jsonl` holds one record per sample: where its media bytes are in the tar, and the metadata again.
`index.json` holds the classes and one entry per shard (name, samples, bytes, SHA-256 of the tar and of the
.jsonl); it is written last, so a folder that has one is complete. `data_prep` writes these files,
`vidssl.data.shards` reads them.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vidssl.core.errors import UserError
from vidssl.core.io import file_sha256
from vidssl.data.addresses import ShardError, is_url, join, read_bounded, without_query
from vidssl.data.extensions import MEDIA_EXTENSIONS
from vidssl.data.metadata import is_packed, without_claims

VERSION = 1
MAX_INDEX_BYTES = 256 << 20  # of index.json; 100,000 shards take 30 MB
MAX_RECORDS_BYTES = 512 << 20  # of one .jsonl
NO_CHECKSUM = "0" * 64
_SHA256 = re.compile("[0-9a-f]{64}")

Payload = TypeVar("Payload")


class Sample(NamedTuple):
    """A sample of a data set and where its media bytes are."""

    key: str
    ext: str  # of the media file, lower case
    shard: int
    offset: int  # of the media bytes in the tar
    size: int  # bytes
    meta: dict[str, Any]  # label, labels, fps, frames, ...: see data_prep.pack


class ShardTable(NamedTuple):
    """The shard entries of an index as arrays [S]: 0.2 kB per shard, and shared by forked processes without
    copies.
    """

    names: np.ndarray  # bytes, UTF-8
    samples: np.ndarray  # i64
    sizes: np.ndarray  # i64, bytes of the tar
    sha256: np.ndarray  # bytes, hexadecimal; of the tar
    index_sha256: np.ndarray  # of its .jsonl
    index_sizes: np.ndarray  # i64, bytes of its .jsonl; -1: not listed


def dumps(value: Any) -> str:
    """Returns one line of JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(", ", ": "), allow_nan=False)


def select_media(members: Mapping[str, Payload]) -> tuple[str, Payload] | None:
    """Returns extension and payload of the media file among `members` (lower-case extension -> payload).

    If a sample has several media files, the first in the order of MEDIA_EXTENSIONS is its media file.
    """
    return next(((ext, members[ext]) for ext in MEDIA_EXTENSIONS if ext in members), None)


def sample_record(key: str, ext: str, offset: int, size: int, meta: dict) -> dict[str, Any]:
    """Returns a record of a shard's .jsonl; `offset` and `size` are those of the media bytes in the tar."""
    return {"key": key, "ext": ext, "offset": offset, "size": size, "meta": meta}


def parse_sample(line: bytes, shard: int, packed: bool) -> Sample:
    """Raises ValueError, KeyError or TypeError if `line` is not a record of a .jsonl.

    packed: whether pack wrote the index; else facts about frames count only where a sample has pack's mark.
    """
    r = json.loads(line)
    sample = Sample(r["key"], r["ext"], shard, r["offset"], r["size"], believed_meta(r, packed))
    if not isinstance(sample.key, str) or not isinstance(sample.ext, str):
        raise TypeError("key or ext is not text")
    if min(sample.offset, sample.size) < 0:
        raise ValueError("offset or size is negative")
    return sample


def believed_meta(record: dict[str, Any], packed: bool) -> dict[str, Any]:
    """Returns the metadata of a record of a .jsonl. packed: as for `parse_sample`."""
    meta = record["meta"]
    if not isinstance(meta, dict):
        raise TypeError(f"meta is {type(meta).__name__}, not an object")
    return meta if packed or is_packed(meta, record["size"]) else without_claims(meta)


def shard_entry(tar: Path, samples: int) -> dict[str, Any]:
    """Returns the entry of index.json for a finished tar and its .jsonl."""
    return {
        "name": tar.name,
        "samples": samples,
        "bytes": tar.stat().st_size,
        "sha256": file_sha256(tar),
        "index_bytes": tar.with_suffix(".jsonl").stat().st_size,
        "index_sha256": file_sha256(tar.with_suffix(".jsonl")),
    }


def dumps_index(
    classes: dict[str, list[str]], entries: list[dict[str, Any]], rejected: int, made_by: dict[str, Any]
) -> str:
    """Returns the text of index.json; rejected: number of source files left out; made_by: options of the
    writer.
    """
    index = {
        "version": VERSION,
        "checksum": NO_CHECKSUM,
        "samples": sum(entry["samples"] for entry in entries),
        "classes": classes,
        "shards": entries,
        "rejected": rejected,
        "pack": made_by,
    }
    text = json.dumps(index, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False)
    return text.replace(NO_CHECKSUM, index_checksum(text.encode()), 1)


def index_checksum(text: bytes, stored: str = NO_CHECKSUM) -> str:
    """Returns the SHA-256 of index.json with zeros in place of the checksum that is stored in it."""
    empty = text.rstrip(b"\n").replace(stored.encode(), NO_CHECKSUM.encode(), 1)
    return hashlib.sha256(empty).hexdigest()


def read_index(folder: str | Path) -> dict[str, Any]:
    """Returns the parsed index.json of a local folder or URL."""
    return parse_index(read_index_bytes(str(folder)), str(folder))


def read_index_bytes(folder: str) -> bytes:
    """Returns the bytes of index.json; raises UserError with a hint if the folder or URL has none."""
    where = join(folder, "index.json")
    if is_url(folder):
        from vidssl.data.remote import fetch_small  # aiohttp takes a third of a second

        try:
            return fetch_small(where, MAX_INDEX_BYTES)
        except ShardError as e:
            hint = ": is this the address of a packed data set?" if e.reason == "shard_missing" else ""
            raise UserError(f"{e}{hint}") from e
    try:
        return read_bounded(where, MAX_INDEX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: {_what_it_is(Path(folder))}") from None
    except ShardError as e:
        raise UserError(str(e)) from e
    except OSError as e:
        raise UserError(f"{where}: {e.strerror}") from None


def _what_it_is(folder: Path) -> str:
    """Says what lies at a path that is no folder of shards with an index, and what to do."""
    if not folder.exists():
        parent = next(p for p in folder.absolute().parents if p.exists())
        return f"no such folder; {parent} is there"
    if not folder.is_dir():
        if folder.name == "index.json":
            return f"a file; name the folder, {folder.parent}"
        return "a file, not a folder of shards"
    packed = sorted(p.parent.name for p in folder.glob("*/index.json"))
    if packed:
        return f"no index.json in it, but it holds {_count(packed, 'folder')} with one: {_first(packed)}"
    tars = sorted(p.name for p in folder.glob("*.tar"))
    if tars:
        return (
            f"no index.json, but {_count(tars, '.tar file')}; "
            f"make the index with vidssl scan {shlex.quote(str(folder))}, or use data.reader=stream"
        )
    found = sorted(p.name for p in folder.iterdir())
    contents = f"it holds {_first(found)}" if found else "it is empty"
    return f"no index.json, so no folder of shards ({contents}); make one with vidssl pack"


def _count(names: list[str], kind: str) -> str:
    return f"{len(names)} {kind}{'s' * (len(names) != 1)}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def parse_index(text: bytes, folder: str) -> dict[str, Any]:
    """Returns the checked contents of index.json; `folder` is named in errors."""
    where = without_query(join(folder, "index.json"))
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not an index of shards ({e})") from None
    if not isinstance(index, dict) or not {"version", "classes", "shards"} <= index.keys():
        raise UserError(f"{where}: not an index of shards")
    if index["version"] != VERSION:
        raise UserError(f"{where}: an index of version {index['version']}, expected {VERSION}")
    # An index of an older version of this project has no checksum.
    checksum = str(index.get("checksum", ""))
    if checksum and index_checksum(text, checksum) != checksum:
        raise UserError(f"{where}: its contents differ from its checksum; it is damaged, or edited by hand")
    if not _are_classes(index["classes"]) or not isinstance(index.get("pack", {}), dict):
        raise UserError(f'{where}: damaged; "classes" is no list of names for each label')
    return index


def _are_classes(classes: Any) -> bool:
    return isinstance(classes, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in classes.values()
    )


def shard_table(index: dict[str, Any], folder: str) -> ShardTable:
    """Returns the checked shard entries of an index. Names and checksums become file names, so both are
    checked.
    """
    entries = index["shards"]
    try:
        for entry in entries:
            name = entry["name"]
            if not name.endswith(".tar") or "/" in name or "\0" in name:
                raise ValueError(f"{name!r} is not the name of a .tar file")
            if not (_SHA256.fullmatch(entry["sha256"]) and _SHA256.fullmatch(entry["index_sha256"])):
                raise ValueError(f"{name}: a checksum is not 64 hexadecimal digits")
            if min(entry["samples"], entry["bytes"]) < 0:
                raise ValueError(f"{name}: samples and bytes must not be negative")
            if entry.get("index_bytes", -1) > MAX_RECORDS_BYTES:
                raise ValueError(f"{name}: a .jsonl has at most {MAX_RECORDS_BYTES} bytes")
        return ShardTable(
            np.array([entry["name"].encode() for entry in entries], bytes),
            np.array([entry["samples"] for entry in entries], np.int64),
            np.array([entry["bytes"] for entry in entries], np.int64),
            np.array([entry["sha256"] for entry in entries], "S64"),
            np.array([entry["index_sha256"] for entry in entries], "S64"),
            np.array([entry.get("index_bytes", -1) for entry in entries], np.int64),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(
            f"{without_query(join(folder, 'index.json'))}: damaged list of shards ({e})"
        ) from None

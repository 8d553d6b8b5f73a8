"""A data set's index.json: its classes, and a line for each shard (name, samples, bytes, and two checksums)."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vidssl.core.errors import UserError
from vidssl.data.remote import ShardError, fetch_small, is_url, join, shown

VERSION = 1
_SHA256 = re.compile("[0-9a-f]{64}")


class Entries(NamedTuple):
    """The lines of an index as arrays [S], 0.2 kB a shard, which processes share better than Python's objects."""

    names: np.ndarray  # bytes, UTF-8
    samples: np.ndarray  # i64
    sizes: np.ndarray  # i64, bytes of the tar
    sha256: np.ndarray  # bytes, hexadecimal; of the tar
    index_sha256: np.ndarray  # of its .jsonl


def read_index(folder: str | Path) -> dict[str, Any]:
    """What index.json of a local folder or URL says."""
    return parse_index(index_text(str(folder)), str(folder))


def index_text(folder: str) -> bytes:
    """index.json as it is written."""
    where = join(folder, "index.json")
    if is_url(folder):
        try:
            return fetch_small(where)
        except ShardError as e:
            hint = ": is this the address of a packed data set?" if e.reason == "shard_missing" else ""
            raise UserError(f"{e}{hint}") from e
    try:
        return Path(where).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        inside = sorted(p.parent.name for p in Path(folder).glob("*/index.json"))
        hint = (
            f"; did you mean one of {inside} in it?" if inside else "; make one with python -m data_prep.pack"
        )
        raise UserError(f"{folder}: no index.json, so this is not a packed data set{hint}") from None
    except OSError as e:
        raise UserError(f"{where}: {e.strerror}") from None


def parse_index(text: bytes, folder: str) -> dict[str, Any]:
    """text: what index_text gave."""
    where = shown(join(folder, "index.json"))
    try:
        index = json.loads(text)
    except ValueError as e:
        raise UserError(f"{where}: not an index of shards ({e})") from None
    if not isinstance(index, dict) or not {"version", "classes", "shards"} <= index.keys():
        raise UserError(f"{where}: not an index of shards")
    if index["version"] != VERSION:
        raise UserError(f"{where}: an index of version {index['version']}, expected {VERSION}")
    return index


def entries(index: dict[str, Any], folder: str) -> Entries:
    """Names and checksums become names of files, so both are checked."""
    shards = index["shards"]
    try:
        for s in shards:
            if not s["name"].endswith(".tar") or "/" in s["name"] or "\0" in s["name"]:
                raise ValueError(f"{s['name']!r} is not the name of a .tar file")
            if not (_SHA256.fullmatch(s["sha256"]) and _SHA256.fullmatch(s["index_sha256"])):
                raise ValueError(f"{s['name']}: a checksum is not 64 hexadecimal digits")
        return Entries(
            np.array([s["name"].encode() for s in shards], bytes),
            np.array([s["samples"] for s in shards], np.int64),
            np.array([s["bytes"] for s in shards], np.int64),
            np.array([s["sha256"] for s in shards], "S64"),
            np.array([s["index_sha256"] for s in shards], "S64"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{shown(join(folder, 'index.json'))}: damaged list of shards ({e})") from None

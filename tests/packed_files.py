"""Reads what data_prep.pack wrote, for comparisons."""

import hashlib
import json
from pathlib import Path

from data_prep.index import read_lines


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_records(folder: Path, pattern: str = "shard-*.jsonl") -> list[dict]:
    """The records of all .jsonl files of a folder that match `pattern`, in the order of their names."""
    return [json.loads(line) for p in sorted(folder.glob(pattern)) for line in read_lines(p)]

"""Shards written without pack: a tar of given files with an index, and what pack writes beside it."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from data_prep.index import write_lines
from vidssl.data.format import dumps, dumps_index, read_index, shard_entry

Files = dict[str, tuple[bytes, dict[str, Any]]]  # key -> bytes of an mp4, metadata


def write_shards(folder: Path, files: Files, classes: dict[str, list[str]], rejected: Any = ()) -> Path:
    """A data set of one shard, as if pack had written it without its reports."""
    folder.mkdir(parents=True)
    tar = folder / "shard-000000.tar"
    records = []
    with tarfile.open(tar, "w") as archive:
        for key, (data, meta) in files.items():
            info = tarfile.TarInfo(f"{key}.mp4")
            info.size = len(data)
            offset = archive.offset + 512
            archive.addfile(info, io.BytesIO(data))
            records.append({"key": key, "ext": "mp4", "offset": offset, "size": len(data), "meta": meta})
    write_lines(tar.with_suffix(".jsonl"), map(dumps, records))
    write_lines(folder / "rejected.jsonl", map(json.dumps, rejected))
    made_by = {"plan": "x", "bytes_in": 1}
    index = dumps_index(classes, [shard_entry(tar, len(records))], len(rejected), made_by)
    write_lines(folder / "index.json", [index])
    return folder


def merge_shards(folder: Path, sources: list[Path]) -> Path:
    """A data set of the shards of several of `write_shards`, with classes and rejected files of the first."""
    folder.mkdir()
    entries = []
    first = read_index(sources[0])
    for i, source in enumerate(sources):
        tar = folder / f"shard-{i:06d}.tar"
        for ext in (".tar", ".jsonl"):
            shutil.copy(source / f"shard-000000{ext}", tar.with_suffix(ext))
        entries.append(shard_entry(tar, read_index(source)["samples"]))
    shutil.copy(sources[0] / "rejected.jsonl", folder)
    write_lines(
        folder / "index.json", [dumps_index(first["classes"], entries, first["rejected"], first["pack"])]
    )
    return folder

"""A data set that is an index only: what order and memory cost for any number of samples can be measured on
it."""

import hashlib
import json
from pathlib import Path


def make_manifest(folder: Path, shards: int, samples: int, lines_of: range = range(0)) -> Path:
    """index.json of `shards` shards of `samples` samples each, no tars; a .jsonl for the shards in
    `lines_of`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for s in lines_of:
        text = "".join(line(s, i) for i in range(samples)).encode()
        (folder / f"shard-{s:06d}.jsonl").write_bytes(text)
        made[s] = hashlib.sha256(text).hexdigest()
    entries = [
        {
            "name": f"shard-{s:06d}.tar",
            "samples": samples,
            "bytes": samples * 500_000,
            "sha256": hashlib.sha256(f"tar {s}".encode()).hexdigest(),
            "index_sha256": made.get(s, hashlib.sha256(f"lines {s}".encode()).hexdigest()),
        }
        for s in range(shards)
    ]
    index = {
        "version": 1,
        "samples": shards * samples,
        "classes": {},
        "shards": entries,
        "rejected": 0,
        "pack": {},
    }
    (folder / "index.json").write_text(json.dumps(index, sort_keys=True))
    return folder


def line(shard: int, i: int) -> str:
    """About as long as what pack writes."""
    meta = {"class": None, "codec": "h264", "decoder": "decord", "duration": 10.0, "fps": 30.0, "frames": 300}
    meta |= {
        "group": f"group {i % 97}",
        "height": 256,
        "label": i % 400,
        "labels": {"label": i % 400},
        "rotation": 0,
    }
    meta |= {"source": f"some/folder/video-{shard:06d}-{i:06d}.mp4", "times": None, "width": 340}
    row = {
        "ext": "mp4",
        "key": f"video-{shard:06d}-{i:06d}",
        "meta": meta,
        "offset": 512 + i * 500_000,
        "size": 490_000,
    }
    return json.dumps(row, sort_keys=True) + "\n"

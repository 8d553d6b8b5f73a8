"""Is what pack wrote still whole? `python -m data_prep.verify OUT [--decode N]`.

Prints one line per problem; exit status 1 if there is any.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.index import dumps, file_sha256, media_of, read_index, read_lines, tar_samples
from vidssl.data.decoders import PyAVVideo, open_video
from vidssl.errors import DecodeError, UserError, run_cli

FRAME_FACTS = ("frames", "height", "width")


def check_shard(folder: Path, entry: dict, strict: bool) -> Iterator[str]:
    """Problems of one shard: bytes, and jsonl against tar. `strict`: the .json in the tar equals the jsonl's meta."""
    tar = folder / entry["name"]
    for file, want in ((tar, entry["sha256"]), (tar.with_suffix(".jsonl"), entry["index_sha256"])):
        if not file.is_file():
            yield f"{file}: missing"
            return
        if file_sha256(file) != want:
            yield f"{file}: sha256 differs from index.json's"
            return
    lines = shard_lines(tar)
    if len(lines) != entry["samples"]:
        yield f"{tar}: {len(lines)} samples in its jsonl, {entry['samples']} in index.json"
    inside = dict(tar_samples(tar))
    with open(tar, "rb") as f:
        for line in lines:
            members = inside.get(line["key"], {})
            media = media_of(members)
            if media is None or (media.ext, media.offset, media.size) != (line["ext"], line["offset"], line["size"]):
                yield f"{tar}: {line['key']}: not where its jsonl says"
            elif strict:
                f.seek(members["json"].offset)
                if f.read(members["json"].size) != dumps(line["meta"]).encode():
                    yield f"{tar}: {line['key']}: its .json differs from its jsonl line"


def shard_lines(tar: Path) -> list[dict]:
    return [json.loads(line) for line in read_lines(tar.with_suffix(".jsonl"))]


def check_sample(tar: Path, line: dict) -> Iterator[str]:
    """Problems of one sample: decoded in full, and by the decoder that training will use."""
    where, meta = f"{tar}: {line['key']}", line["meta"]
    with open(tar, "rb") as f:
        f.seek(line["offset"])
        data = f.read(line["size"])
    try:
        video = open_video(data, line["ext"], meta)
        video.get([0, len(video) // 2, len(video) - 1])
        whole = video if video.decoder == "image" else PyAVVideo(data)
        real = dict(zip(FRAME_FACTS, (len(whole), *whole.size), strict=True))
        if len(video) != len(whole):
            yield f"{where}: {video.decoder} sees {len(video)} frames, a full decode {len(whole)}"
        for fact in FRAME_FACTS:
            if meta.get(fact, real[fact]) != real[fact]:
                yield f"{where}: {fact} is {real[fact]}, meta says {meta[fact]}"
    except DecodeError as e:
        yield f"{where}: {e}"


def check_set(folder: Path, decode: int) -> Iterator[str]:
    """Problems of one data set; `decode` samples, evenly spread, are decoded."""
    index = read_index(folder)
    sound = []
    for entry in index["shards"]:
        problems = list(check_shard(folder, entry, strict="plan" in index["pack"]))
        yield from problems
        if not problems:
            sound.append(folder / entry["name"])
    samples = [(tar, line) for tar in sound for line in shard_lines(tar)]
    for i in np.unique(np.linspace(0, len(samples) - 1, min(decode, len(samples))).astype(int)):
        yield from check_sample(*samples[i])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description="Check packed data sets.")
    parser.add_argument("out", type=Path, help="a folder with index.json in it or below it")
    parser.add_argument("--decode", type=int, default=32, help="samples of each data set to decode (default 32)")
    args = parser.parse_args(argv)
    folders = sorted(p.parent for p in args.out.rglob("index.json"))
    if not folders:
        raise UserError(f"{args.out}: no index.json in it or below it; shards of others need: data_prep.scan")
    bad = 0
    for folder in folders:
        for problem in check_set(folder, args.decode):
            print(problem)
            bad += 1
    print(f"{len(folders)} data set{'s' * (len(folders) > 1)}: {bad or 'no'} problem{'s' * (bad != 1)}")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)

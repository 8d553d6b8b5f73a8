"""Is what pack wrote still whole? `python -m data_prep.verify OUT [--decode N]`, OUT a folder or the URL of a data set.

Prints one line per problem; exit status 1 if there is any. Remote files are fetched one shard at a time, past any
cache, into a temporary file.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.index import tar_samples
from vidssl.core.errors import DecodeError, UserError, run_cli
from vidssl.core.io import stream_sha256
from vidssl.data.decoding import open_video
from vidssl.data.decoding.image import ImageVideo
from vidssl.data.decoding.pyav import PyAVVideo
from vidssl.data.format import dumps, read_index, select_media, shard_table
from vidssl.data.remote import ShardError, fetch, is_url, join, local, shown

FRAME_FACTS = ("frames", "height", "width")


@contextmanager
def opened(where: str, size: int | None, sha256: str) -> Iterator[BinaryIO]:
    """A file of a data set, as it is now at its path or address; ShardError if it is not as indexed."""
    if not is_url(where) and not Path(where).is_file():
        raise ShardError(f"{where}: missing")
    with tempfile.TemporaryFile() if is_url(where) else open(where, "rb") as file:
        if is_url(where):
            fetch(where, file, size)
        if stream_sha256(file) != sha256:
            raise ShardError(f"{shown(where)}: sha256 differs from index.json's")
        yield file


def check_shard(folder: str, entry: dict, strict: bool, decode: list[int]) -> Iterator[str]:
    """Problems of one shard: bytes, jsonl against tar, and the samples numbered in `decode`.

    strict: the .json in the tar equals the jsonl's meta.
    """
    where = join(folder, entry["name"])
    jsonl = join(folder, entry["name"].removesuffix(".tar") + ".jsonl")
    with ExitStack() as stack:
        try:
            tar = stack.enter_context(opened(where, entry["bytes"], entry["sha256"]))
            text = stack.enter_context(opened(jsonl, None, entry["index_sha256"]))
        except ShardError as e:
            yield str(e)
            return
        where = shown(where)
        lines = [json.loads(line) for line in text]
        problems = list(check_lines(where, tar, lines, strict))
        if len(lines) != entry["samples"]:
            problems.append(f"{where}: {len(lines)} samples in its jsonl, {entry['samples']} in index.json")
        yield from problems
        for i in decode if not problems else []:
            yield from check_sample(where, tar, lines[i])


def check_lines(where: str, tar: BinaryIO, lines: list[dict], strict: bool) -> Iterator[str]:
    inside = dict(tar_samples(Path(where), tar))
    for line in lines:
        members = inside.get(line["key"], {})
        media = select_media(members)
        if media is None or (media[0], *media[1]) != (line["ext"], line["offset"], line["size"]):
            yield f"{where}: {line['key']}: not where its jsonl says"
        elif strict:
            tar.seek(members["json"].offset)
            if tar.read(members["json"].size) != dumps(line["meta"]).encode():
                yield f"{where}: {line['key']}: its .json differs from its jsonl line"


def check_sample(tar_name: str, tar: BinaryIO, line: dict) -> Iterator[str]:
    """Problems of one sample: decoded in full, and by the decoder that training will use."""
    where, meta = f"{tar_name}: {line['key']}", line["meta"]
    tar.seek(line["offset"])
    data = tar.read(line["size"])
    try:
        with open_video(data, line["ext"], meta) as video:
            video.get([0, len(video) // 2, len(video) - 1])
        with ImageVideo(data) if video.decoder == "image" else PyAVVideo(data) as whole:
            real = dict(zip(FRAME_FACTS, (len(whole), *whole.size), strict=True))
        if len(video) != len(whole):
            yield f"{where}: {video.decoder} sees {len(video)} frames, a full decode {len(whole)}"
        for fact in FRAME_FACTS:
            if meta.get(fact, real[fact]) != real[fact]:
                yield f"{where}: {fact} is {real[fact]}, meta says {meta[fact]}"
    except DecodeError as e:
        yield f"{where}: {e}"


def check_set(folder: str, decode: int) -> Iterator[str]:
    """Problems of one data set; `decode` samples, evenly spread, are decoded."""
    index = read_index(folder)
    shard_table(index, folder)  # raises UserError if an entry is damaged
    ends = list(accumulate(entry["samples"] for entry in index["shards"]))
    total = ends[-1] if ends else 0
    chosen = np.unique(np.linspace(0, total - 1, min(decode, total)).astype(int)).tolist()
    for entry, end in zip(index["shards"], ends, strict=True):
        begin = end - entry["samples"]
        yield from check_shard(
            folder, entry, "plan" in index["pack"], [i - begin for i in chosen if begin <= i < end]
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description="Check packed data sets.")
    parser.add_argument(
        "out", type=local, help="a folder with index.json in it or below it, or a data set's URL"
    )
    parser.add_argument(
        "--decode", type=int, default=32, help="samples of each data set to decode (default 32)"
    )
    args = parser.parse_args(argv)
    folders = (
        [args.out] if is_url(args.out) else sorted(str(p.parent) for p in Path(args.out).rglob("index.json"))
    )
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

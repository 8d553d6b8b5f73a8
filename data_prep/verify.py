"""Checks packed data sets: `vidssl verify OUT [--decode N]`.

OUT is a folder or the URL of a data set. Prints one line per problem; exit status 1 if there is any. Remote
files are fetched one shard at a time, without the cache, into a temporary file.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.filters import Rejected
from data_prep.index import tar_samples
from data_prep.workers import WorkerPool
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import stream_sha256
from vidssl.data.addresses import ShardError, canonical_address, is_url, join, without_query
from vidssl.data.format import MAX_RECORDS_BYTES, believed_meta, dumps, read_index, select_media, shard_table
from vidssl.data.isolation import Reporter
from vidssl.data.tar_files import is_system_file

FRAME_FACTS = ("frames", "height", "width")


@contextmanager
def open_checked(where: str, size: int | None, sha256: str) -> Iterator[BinaryIO]:
    """Opens a file of a data set by path or URL. Raises ShardError if its size or SHA-256 differs from the
    index."""
    if not is_url(where) and not Path(where).is_file():
        raise ShardError(f"{where}: missing")
    with tempfile.TemporaryFile() if is_url(where) else open(where, "rb") as file:
        if is_url(where):
            from vidssl.data.remote import fetch  # aiohttp takes a third of a second

            fetch(where, file, size, MAX_RECORDS_BYTES)
        found = file.seek(0, os.SEEK_END)
        if size is not None and found != size:
            raise ShardError(f"{without_query(where)}: has {found} bytes, index.json says {size}")
        if size is None and found > MAX_RECORDS_BYTES:
            raise ShardError(f"{without_query(where)}: has more than {MAX_RECORDS_BYTES} bytes, the limit")
        if stream_sha256(file) != sha256:
            raise ShardError(f"{without_query(where)}: sha256 differs from index.json's")
        yield file


def check_shard(folder: str, entry: dict, strict: bool, decode: list[int], pool: WorkerPool) -> Iterator[str]:
    """Yields the problems of one shard: checksums, .jsonl against tar, and the samples with the indices
    `decode`.

    strict: the .json members of the tar must equal the meta of the .jsonl. pool: does `decode_job`.
    """
    tar_path = join(folder, entry["name"])
    jsonl_path = join(folder, entry["name"].removesuffix(".tar") + ".jsonl")
    with ExitStack() as stack:
        try:
            tar = stack.enter_context(open_checked(tar_path, entry["bytes"], entry["sha256"]))
            size = entry.get("index_bytes")
            jsonl = stack.enter_context(open_checked(jsonl_path, size, entry["index_sha256"]))
        except ShardError as e:
            yield str(e)
            return
        where = without_query(tar_path)
        try:
            records = [json.loads(line) for line in jsonl]
            problems = list(check_records(where, tar, records, strict))
        except (ValueError, KeyError, TypeError, RecursionError, UserError) as e:
            yield f"{where}: it or its jsonl cannot be read: {type(e).__name__} {e}"
            return
        if len(records) != entry["samples"]:
            problems.append(f"{where}: {len(records)} samples in its jsonl, {entry['samples']} in index.json")
        yield from problems
        for i in decode if not problems else []:
            tar.seek(records[i]["offset"])
            data = tar.read(records[i]["size"])
            found = pool.run(data, records[i]["ext"], believed_meta(records[i], strict))
            problems = [f"{found.reason}: {found.detail}"] if isinstance(found, Rejected) else found
            yield from (f"{where}: {records[i]['key']}: {problem}" for problem in problems)


def check_records(where: str, tar: BinaryIO, records: list[dict], strict: bool) -> Iterator[str]:
    """Yields the records whose media file or metadata is not where, or not what, the tar has."""
    samples = tar_samples(Path(where), tar).samples
    for record in records:
        # Raises an error for metadata of another kind.
        believed_meta(record, strict)
        members = samples.get(record["key"], {})
        media = select_media(members)
        if media is None or (media[0], *media[1]) != (record["ext"], record["offset"], record["size"]):
            yield f"{where}: {record['key']}: not where its jsonl says"
        elif strict and "json" not in members:
            yield f"{where}: {record['key']}: has no .json"
        elif strict:
            tar.seek(members["json"].offset)
            if tar.read(members["json"].size) != dumps(record["meta"]).encode():
                yield f"{where}: {record['key']}: its .json differs from its jsonl line"


def decode_job(report: Reporter, data: bytes, ext: str, meta: dict) -> list[str]:
    """In a child process: returns the problems of one sample, decoded completely and by the decoder that
    training uses. meta: its metadata as a reader of shards takes them.
    """
    # imported here, so that --help and mistakes are answered without a decoder
    from vidssl.data.decoding import open_video
    from vidssl.data.decoding.image import ImageVideo
    from vidssl.data.decoding.pyav import PyAVVideo

    problems = []
    with open_video(data, ext, meta) as video:
        video.get([0, len(video) // 2, len(video) - 1])
    report.progress()
    with ImageVideo(data) if video.decoder == "image" else PyAVVideo(data) as complete:
        decoded = dict(zip(FRAME_FACTS, (len(complete), *complete.size), strict=True))
    if len(video) != len(complete):
        problems.append(f"{video.decoder} sees {len(video)} frames, a full decode {len(complete)}")
    for fact in FRAME_FACTS:
        if meta.get(fact, decoded[fact]) != decoded[fact]:
            problems.append(f"{fact} is {decoded[fact]}, meta says {meta[fact]}")
    return problems


def find_unlisted(folder: Path, listed: set[str]) -> Iterator[str]:
    """Yields the tars that index.json does not list, except those in which no sample was found."""
    for tar in sorted(folder.glob("*.tar")):
        lines = tar.with_suffix(".jsonl")
        has_no_samples = lines.exists() and lines.stat().st_size == 0
        if tar.name not in listed and not is_system_file(tar.name) and not has_no_samples:
            yield f"{tar}: not in index.json"


def check_dataset(folder: str, decode: int, pool: WorkerPool) -> Iterator[str]:
    """Yields the problems of one data set; `decode` evenly spaced samples are decoded by `pool`."""
    index = read_index(folder)
    shard_table(index, folder)  # raises UserError if an entry is damaged
    ends = list(accumulate(entry["samples"] for entry in index["shards"]))
    total = ends[-1] if ends else 0
    chosen = np.unique(np.linspace(0, total - 1, min(decode, total)).astype(int)).tolist()
    if not is_url(folder):
        yield from find_unlisted(Path(folder), {entry["name"] for entry in index["shards"]})
    is_packed = "plan" in index.get("pack", {})
    for entry, end in zip(index["shards"], ends, strict=True):
        begin = end - entry["samples"]
        yield from check_shard(
            folder, entry, is_packed, [i - begin for i in chosen if begin <= i < end], pool
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="vidssl verify", description="Check packed data sets.")
    out_help = "a folder with index.json in it or below it, or a data set's URL"
    parser.add_argument("out", type=canonical_address, help=out_help)
    parser.add_argument(
        "--decode", type=int, default=32, help="number of samples per data set to decode (default 32)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds until a sample counts as hanging"
    )
    args = parser.parse_args(argv)
    if args.timeout <= 0:
        raise UserError("--timeout must be positive")
    folders = [args.out]
    if not is_url(args.out):
        folders = sorted(str(p.parent) for p in Path(args.out).rglob("index.json"))
    if not folders:
        if not Path(args.out).exists():
            raise UserError(f"{args.out}: no such folder")
        raise UserError(
            f"{args.out}: no index.json in it or below it; other WebDataset shards need vidssl scan"
        )
    problems = 0
    # A sample that hangs or crashes its decoder is a problem of the data set, not the end of the check.
    with closing(WorkerPool(decode_job, args.timeout)) as pool:
        for folder in folders:
            for problem in check_dataset(folder, args.decode, pool):
                print(problem)
                problems += 1
    counted = f"{problems or 'no'} problem{'s' * (problems != 1)}"
    print(f"{len(folders)} data set{'s' * (len(folders) > 1)}: {counted}")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)

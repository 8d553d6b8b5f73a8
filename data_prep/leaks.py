"""Finds videos of an evaluation set in a training set: `python -m data_prep.leaks TRAIN TEST`.

Both are packed data sets. A test video is reported if TRAIN holds the same bytes (SHA-256 of the file) or the
same pictures, even re-encoded, scaled, at another frame rate or trimmed:

1. Every video is hashed 8 times per second (data_prep.fingerprint).
2. Pairs of hashes with one of four 16-bit quarters in common and at most 10 different bits vote for a
   training video and a shift in time. The 10 training videos with the most votes are compared, if a fifth of
   the hashes voted.
3. The pair is decided by what moves in the two videos (data_prep.matching). Takes of one regular movement
   before a fixed camera come close (push-ups: correlation up to 0.98), so a pair is dropped if another
   training video fits much better; without one, such a take is reported.

Not found: mirrored, rotated, strongly cropped or speed-changed copies, and those with less than 0.75 s in
common. Prints a line for each pair; exit status 1 if there is any.
"""

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.filters import Rejected
from data_prep.fingerprint import Candidate, Fingerprint, HashTable, MediaFile
from data_prep.index import write_lines
from data_prep.matching import matching_job
from data_prep.workers import WorkerPool
from vidssl.core.errors import UserError, run_cli
from vidssl.data.format import Sample, dumps
from vidssl.data.shards import Shards


class ShardFiles:
    """Reads the media files of several data sets: ("train" or "test", sample) -> MediaFile."""

    def __init__(self, shards: dict[str, Shards]):
        self.shards = shards

    def __call__(self, location: tuple[str, Sample]) -> MediaFile:
        split, sample = location
        return MediaFile(self.shards[split].read(sample), sample.ext, sample.meta)


def find_leaks(
    train: Shards, test: Shards, workers: int, timeout_s: float, job: Callable[..., Any] = matching_job
) -> Iterator[dict]:
    """Yields a record for each video or pair that cannot be decoded, then one for each leak, in the order of
    TEST.

    Leak: {"test": key, "train": key, "match": "bytes", "pictures" or "still pictures", ...}. Failure: {"test"
    and/or "train": key, "error": reason}. timeout_s: seconds without progress until a video counts as
    hanging. job: replaces `matching_job` in tests.
    """
    samples = {"train": train.list_samples(), "test": test.list_samples()}
    with closing(WorkerPool(partial(job, ShardFiles({"train": train, "test": test})), timeout_s)) as pool:
        fingerprints: dict[str, list[Fingerprint | Rejected]] = {}
        for split, videos in samples.items():
            jobs: list[tuple] = [("fingerprint", (split, sample)) for sample in videos]
            fingerprints[split] = pool.map(jobs, workers, f"fingerprint {split}", "videos")
        matches, candidates = find_candidates(fingerprints["train"], fingerprints["test"])
        jobs = [
            ("compare", c, ("test", samples["test"][c.test]), ("train", samples["train"][c.train]))
            for c in candidates
        ]
        compared = pool.map(jobs, workers, "compare", "videos")
    for split, videos in samples.items():
        for sample, result in zip(videos, fingerprints[split], strict=True):
            if isinstance(result, Rejected):
                yield {split: sample.key, "error": result.reason}
    for candidate, result in zip(candidates, compared, strict=True):
        if isinstance(result, Rejected):
            keys = {
                "test": samples["test"][candidate.test].key,
                "train": samples["train"][candidate.train].key,
            }
            yield {**keys, "error": result.reason}
        elif result is not None:
            matches[candidate.test].append((candidate.train, result))
    for i in sorted(matches):
        for j, match in drop_worse_matches(matches[i]):
            yield {"test": samples["test"][i].key, "train": samples["train"][j].key, **match}


def find_candidates(
    train: list[Fingerprint | Rejected], test: list[Fingerprint | Rejected]
) -> tuple[dict[int, list[tuple[int, dict]]], list[Candidate]]:
    """Returns test index -> [(train index, record)] of the files with equal bytes, and candidates for the
    others."""
    table = HashTable([f if isinstance(f, Fingerprint) else None for f in train])
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for i, found in enumerate(train):
        if isinstance(found, Fingerprint):
            by_digest[found.digest].append(i)
    identical: dict[int, list[tuple[int, dict]]] = defaultdict(list)
    candidates: list[Candidate] = []
    for i, query in enumerate(test):
        if isinstance(query, Fingerprint) and query.digest in by_digest:
            identical[i] = [(j, {"match": "bytes"}) for j in by_digest[query.digest]]
        elif isinstance(query, Fingerprint):
            candidates += table.candidates(i, query)
    return identical, candidates


def drop_worse_matches(matches: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """Drops matches of one test video that correlate much less than its best: another take of the same
    movement."""
    best = max((record["correlation"] for _, record in matches if "correlation" in record), default=1.0)
    max_gap = 2 * (1 - best) + 0.01
    return [(j, record) for j, record in matches if 1 - record.get("correlation", 1.0) <= max_gap]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.leaks", description=__doc__.split("\n")[0])
    parser.add_argument("train", help="the packed training set, a folder or URL")
    parser.add_argument("test", help="the packed evaluation set, a folder or URL")
    parser.add_argument("--out", type=Path, help="where to write the pairs, one JSON object per line")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="seconds without progress until a video counts as hanging",
    )
    args = parser.parse_args(argv)
    if args.workers < 1 or args.timeout <= 0:
        raise UserError("--workers and --timeout must be positive")
    train, test = Shards([args.train]), Shards([args.test])
    records = list(find_leaks(train, test, args.workers, args.timeout))
    if args.out:
        write_lines(args.out, map(dumps, records))
    leaks = [record for record in records if "match" in record]
    for record in leaks:
        details = {name: value for name, value in record.items() if name not in ("test", "train")}
        print(f"{record['test']} matches {record['train']}: {dumps(details)}")
    leaked = len({record["test"] for record in leaks})
    print(
        f"{leaked} of {test.n} test videos are among the {train.n} of {args.train}; "
        f"{len(records) - len(leaks)} not decoded"
    )
    if leaks:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)

"""The search for videos of one data set in another: hashes, candidates, comparison.

1. Every video is hashed 8 times per second (data_prep.fingerprint).
2. Pairs of hashes with one of four 16-bit quarters in common and at most 10 different bits vote for a
   training video and a shift in time. The 10 training videos with the most votes are compared, if a fifth of
   the hashes voted.
3. The pair is decided by what moves in the two videos (data_prep.matching). Takes of one regular movement
   before a fixed camera come close (push-ups: correlation up to 0.98), so a pair is dropped if another
   training video fits much better; without one, such a take is reported.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

from data_prep.filters import Rejected
from data_prep.fingerprint import Candidate, Fingerprint, HashTable, MediaFile
from data_prep.matching import matching_job
from data_prep.workers import WorkerPool
from vidssl.data.format import Sample
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

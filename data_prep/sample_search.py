"""Near duplicates within data sets and leaks between them, over a bounded part of their videos.

`vidssl leaks` compares every video of two data sets; here at most a number of pixels is decoded, so that a
page about any data set is ready in about a minute. Videos of equal size in bytes are searched first, since
such files are most often the same, then others in a shuffled order. Within a data set a pair is decided as in
data_prep.dedup, between two as in data_prep.leak_search.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import combinations
from typing import Any, Literal, NamedTuple

from data_prep.dedup import MIN_DUPLICATE_CORRELATION, is_contained
from data_prep.filters import Rejected
from data_prep.fingerprint import Candidate, Fingerprint, HashTable
from data_prep.leak_search import ShardFiles, drop_worse_matches, find_candidates
from data_prep.matching import COMPARED_SECONDS, matching_job
from data_prep.workers import WorkerPool
from vidssl.data.format import Sample
from vidssl.data.shards import Shards

SEARCHED_PIXELS = 1_000_000_000  # that are decoded to find candidates: about 20 seconds on a core
COMPARED_PIXELS = 500_000_000  # that are decoded to decide about them
PIXELS_A_BYTE = 100  # of a video that nobody has measured
OPENING_PIXELS = 250_000  # as long as these pixels takes what a video takes besides its own, however small
TIMEOUT_S = 60.0  # without progress until a video counts as hanging


class SetSample(NamedTuple):
    """A sample, and the data set that it is of."""

    name: str
    sample: Sample


class SimilarPair(NamedTuple):
    """Two samples that show the same."""

    kind: Literal["duplicate", "leak"]  # a leak: of two data sets
    earlier: SetSample
    later: SetSample
    # "match": bytes, pictures or still pictures; "shift": seconds, time in the earlier minus in the later
    match: dict[str, Any]


class SampleSearch(NamedTuple):
    """What a search has found, and of how much."""

    pairs: list[SimilarPair]
    searched: dict[str, int]  # name of a data set -> videos that were compared with all others
    undecided: int  # pairs that look alike and were not compared any more
    undecodable: int


def pixels_of(sample: Sample) -> int:
    """The pixels that decoding a whole video takes, roughly, with those that opening it is counted as."""
    frames, height, width = (sample.meta.get(name) for name in ("frames", "height", "width"))
    if isinstance(frames, int) and isinstance(height, int) and isinstance(width, int):
        return OPENING_PIXELS + frames * height * width
    return OPENING_PIXELS + PIXELS_A_BYTE * sample.size


def choose_searched(samples: Mapping[str, Sequence[Sample]], pixels: float) -> dict[str, list[Sample]]:
    """As many samples as `pixels` allow: those with the size of another one, then in a shuffled order."""
    sizes = Counter(sample.size for of_set in samples.values() for sample in of_set)
    every = [SetSample(name, sample) for name, of_set in samples.items() for sample in of_set]
    every.sort(key=lambda one: (sizes[one.sample.size] == 1, shuffled_place(one)))
    chosen: dict[str, list[Sample]] = {name: [] for name in samples}
    for one in every:
        pixels -= pixels_of(one.sample)
        if pixels < 0:
            break
        chosen[one.name].append(one.sample)
    return chosen


def shuffled_place(one: SetSample) -> bytes:
    return hashlib.sha256(f"{one.name}/{one.sample.key}".encode("utf-8", "replace")).digest()


def search_samples(
    shards: dict[str, Shards],
    samples: Mapping[str, Sequence[Sample]],
    workers: int,
    pixels: float = SEARCHED_PIXELS,
    compared_pixels: float = COMPARED_PIXELS,
    timeout_s: float = TIMEOUT_S,
) -> SampleSearch:
    """Searches the samples of data sets. pixels, compared_pixels: what is decoded at most, to find pairs that
    look alike and to decide about them."""
    chosen = choose_searched(samples, pixels)
    with closing(WorkerPool(partial(matching_job, ShardFiles(shards)), timeout_s)) as pool:
        prints: dict[str, list[Fingerprint | Rejected]] = {}
        for name, videos in chosen.items():
            jobs: list[tuple] = [("fingerprint", (name, sample)) for sample in videos]
            prints[name] = pool.map(jobs, workers, f"fingerprint {name}", "videos") if jobs else []
        table = CandidateTable(chosen, prints)
        likely, undecided = cheapest(table.candidates, chosen, compared_pixels)
        jobs = [("compare", pair.candidate, *reversed(pair.both(chosen))) for pair in likely]
        compared = pool.map(jobs, workers, "compare", "pairs") if jobs else []
    pairs = [*table.identical, *decide(likely, compared, chosen, prints)]
    pairs.sort(key=lambda pair: certainty(pair.match), reverse=True)
    failed = sum(isinstance(found, Rejected) for of_set in prints.values() for found in of_set)
    return SampleSearch(pairs, {name: len(videos) for name, videos in chosen.items()}, undecided, failed)


def certainty(match: dict[str, Any]) -> tuple[bool, float]:
    """Orders records: equal bytes, then moving pictures by their correlation, then still ones."""
    return match["match"] == "bytes", match.get("correlation", 0.0)


class CandidatePair(NamedTuple):
    """Two videos that look alike: numbers of samples in the lists of two data sets, or of one."""

    earlier: str
    later: str
    candidate: Candidate  # test: of the later

    def both(self, chosen: dict[str, list[Sample]]) -> tuple[SetSample, SetSample]:
        """The earlier and the later one."""
        return (
            SetSample(self.earlier, chosen[self.earlier][self.candidate.train]),
            SetSample(self.later, chosen[self.later][self.candidate.test]),
        )


class CandidateTable:
    """Pairs with equal bytes, and candidates for the others, within each data set and between any two."""

    def __init__(self, chosen: dict[str, list[Sample]], prints: dict[str, list[Fingerprint | Rejected]]):
        self.identical: list[SimilarPair] = []
        self.candidates: list[CandidatePair] = []
        for name, found in prints.items():
            self._add_within(name, chosen[name], found)
        for earlier, later in combinations(prints, 2):
            if not prints[earlier] or not prints[later]:
                continue
            same, candidates = find_candidates(prints[earlier], prints[later])
            for i, matches in same.items():
                two = SetSample(earlier, chosen[earlier][matches[0][0]]), SetSample(later, chosen[later][i])
                self.identical.append(SimilarPair("leak", *two, matches[0][1]))
            self.candidates += [CandidatePair(earlier, later, candidate) for candidate in candidates]

    def _add_within(self, name: str, samples: list[Sample], found: list[Fingerprint | Rejected]) -> None:
        if not found:
            return
        table = HashTable([one if isinstance(one, Fingerprint) else None for one in found])
        first_with: dict[bytes, int] = {}
        for i, query in enumerate(found):
            if not isinstance(query, Fingerprint):
                continue
            first = first_with.setdefault(query.digest, i)
            if first < i:
                two = SetSample(name, samples[first]), SetSample(name, samples[i])
                self.identical.append(SimilarPair("duplicate", *two, {"match": "bytes"}))
                continue
            likely = (candidate for candidate in table.candidates(i, query) if candidate.train < i)
            self.candidates += [CandidatePair(name, name, candidate) for candidate in likely]


def cheapest(
    pairs: Iterable[CandidatePair], chosen: dict[str, list[Sample]], pixels: float
) -> tuple[list[CandidatePair], int]:
    """The pairs that `pixels` allow to compare, those of two data sets first, then those with most in common,
    and the number of the others."""

    def order(pair: CandidatePair) -> tuple[bool, int, float]:
        return pair.earlier == pair.later, -pair.candidate.matched, pair.candidate.hash_distance

    ordered = sorted(pairs, key=order)
    kept = []
    for pair in ordered:
        pixels -= sum(compared_pixels_of(one.sample) for one in pair.both(chosen))
        if pixels < 0:
            break
        kept.append(pair)
    return kept, len(ordered) - len(kept)


def compared_pixels_of(sample: Sample) -> float:
    """Of the seconds that a comparison decodes."""
    duration = sample.meta.get("duration")
    is_long = isinstance(duration, (int, float)) and duration > COMPARED_SECONDS
    return pixels_of(sample) * (COMPARED_SECONDS / duration if is_long else 1.0)  # type: ignore[operator]


def decide(
    pairs: Sequence[CandidatePair],
    compared: Sequence[Any],
    chosen: dict[str, list[Sample]],
    prints: dict[str, list[Fingerprint | Rejected]],
) -> Iterator[SimilarPair]:
    """The pairs that show the same. compared: record of each, None, or Rejected."""
    leaks: dict[tuple[str, str, int], list[tuple[int, dict]]] = {}
    for pair, record in zip(pairs, compared, strict=True):
        if not isinstance(record, dict):
            continue
        candidate = pair.candidate
        if pair.earlier != pair.later:
            leaks.setdefault((pair.earlier, pair.later, candidate.test), []).append((candidate.train, record))
            continue
        own = [prints[pair.earlier][number] for number in (candidate.test, candidate.train)]
        contained = any(is_contained(candidate, one) for one in own if isinstance(one, Fingerprint))
        if contained and record.get("correlation", 1.0) >= MIN_DUPLICATE_CORRELATION:
            yield SimilarPair("duplicate", *pair.both(chosen), record)
    for (earlier, later, i), matches in leaks.items():
        for j, record in drop_worse_matches(matches):
            two = SetSample(earlier, chosen[earlier][j]), SetSample(later, chosen[later][i])
            yield SimilarPair("leak", *two, record)

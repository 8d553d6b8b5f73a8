"""Perceptual fingerprints of videos, and a table that finds the videos that share hashes with a query.

A fingerprint has a 64-bit perceptual hash (`phash`) for each 1 / HASHES_PER_SECOND seconds of a video. Frames
without contrast (black, white) have none, since every film has such frames. The cost of a search grows with
the number of hashes, not of pairs of videos. `data_prep.matching` decides about the candidates,
`data_prep.leaks` and `data_prep.dedup` use both.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vidssl.data.decoding import open_video

HASHES_PER_SECOND = 8.0
MIN_CONTRAST = 4.0  # grey levels, standard deviation of a frame; frames under it are not hashed
MAX_HASH_DISTANCE = 10  # bits of 64, between two frames that may be the same
MAX_BUCKET = 4096  # hashes of a bucket that are compared with a query; of a fuller bucket, evenly spaced ones
MIN_MATCHED_SHARE = 0.2  # of the hashes of the shorter video, and at least 2 (1 if it has only 1)
MAX_CANDIDATES = 10  # training videos per test video
PROGRESS_EVERY = 32  # frames between two calls of `on_progress`
_DCT = np.cos(
    np.pi / 32 * (np.arange(32) + 0.5) * np.arange(8)[:, None]
)  # [8,32], the eight lowest frequencies
_BITS_SET = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)

OnProgress = Callable[[], None]


class MediaFile(NamedTuple):
    """The bytes of a video or image, and what is known of it."""

    data: bytes
    ext: str
    meta: dict | None = None  # as pack writes it, if known


class Fingerprint(NamedTuple):
    """Digest and perceptual hashes of a file."""

    digest: bytes  # SHA-256 of the file
    hashes: np.ndarray  # u64 [n]
    steps: np.ndarray  # i32 [n], the time of each hash in units of 1 / HASHES_PER_SECOND seconds


class Candidate(NamedTuple):
    """A training video that may be (or contain, or be part of) a test video."""

    test: int  # index of the test video
    train: int  # index of the training video
    matched: int  # hashes of the test video that agree on the shift
    test_time: float  # seconds, median time of these hashes
    shift: float  # seconds, time in the training video minus time in the test video
    hash_distance: float  # bits, mean over the pairs of hashes with exactly this shift


def no_progress() -> None:
    """For callers without a deadline."""


def phash(grey: np.ndarray) -> np.ndarray:
    """Grey frames [n,32,32] -> u64 [n]: a bit for each of the 8x8 lowest DCT coefficients that is above their
    median.

    The pHash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), with the
    first row and column included.
    """
    low = (_DCT @ grey.astype(np.float64) @ _DCT.T).reshape(len(grey), 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def hamming_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """u64 [n], u64 [n] -> i64 [n]: number of bits that differ, 0..64."""
    return _BITS_SET[np.bitwise_xor(a, b)[:, None].view(np.uint16)].sum(1, dtype=np.int64)


def grey_frames(video: Any, indices: np.ndarray, side: int, on_progress: OnProgress) -> np.ndarray:
    """Returns the frames at `indices` as u8 [n,side,side]; decoded in one pass, one frame in memory at a
    time."""
    unique, inverse = np.unique(indices, return_inverse=True)
    frames = np.empty((len(unique), side, side), np.uint8)
    for i, frame in enumerate(video.iter_frames(unique)):
        small = Image.fromarray(frame).convert("L").resize((side, side), Image.Resampling.BOX)
        frames[i] = np.asarray(small)
        if i % PROGRESS_EVERY == 0:
            on_progress()
    return frames[inverse]


def fingerprint(file: MediaFile, on_progress: OnProgress = no_progress) -> Fingerprint:
    """Hashes the frames displayed at 0, 1 / HASHES_PER_SECOND, ... seconds. Raises DecodeError."""
    with open_video(*file) as video:
        on_progress()
        times = np.arange(0.0, video.times[-1] + 1e-6, 1 / HASHES_PER_SECOND)
        indices = np.searchsorted(video.times, times + 1e-6, side="right") - 1
        frames = grey_frames(video, indices, 32, on_progress)
    steps = np.flatnonzero(frames.std((1, 2)) >= MIN_CONTRAST)
    return Fingerprint(sha256(file.data).digest(), phash(frames)[steps], steps.astype(np.int32))


class HashTable:
    """The hashes of the training videos, in one table of 65,536 buckets per 16-bit quarter; 32 bytes per
    hash."""

    def __init__(self, fingerprints: Sequence[Fingerprint | None], max_bucket: int = MAX_BUCKET):
        """fingerprints: one per video; None: the video has none."""
        empty = Fingerprint(b"", np.empty(0, np.uint64), np.empty(0, np.int32))
        known = [f or empty for f in fingerprints]
        self.counts = np.array([len(f.hashes) for f in known])  # i64 [videos]
        self.video = np.repeat(np.arange(len(known), dtype=np.int32), self.counts)  # of each hash
        self.hashes = np.concatenate([f.hashes for f in known])
        self.steps = np.concatenate([f.steps for f in known])
        self._max_bucket = max_bucket
        quarters = self.hashes[:, None].view(np.uint16).T  # [4,n]
        self._order = [np.argsort(q, kind="stable").astype(np.int32) for q in quarters]
        self._ends = [np.cumsum(np.bincount(q, minlength=1 << 16)) for q in quarters]

    def lookup(self, query: np.ndarray) -> np.ndarray:
        """query: a u64. Returns the indices i64 [n] of hashes that differ by at most MAX_HASH_DISTANCE bits.

        Only those that share a quarter with the query are found, and not all of a bucket fuller than
        `max_bucket`.
        """
        matches = []
        quarters = query.reshape(1, 1).view(np.uint16)[0]
        for quarter, order, ends in zip(quarters, self._order, self._ends, strict=True):
            bucket = order[ends[quarter - 1] if quarter else 0 : ends[quarter]]
            if len(bucket) > self._max_bucket:
                bucket = bucket[np.linspace(0, len(bucket) - 1, self._max_bucket).astype(int)]
            distances = hamming_distance(self.hashes[bucket], np.full(len(bucket), query))
            matches.append(bucket[distances <= MAX_HASH_DISTANCE])
        return np.unique(np.concatenate(matches))

    def candidates(self, test: int, query: Fingerprint) -> list[Candidate]:
        """Returns the training videos that are worth comparing with test video number `test`, the likeliest
        first.

        Each pair of similar hashes votes for a training video and a shift in time.
        """
        matches = [self.lookup(h) for h in query.hashes]
        query_index = np.repeat(np.arange(len(matches)), [len(m) for m in matches])
        if not len(query_index):
            return []
        table_index = np.concatenate(matches)
        votes = Votes(
            query_index,
            self.video[table_index],
            self.steps[table_index].astype(np.int64) - query.steps[query_index],
            hamming_distance(query.hashes[query_index], self.hashes[table_index]),
        )
        found = [
            self._candidate(test, query, votes, video, shift)
            for video, shift in votes.most_frequent_shifts(4 * MAX_CANDIDATES)
        ]
        likely = [candidate for candidate in found if candidate is not None]
        return sorted(likely, key=lambda c: (-c.matched, c.hash_distance))[:MAX_CANDIDATES]

    def _candidate(
        self, test: int, query: Fingerprint, votes: "Votes", video: int, shift: int
    ) -> Candidate | None:
        """shift: in steps. Returns None if too few hashes of the query agree on it, within one step."""
        same_video = votes.video == video
        agreeing = votes.query[same_video & (np.abs(votes.shift - shift) <= 1)]
        matched = len(np.unique(agreeing))
        shorter = min(len(query.hashes), self.counts[video])
        if matched < max(min(2, shorter), MIN_MATCHED_SHARE * shorter):
            return None
        test_time = float(np.median(query.steps[agreeing])) / HASHES_PER_SECOND
        hash_distance = float(votes.bits[same_video & (votes.shift == shift)].mean())
        return Candidate(test, video, matched, test_time, shift / HASHES_PER_SECOND, hash_distance)


class Votes(NamedTuple):
    """Pairs of similar hashes, one per entry of each array [k]."""

    query: np.ndarray  # i64, index of the query's hash
    video: np.ndarray  # i32, index of the training video
    shift: np.ndarray  # i64, steps, training video minus query
    bits: np.ndarray  # i64, Hamming distance

    def most_frequent_shifts(self, n: int) -> list[tuple[int, int]]:
        """Returns (video, its most frequent shift) of the `n` videos with most votes for one shift."""
        keys, counts = np.unique(
            self.video.astype(np.int64) << 32 | (self.shift + (1 << 31)), return_counts=True
        )
        by_video = np.lexsort((-counts, keys >> 32))
        best = by_video[np.diff(keys[by_video] >> 32, prepend=-1) > 0]
        best = best[np.argsort(-counts[best], kind="stable")[:n]]
        return [(key >> 32, (key & 0xFFFFFFFF) - (1 << 31)) for key in keys[best].tolist()]

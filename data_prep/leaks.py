"""Which videos of an evaluation set are in a training set too? `python -m data_prep.leaks TRAIN TEST`.

Both are packed data sets. A test video is reported where TRAIN holds the same bytes (SHA-256 of the file), or the same
pictures, even re-encoded, scaled, at another frame rate or trimmed:

1. Every video is looked at RATE times a second. A look is a 64-bit perceptual hash (`phash`); one without contrast
   (black, white) is left out, as it is in every film.
2. Looks that have one of the hash's four 16-bit quarters in common are looked up in buckets, at most BUCKET of each,
   and vote if at most NEAR bits differ: for a training video, and for a shift in time. So the cost grows with the
   number of looks, not of pairs. The MOST videos with the most votes are compared, if SHARE of the looks voted.
3. Of these two every frame is looked at, up to SPAN seconds where the votes are: 8x8 thumbnails, each less its mean
   over time. What is left is what moves. The videos are the same if, at the best shift, that correlates by ALIKE or
   more over at least half of the shorter one. This tells clips of one scene and camera apart: their backgrounds are
   equal, but not their motion. Takes of one regular movement before a fixed camera come close (push-ups: up to 0.98),
   so a pair is dropped if another training video fits much better; without one there, such a take is reported.
4. Where nothing moves (STILL grey levels), and for images, the hashes decide: at most SAME bits, on average.

Not found: mirrored, turned, strongly cropped or speed-changed copies, and those with less than LEAST seconds in common.
Prints a line for each pair; exit status 1 if there is any.
"""

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from data_prep.filters import Rejected
from data_prep.index import write_lines
from data_prep.workers import WorkerPool
from vidssl.core.errors import UserError, run_cli
from vidssl.data.decoding import open_video
from vidssl.data.format import dumps
from vidssl.data.isolation import Reporter
from vidssl.data.shards import Sample, Shards

RATE = 8.0  # looks a second
FLAT = 4.0  # grey levels: the standard deviation of a picture, below which it has no contrast
NEAR = 10  # bits of 64
BUCKET = 4096  # looks of one bucket that are compared; of a fuller one so many, evenly spread
SHARE, MOST = 0.2, 10  # of the looks of the shorter video, and at least 2 (1 of an image); training videos
SPAN, AROUND = (
    30.0,
    10.0,
)  # seconds of the test video that are compared, and of the training video before and after
FINE = 24.0  # thumbnails a second
ALIKE = 0.88  # correlation of what moves
LEAST = 0.75  # seconds
STILL = 0.5  # grey levels: the standard deviation in time
SAME = 6.0  # bits of 64
_DCT = np.cos(
    np.pi / 32 * (np.arange(32) + 0.5) * np.arange(8)[:, None]
)  # [8,32], the eight lowest frequencies
_BITS = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)


Heartbeat = Callable[[], None]


class Fingerprint(NamedTuple):
    """digest: of the file's bytes. hashes u64 [n]; numbers i32 [n]: at which look, so the time is numbers / RATE."""

    digest: bytes
    hashes: np.ndarray
    numbers: np.ndarray


class Pair(NamedTuple):
    """A training video that may be the test video. shift: seconds by which it is later in the training video."""

    test: int
    train: int
    votes: int
    at: float  # seconds in the test video, the middle of the votes
    shift: float
    bits: float  # mean over the votes


def phash(grey: np.ndarray) -> np.ndarray:
    """Grey pictures [n,32,32] -> u64 [n]: which of the 8x8 lowest DCT coefficients are above their median: the pHash of
    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), first row and column included.
    """
    low = (_DCT @ grey.astype(np.float64) @ _DCT.T).reshape(len(grey), 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Differing bits (0..64) of u64 [n] and u64 [n]."""
    return _BITS[np.bitwise_xor(a, b)[:, None].view(np.uint16)].sum(1, dtype=np.int64)


def nothing() -> None:
    pass


def grey(video: Any, indices: np.ndarray, side: int, alive: Heartbeat) -> np.ndarray:
    """Frames at `indices`, as u8 [n,side,side]; decoded in one pass, one held at a time."""
    wanted, back = np.unique(indices, return_inverse=True)
    out = np.empty((len(wanted), side, side), np.uint8)
    for i, frame in enumerate(video.iter_frames(wanted)):
        out[i] = np.asarray(Image.fromarray(frame).convert("L").resize((side, side), Image.Resampling.BOX))
        if i % 32 == 0:
            alive()
    return out[back]


def fingerprint(data: bytes, ext: str, meta: dict | None, alive: Heartbeat = nothing) -> Fingerprint:
    """Look at the frame that is shown at 0, 1 / RATE, 2 / RATE, ... seconds. alive: called now and then."""
    with open_video(data, ext, meta) as video:
        alive()
        when = np.arange(0.0, video.times[-1] + 1e-6, 1 / RATE)
        pictures = grey(video, np.searchsorted(video.times, when + 1e-6, side="right") - 1, 32, alive)
    keep = np.flatnonzero(pictures.std((1, 2)) >= FLAT)
    return Fingerprint(sha256(data).digest(), phash(pictures)[keep], keep.astype(np.int32))


class Table:
    """The looks of the training set in four tables of 65,536 buckets, 32 bytes a look."""

    def __init__(self, looks: list[Fingerprint | None]):
        full = [x or Fingerprint(b"", np.empty(0, np.uint64), np.empty(0, np.int32)) for x in looks]
        self.lengths = np.array([len(x.hashes) for x in full])
        self.video = np.repeat(np.arange(len(full), dtype=np.int32), self.lengths)
        self.hashes = np.concatenate([x.hashes for x in full])
        self.numbers = np.concatenate([x.numbers for x in full])
        quarters = self.hashes[:, None].view(np.uint16)
        self._order = [np.argsort(q, kind="stable").astype(np.int32) for q in quarters.T]
        self._ends = [np.cumsum(np.bincount(q, minlength=1 << 16)) for q in quarters.T]

    def near(self, hashed: np.ndarray) -> np.ndarray:
        """hashed: a u64. The looks i64 [n] that differ by at most NEAR bits, as far as a bucket shows them."""
        found = []
        for q, order, ends in zip(
            hashed.reshape(1, 1).view(np.uint16)[0], self._order, self._ends, strict=True
        ):
            bucket = order[ends[q - 1] if q else 0 : ends[q]]
            if len(bucket) > BUCKET:
                bucket = bucket[np.linspace(0, len(bucket) - 1, BUCKET).astype(int)]
            found.append(bucket[distance(self.hashes[bucket], np.full(len(bucket), hashed)) <= NEAR])
        return np.unique(np.concatenate(found))

    def pairs(self, test: int, looks: Fingerprint) -> list[Pair]:
        """The training videos that are worth comparing, the likeliest first."""
        hits = [self.near(h) for h in looks.hashes]
        which = np.repeat(np.arange(len(hits)), [len(h) for h in hits])
        if not len(which):
            return []
        there = np.concatenate(hits)
        bits = distance(looks.hashes[which], self.hashes[there])
        shifts = self.numbers[there].astype(np.int64) - looks.numbers[which]
        keys, counts = np.unique(
            self.video[there].astype(np.int64) << 32 | (shifts + (1 << 31)), return_counts=True
        )
        order = np.lexsort((-counts, keys >> 32))
        order = order[np.diff(keys[order] >> 32, prepend=-1) > 0]  # the most frequent shift of each video
        out = []
        for key in keys[order[np.argsort(-counts[order], kind="stable")[: 4 * MOST]]].tolist():
            video, shift = key >> 32, (key & 0xFFFFFFFF) - (1 << 31)
            of = self.video[there] == video
            voted = of & (np.abs(shifts - shift) <= 1)
            votes = len(np.unique(which[voted]))
            short = min(len(looks.hashes), self.lengths[video])
            if votes >= max(min(2, short), SHARE * short):
                at = float(np.median(looks.numbers[which[voted]])) / RATE
                mean = float(bits[of & (shifts == shift)].mean())
                out.append(Pair(test, video, votes, at, shift / RATE, mean))
        return sorted(out, key=lambda p: (-p.votes, p.bits))[:MOST]


class File(NamedTuple):
    data: bytes
    ext: str
    meta: dict | None = None


def moving(file: File, start: float, end: float, alive: Heartbeat) -> tuple[float, np.ndarray]:
    """From the first frame after `start` to the last before `end` (seconds): its time, and 8x8 thumbnails f32 [n,64],
    FINE a second, linear in between those of the frames."""
    with open_video(*file) as video:
        indices = np.flatnonzero((video.times >= start) & (video.times <= end))
        if len(indices) < 2:
            return 0.0, np.zeros((0, 64), np.float32)
        times = video.times[indices]
        thumbs = grey(video, indices, 8, alive).reshape(-1, 64).astype(np.float32)
    when = np.arange(times[0], times[-1] + 1e-6, 1 / FINE)
    before = np.searchsorted(times, when, side="right").clip(1, len(times) - 1) - 1
    part = ((when - times[before]) / (times[before + 1] - times[before])).astype(np.float32)[:, None]
    return float(times[0]), thumbs[before] * (1 - part) + thumbs[before + 1] * part


def align(train: np.ndarray, test: np.ndarray) -> tuple[float, int, int]:
    """Thumbnails f32 [n,64], [m,64]: the best correlation of what moves, its shift and the number of common thumbnails
    (-1, 0, 0: too few)."""
    best, need = (-1.0, 0, 0), max(LEAST * FINE, min(len(train), len(test)) / 2)
    for shift in range(-len(test), len(train)):
        first, last = max(0, -shift), min(len(test), len(train) - shift)
        if last - first >= need:
            a, b = train[first + shift : last + shift], test[first:last]
            a, b = a - a.mean(0), b - b.mean(0)
            value = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-9))
            best = max(best, (value, shift, last - first))
    return best


def compare(pair: Pair, test: File, train: File, alive: Heartbeat = nothing) -> dict | None:
    """What is written of a pair, or None if it is not the same video."""
    told = {"bits": round(pair.bits, 2), "shift": pair.shift}
    start, end = pair.at - SPAN / 2, pair.at + SPAN / 2
    t0, b = moving(test, start, end, alive)
    s0, a = moving(train, start + pair.shift - AROUND, end + pair.shift + AROUND, alive)
    if not len(a) or not len(b) or min(a.std(0).mean(), b.std(0).mean()) < STILL:
        return {**told, "why": "still pictures"} if pair.bits <= SAME else None
    alike, shift, common = align(a, b)
    if alike < ALIKE:
        return None
    told["shift"] = round(shift / FINE + s0 - t0, 2)
    return {**told, "why": "pictures", "alike": round(alike, 4), "seconds": round(common / FINE, 2)}


def fingerprint_job(
    read: Callable[[Any], File], report: Reporter, what: Literal["fingerprint", "compare"], *args: Any
) -> Fingerprint | dict | None:
    """In a child process: ("fingerprint", place), or ("compare", pair, test place, training place).

    read: place -> the file there.
    """
    if what == "fingerprint":
        return fingerprint(*read(args[0]), report.progress)
    pair, test, train = args
    return compare(pair, read(test), read(train), report.progress)


class ShardFiles:
    """Reads the samples of several data sets: ("train" or "test", sample) -> its file."""

    def __init__(self, shards: dict[str, Shards]):
        self.shards = shards

    def __call__(self, place: tuple[str, Sample]) -> File:
        kind, sample = place
        return File(self.shards[kind].read(sample), sample.ext, sample.meta)


def find(
    train: Shards, test: Shards, workers: int, timeout: float, job: Callable[..., Any] = fingerprint_job
) -> Iterator[dict]:
    """A line for each pair, in the order of TEST; before them one for each video or pair that cannot be decoded.

    timeout: seconds without progress until a video counts as hanging. job: replaces `fingerprint_job` in tests.
    """
    samples = {"train": train.all(), "test": test.all()}
    pool = WorkerPool(partial(job, ShardFiles({"train": train, "test": test})), timeout)
    with closing(pool):
        looks: dict[str, list[Fingerprint | Rejected]] = {}
        for kind, videos in samples.items():
            jobs: list[tuple] = [("fingerprint", (kind, sample)) for sample in videos]
            looks[kind] = pool.map(jobs, workers, f"look at {kind}", "videos")
        table = Table([x if isinstance(x, Fingerprint) else None for x in looks["train"]])
        digests = defaultdict(list)
        for i, seen in enumerate(looks["train"]):
            if isinstance(seen, Fingerprint):
                digests[seen.digest].append(i)
        found: dict[int, list[tuple[int, dict]]] = defaultdict(list)
        pairs: list[Pair] = []
        for i, seen in enumerate(looks["test"]):
            if isinstance(seen, Fingerprint) and seen.digest in digests:
                found[i] = [(j, {"why": "bytes"}) for j in digests[seen.digest]]
            elif isinstance(seen, Fingerprint):
                pairs += table.pairs(i, seen)
        jobs = [
            ("compare", p, ("test", samples["test"][p.test]), ("train", samples["train"][p.train]))
            for p in pairs
        ]
        compared = pool.map(jobs, workers, "compare", "videos")
    for kind, videos in samples.items():
        for sample, seen in zip(videos, looks[kind], strict=True):
            if isinstance(seen, Rejected):
                yield {kind: sample.key, "why": "cannot be decoded", "reason": seen.reason}
    for pair, result in zip(pairs, compared, strict=True):
        if isinstance(result, Rejected):
            both = f"{samples['test'][pair.test].key} and {samples['train'][pair.train].key}"
            yield {"pair": both, "why": "cannot be compared", "reason": result.reason}
        elif result is not None:
            found[pair.test].append((pair.train, result))
    for i in sorted(found):
        best = max((told["alike"] for _, told in found[i] if "alike" in told), default=1.0)
        for j, told in found[i]:
            if 1 - told.get("alike", 1.0) <= 2 * (1 - best) + 0.01:
                names = {"test": samples["test"][i].key, "train": samples["train"][j].key}
                yield {**names, **told}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.leaks", description=__doc__.split("\n")[0])
    parser.add_argument("train", help="a packed data set, a folder or address")
    parser.add_argument("test", help="another")
    parser.add_argument("--out", type=Path, help="where to write the pairs, a line of JSON each")
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
    lines = list(find(train, test, args.workers, args.timeout))
    if args.out:
        write_lines(args.out, map(dumps, lines))
    leaks = [line for line in lines if "test" in line and "train" in line]
    for line in leaks:
        print(
            f"{line['test']} is {line['train']}: {dumps({k: v for k, v in line.items() if k not in ('test', 'train')})}"
        )
    n = len({line["test"] for line in leaks})
    print(
        f"{n} of {test.n} test videos are among the {train.n} of {args.train}; {len(lines) - len(leaks)} not decoded"
    )
    if leaks:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)

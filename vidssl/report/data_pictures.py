"""Pictures of packed data sets: playing clips of all classes, rejected files, near duplicates, leaks.

Files are decoded in a child process with a deadline, since a data set may hold any; the page says how many of
how many are shown.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.filters import Rejected
from data_prep.fingerprint import MediaFile
from data_prep.sample_search import SampleSearch, SimilarPair, search_samples
from data_prep.workers import WorkerPool
from vidssl.data.decoding import open_video
from vidssl.data.isolation import Reporter
from vidssl.data.shards import Sample, Shards
from vidssl.pictures.strips import FPS, Group, fitted_frames, group, item, short_name, strip
from vidssl.report.data_sets import DataSet
from vidssl.report.run_files import Row

CLIPS = 48  # of all data sets of a page
LEAST_CLIPS = 8  # of a data set
SHOWN_FRAMES = 12
SHOWN_PAIRS = 10  # duplicates, and leaks
SHOWN_OF_ONE = 3  # pairs with the same kept file
SHOWN_OF_REASON = 4  # rejected files of each reason whose decoding is tried
MAX_FILE_BYTES = 500_000_000  # of a rejected file that is opened
DECODE_TIMEOUT_S = 20.0  # without progress
GOLDEN = 0.618  # multiples of it, without their whole part, are spread over 0..1
Search = Literal["some", "all", "none"]


class ClipRequest(NamedTuple):
    """SHOWN_FRAMES frames, FPS a second, that a child process decodes."""

    where: tuple[str, Sample] | str  # name of a data set and a sample, or the path of a file
    start: float | None = None  # seconds; None: the middle


class DecodedClip(NamedTuple):
    """Small frames u8 [T, H, W, 3] and what the file is."""

    frames: np.ndarray
    text: str


class ClipJob:
    """Work of a child process: a request -> DecodedClip. shards: by the name of their data set."""

    def __init__(self, shards: dict[str, Shards]):
        self.shards = shards

    def __call__(self, report: Reporter, request: ClipRequest) -> DecodedClip:
        if isinstance(request.where, str):
            path = Path(request.where)
            file = MediaFile(path.read_bytes(), path.suffix.lstrip(".").lower())
        else:
            name, sample = request.where
            file = MediaFile(self.shards[name].read(sample), sample.ext, sample.meta)
        with open_video(*file) as video:
            report.progress()
            last = float(video.times[-1])
            middle = max(0.0, (last - SHOWN_FRAMES / FPS) / 2)
            start = middle if request.start is None else min(request.start, last)
            times = start + np.arange(min(SHOWN_FRAMES, int(FPS * (last - start)) + 1)) / FPS
            indices = (np.searchsorted(video.times, times + 1e-6, side="right") - 1).clip(0)
            frames = [fitted_frames(frame[None])[0] for frame in video.iter_frames(np.unique(indices))]
            height, width = video.size
            rate = f", {(len(video) - 1) / last:.3g} fps" if last > 0 else ""
        places = np.unique(indices, return_inverse=True)[1]
        text = f"{width}×{height}{rate}, {last:.1f} s" if last > 0 else f"{width}×{height}"
        return DecodedClip(np.stack(frames)[places], text)


class DataPictures:
    """Draws the pictures of data sets. source: the folder that was packed, whose rejected files are shown."""

    def __init__(self, search: Search = "some", source: Path | None = None, workers: int | None = None):
        self.search = search
        self.source = source
        self.workers = workers or min(4, os.cpu_count() or 1)

    def __call__(self, sets: Sequence[DataSet]) -> list[Group]:
        """The groups of a page, each with what is missing in it. Those of a search have "found": figures."""
        shards = {one.name: one.shards for one in sets if one.shards is not None}
        found = None
        if self.search != "none" and shards:
            is_whole = self.search == "all"
            samples = {one.name: one.samples if is_whole else one.opened for one in sets if one.shards}
            limits = {} if self.search == "some" else {"pixels": np.inf, "compared_pixels": np.inf}
            found = search_samples(shards, samples, self.workers, **limits)
        with closing(WorkerPool(ClipJob(shards), DECODE_TIMEOUT_S)) as pool:
            decode = partial(decode_requests, pool, self.workers)
            groups = [clips_group(sets, decode), rejected_group(sets, self.source, decode)]
            groups += duplicate_groups(sets, found, self.source, decode)
        return [one for one in groups if one["items"] or one["missing"] or one.get("found")]


def decode_requests(
    pool: WorkerPool, workers: int, requests: Sequence[ClipRequest]
) -> list[DecodedClip | Rejected]:
    return pool.map([(request,) for request in requests], workers, "decode", "clips") if requests else []


def clips_group(sets: Sequence[DataSet], decode: Any) -> Group:
    """A card of playing clips for each data set."""
    found = group("clips", "Clips", "Two seconds from the middle of each, as a training decodes them.")
    number = max(LEAST_CLIPS, CLIPS // max(1, len(sets)))
    for one in sets:
        chosen = spread_over_classes(one.opened, number)
        clips = decode([ClipRequest((one.name, sample)) for sample in chosen])
        strips = []
        for sample, clip in zip(chosen, clips, strict=True):
            name = source_name(sample)
            if isinstance(clip, Rejected):
                found["missing"].append(f"{one.name}: {name} does not decode ({clip.reason}).")
                continue
            strips.append(strip(label_of(one, sample), clip.frames, note=f"{name}, {clip.text}"))
        if strips:
            about = f"{len(strips)} of {one.size:,} samples: one of each class in turn, then evenly spaced."
            found["items"].append({**item(one.name, about, strips), "wide": True})
    return found


def spread_over_classes(samples: Sequence[Sample], number: int) -> list[Sample]:
    """At most `number` samples, evenly spaced in each class, the classes of all label sets in turn."""
    by_class: dict[tuple[str, Any], list[Sample]] = defaultdict(list)
    for sample in samples:
        labels = sample.meta.get("labels") or {}
        first = next(
            ((name, str(value)) for name, value in labels.items() if value not in (-1, [])), ("", "")
        )
        by_class[first].append(sample)
    # Samples without a label come last
    classes = sorted(by_class, key=lambda one: (one[0] == "", one))
    order = [shuffled_evenly(by_class[one], i * GOLDEN) for i, one in enumerate(classes)]
    chosen: list[Sample] = []
    for turn in range(max(map(len, order), default=0)):
        chosen += [members[turn] for members in order if turn < len(members)]
        if len(chosen) >= number:
            break
    return chosen[:number]


def shuffled_evenly(members: Sequence[Sample], shift: float) -> list[Sample]:
    """All of them, any first few of which are spread: the middle one, those between it and the ends, and so
    on. shift: fraction by which these places are moved, so that the first ones of classes lie apart."""
    bits = len(members).bit_length()
    numbers = [int(f"{i:0{bits}b}"[::-1], 2) for i in (*range(1, 1 << bits), 0)]
    places = dict.fromkeys(int((number / (1 << bits) + shift) % 1 * len(members)) for number in numbers)
    return [members[i] for i in places]


def source_name(sample: Sample) -> str:
    return short_name(Path(str(sample.meta.get("source") or sample.key)).name)


def label_of(one: DataSet, sample: Sample) -> str:
    """The classes of a sample by their names."""
    classes = one.shards.classes if one.shards else {}
    names = []
    for label_set, value in (sample.meta.get("labels") or {}).items():
        numbers = value if isinstance(value, list) else [value]
        known = classes.get(label_set, [])
        names += [known[n] for n in numbers if isinstance(n, int) and 0 <= n < len(known)]
    return ", ".join(names) or "no label"


def rejected_group(sets: Sequence[DataSet], source: Path | None, decode: Any) -> Group:
    """Pictures of rejected files that decode, by reason."""
    found = group("rejected-files", "Rejected files that decode", "")
    records = [(one, record) for one in sets for record in one.rejected if record["reason"] != "duplicate"]
    if not records:
        return found
    if source is None:
        found["missing"].append("With --source FOLDER, the folder that was packed, rejected files are shown.")
        return found
    by_reason: dict[str, list[Row]] = defaultdict(list)
    for _, record in records:
        by_reason[record["reason"]].append(record)
    for reason, own in by_reason.items():
        tried = [(record, path) for record in own if (path := file_in(source, record["path"]))][
            :SHOWN_OF_REASON
        ]
        clips = decode([ClipRequest(str(path), record.get("start")) for record, path in tried])
        strips = [
            strip(
                short_name(Path(record["path"]).name),
                clip.frames,
                note=f"{record.get('detail') or ''} {clip.text}".strip(),
            )
            for (record, _), clip in zip(tried, clips, strict=True)
            if isinstance(clip, DecodedClip)
        ]
        if strips:
            about = f"{len(strips)} of {len(tried)} files that were tried, of {len(own):,}."
            found["items"].append(item(reason, about, strips, columns=2))
    if not found["items"]:
        found["missing"].append(f"None of the rejected files that were tried in {source} decodes.")
    return found


def file_in(source: Path, name: str) -> Path | None:
    """A file of a folder; None if it is not there, is too large, or lies elsewhere."""
    path = source / name
    inside = path.resolve().is_relative_to(source.resolve())
    is_small = inside and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
    return path if is_small else None


def duplicate_groups(
    sets: Sequence[DataSet], found: SampleSearch | None, source: Path | None, decode: Any
) -> Iterable[Group]:
    """Near duplicates within data sets, and leaks between them."""
    duplicates = group(
        "duplicates", "Near duplicates", "Videos of one data set that show the same, side by side."
    )
    dropped = [(one, record) for one in sets for record in one.rejected if record["reason"] == "duplicate"]
    add_dropped(duplicates, dropped, source, decode)
    if found is None:
        yield duplicates
        return
    by_name = {one.name: one for one in sets}
    leaks = group(
        "leaks", "Leaks between sets", "Videos of one data set that are in another one, side by side."
    )
    own = [pair for pair in found.pairs if pair.kind == "duplicate"]
    other = [pair for pair in found.pairs if pair.kind == "leak"]
    searched = ", ".join(f"{n:,} of {by_name[name].size:,} of {name}" for name, n in found.searched.items())
    for one, pairs in ((duplicates, own), (leaks, other)):
        before = len(one["items"])
        add_pairs(one, pairs, by_name, decode)
        number = len(one["items"]) - before
        shown = f"{number} of {len(pairs):,} pairs are shown." if pairs else "None was found in the shards."
        one["about"] += f" Compared: {searched}. {shown}"
    if any(by_name[name].size > n for name, n in found.searched.items()):
        duplicates["missing"].append("The others were not searched: --search all compares every video.")
    if found.undecodable:
        duplicates["missing"].append(f"{found.undecodable:,} videos do not decode, and were not compared.")
    counts = {name: sum(pair.later.name == name for pair in own) for name in found.searched}
    facts = {"searched": found.searched, "undecided": found.undecided}
    yield {**duplicates, "found": {**facts, "pairs": counts}}
    if len(sets) > 1:
        yield {**leaks, "found": {**facts, "pairs": len(other)}}


def add_dropped(
    found: Group, dropped: Sequence[tuple[DataSet, Row]], source: Path | None, decode: Any
) -> None:
    """Shows files that pack dropped beside those that it kept."""
    if not dropped:
        return
    if source is None:
        found["missing"].append(
            f"pack dropped {len(dropped):,} duplicates, which the table of rejected files names; with "
            "--source FOLDER, the folder that was packed, they are shown beside those that are kept."
        )
        return
    rows: list[SideBySide] = []
    times: Counter[str] = Counter()
    for _, record in dropped:
        kept = str(record.get("duplicate_of") or record.get("detail", "").removeprefix("the same bytes as "))
        paths = [file_in(source, name) for name in (kept, record["path"])]
        if not all(paths) or len(rows) == SHOWN_PAIRS or times[kept] == SHOWN_OF_ONE:
            continue
        times[kept] += 1
        starts = common_start(record.get("shift") or 0.0)
        requests = [ClipRequest(str(path), start) for path, start in zip(paths, starts, strict=True)]
        names = [short_name(Path(name).name) for name in (kept, record["path"])]
        title = f"Dropped by pack: {match_text(record)}"
        rows.append(SideBySide(title, ("kept", "dropped"), (names[0], names[1]), (requests[0], requests[1])))
    found["items"] += side_by_side(rows, decode)


def add_pairs(found: Group, pairs: Sequence[SimilarPair], sets: dict[str, DataSet], decode: Any) -> None:
    """Shows the pairs of a search."""
    rows = []
    for pair in varied(pairs):
        first, second = pair.earlier, pair.later
        labels = [f"{one.name}: {label_of(sets[one.name], one.sample)}" for one in (first, second)]
        starts = common_start(pair.match.get("shift") or 0.0)
        requests = (ClipRequest(first, starts[0]), ClipRequest(second, starts[1]))
        names = (source_name(first.sample), source_name(second.sample))
        rows.append(SideBySide(match_text(pair.match), (labels[0], labels[1]), names, requests))
    found["items"] += side_by_side(rows, decode)


class SideBySide(NamedTuple):
    """Two clips that are shown together."""

    title: str
    labels: tuple[str, str]
    names: tuple[str, str]  # of their files
    requests: tuple[ClipRequest, ClipRequest]


def side_by_side(rows: Sequence[SideBySide], decode: Any) -> list[Row]:
    """Players of the pairs of which both decode."""
    clips = decode([request for row in rows for request in row.requests])
    items = []
    for i, row in enumerate(rows):
        both = [clip for clip in clips[2 * i : 2 * i + 2] if isinstance(clip, DecodedClip)]
        if len(both) == 2:
            # As long as the shorter one, so that they stay in step
            length = min(len(clip.frames) for clip in both)
            strips = [
                strip(label, clip.frames[:length], note=f"{name}, {clip.text}")
                for label, name, clip in zip(row.labels, row.names, both, strict=True)
            ]
            items.append(item(row.title, "", strips, columns=2))
    return items


def varied(pairs: Sequence[SimilarPair]) -> list[SimilarPair]:
    """The first pairs, of which no more than SHOWN_OF_ONE have the same earlier video."""
    times: Counter[str] = Counter()
    shown = []
    for pair in pairs:
        times[pair.earlier.sample.key] += 1
        if times[pair.earlier.sample.key] <= SHOWN_OF_ONE:
            shown.append(pair)
    return shown[:SHOWN_PAIRS]


def common_start(shift: float) -> tuple[float, float]:
    """Times in the earlier and the later video at which both show the same. shift: seconds, the time in the
    earlier minus that in the later."""
    return max(0.0, shift), max(0.0, -shift)


def match_text(record: Row) -> str:
    """How alike two videos are."""
    if "correlation" not in record:
        return {"bytes": "the same bytes", "still pictures": "little moves, pictures alike"}.get(
            str(record.get("match", "bytes")), "the same pictures"
        )
    text = f"correlation {record['correlation']:.3f} over {record['overlap']:.1f} s"
    return text + (f", {abs(record['shift']):.2f} s apart" if abs(record["shift"]) >= 0.05 else "")

"""What the page of packed data sets shows, as plain data: what pack and scan wrote, read without torch."""

import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

import vidssl
from data_prep.index import Contents
from data_prep.report import make_report
from vidssl.core.errors import UserError
from vidssl.core.suggestions import counted
from vidssl.data.addresses import ShardError, join, without_query
from vidssl.data.format import read_index
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.comparison import short_names
from vidssl.pictures.strips import Group
from vidssl.report.run_files import Row, read_json

MAX_RECORDS = 200_000  # samples of a data set whose records are read; of a larger one those of some shards
MAX_REJECTED = 100_000  # records of rejected.jsonl that are read
EXAMPLES = 5  # rejected files of each reason that are named
MAX_CLASSES = 1000  # of a label set that the page holds
BESIDE = ("report.json", "summary.json", "rejected.jsonl")  # what pack writes beside the shards
MAX_BESIDE_BYTES = 256 << 20  # of one of these, from a server
FETCHED_BYTES = 500_000_000  # of a remote data set whose videos are opened: the shards of at most so many
Address = Path | str  # str: of a remote data set
DrawSets = Callable[[Sequence["DataSet"]], list[Group]]


@dataclass
class DataSet:
    """A packed or scanned data set as its files describe it."""

    name: str
    address: str  # as it may be shown: a signature is left out
    index: Row
    report: Row  # as report.json
    summary: Row  # as summary.json; {}: there is none
    rejected: list[Row]  # records of rejected.jsonl
    shards: Shards | None  # None: it has no sample
    samples: list[Sample]
    opened: list[Sample]  # those whose videos may be opened: of a remote data set some
    missing: list[str] = field(default_factory=list)  # sentences

    @property
    def size(self) -> int:
        """Number of its samples; `samples` may be a part of them."""
        return int(self.report.get("samples") or 0)

    @property
    def is_scanned(self) -> bool:
        """Whether nobody has opened its videos."""
        return "plan" not in (self.index.get("pack") or {})


def find_sets(folders: Sequence[Address]) -> list[DataSet]:
    """The data sets at addresses, and in folders or below them, the largest first. Raises UserError if there
    is none in one."""
    found: list[Address] = []
    for folder in folders:
        if isinstance(folder, str):
            found.append(folder)
            continue
        inside = sorted(path.parent for path in folder.rglob("index.json"))
        if not inside:
            raise UserError(
                f"{folder}: no index.json in it or below it; other WebDataset shards need vidssl scan"
            )
        found += inside
    found = list(dict.fromkeys(found))
    names = short_names([Path(shown(folder)) / "index.json" for folder in found])
    sets = [read_set(folder, name) for folder, name in zip(found, names, strict=True)]
    return sorted(sets, key=lambda one: -one.size)


def shown(folder: Address) -> str:
    """An address as a page may show it."""
    return without_query(str(folder))


def read_set(folder: Address, name: str) -> DataSet:
    """Reads the files beside the shards. What pack has counted is not counted again."""
    missing: list[str] = []
    index = read_index(folder)
    shards = Shards([str(folder)]) if index.get("samples") else None
    samples = [] if shards is None else sampled_records(shards, missing)
    with files_beside(folder) as beside:
        report = read_json(beside / "report.json")
        rejected = read_rejected(beside / "rejected.jsonl", missing)
        summary = read_json(beside / "summary.json")
    if report is None and sum(entry["samples"] for entry in index["shards"]) > MAX_RECORDS:
        missing.append("report.json is not there, and there are too many samples to count them for a page.")
        report = {"samples": index.get("samples"), "bytes_out": sum(e["bytes"] for e in index["shards"])}
    elif report is None:
        report = make_report(Contents(index, [sample._asdict() for sample in samples], rejected))
    if summary is None:
        missing.append(
            "There is no summary.json, which tells of groups, repaired times and what was left out."
        )
    opened = samples if shards is None or isinstance(folder, Path) else fetched(shards, samples, missing)
    found = DataSet(
        name, shown(folder), index, report, summary or {}, rejected, shards, samples, opened, missing
    )
    if found.is_scanned and not report.get("frames"):
        missing.append("vidssl scan opens no video: durations, sizes and frame rates are not known.")
    return found


@contextmanager
def files_beside(folder: Address) -> Iterator[Path]:
    """The folder of what pack wrote beside the shards; of a remote data set one with copies."""
    if isinstance(folder, Path):
        yield folder
        return
    from vidssl.data.remote import fetch_small  # aiohttp takes a third of a second

    with tempfile.TemporaryDirectory() as copies:
        for name in BESIDE:
            # The page says what is not there
            with suppress(ShardError):
                (Path(copies) / name).write_bytes(fetch_small(join(folder, name), MAX_BESIDE_BYTES))
        yield Path(copies)


def fetched(shards: Shards, samples: list[Sample], missing: list[str]) -> list[Sample]:
    """The samples of evenly spaced shards of FETCHED_BYTES, at least of one: with a video its whole shard is
    fetched."""
    number = max(1, int(FETCHED_BYTES / max(shards.sizes.tolist())))
    if number >= len(shards.sizes):
        return samples
    chosen = spread_numbers(len(shards.sizes), number)
    missing.append(
        f"The data set is remote: videos are of {counted(len(chosen), 'shard')} of {len(shards.sizes):,}, "
        "which were fetched."
    )
    return [sample for sample in samples if sample.shard in chosen]


def spread_numbers(count: int, number: int) -> list[int]:
    """At most `number` numbers from 0 to count - 1."""
    return np.unique(np.linspace(0, count - 1, number).round().astype(int)).tolist()


def sampled_records(shards: Shards, missing: list[str]) -> list[Sample]:
    """The samples, or those of evenly spaced shards where there are too many."""
    counts = shards.counts.tolist()
    if shards.n <= MAX_RECORDS:
        return shards.list_samples()
    wanted = max(1, int(MAX_RECORDS / max(counts)))
    chosen = spread_numbers(len(counts), wanted)
    missing.append(f"Clips and groups are of {counted(len(chosen), 'shard')} of {len(counts):,}.")
    return [shards.sample(shard, i) for shard in chosen for i in range(counts[shard])]


def read_rejected(path: Path, missing: list[str]) -> list[Row]:
    """The records of rejected.jsonl, none if there is no such file."""
    if not path.is_file():
        return []
    records: list[Row] = []
    with open(path, "rb") as file:
        for line in file:
            if len(records) == MAX_REJECTED:
                missing.append(f"Of rejected.jsonl the first {MAX_REJECTED:,} lines are read.")
                break
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and {"path", "reason"} <= record.keys():
                records.append(record)
    return records


def make_data_contents(
    folders: Sequence[Address], command: Sequence[str], draw: DrawSets | None = None
) -> dict[str, Any]:
    """The whole page of data sets. draw: makes its pictures and searches for copies; None: there are none."""
    from vidssl.report.data_verdicts import verdicts_between, verdicts_of_set

    sets = find_sets(folders)
    pictures = [] if draw is None else draw(sets)
    facts = {group["id"]: group.get("found") for group in pictures}
    return {
        "title": ", ".join(Path(shown(folder)).resolve().name for folder in folders[:4]),
        "made": datetime.now().isoformat(" ", "seconds"),
        "version": vidssl.__version__,
        "command": shlex.join(map(shown, command)),
        "panels": [],
        "runs": [],
        "zoos": [],
        "sets": [
            {
                "name": one.name,
                "path": one.address,
                "facts": facts_of_set(one),
                "verdicts": [verdict._asdict() for verdict in verdicts_of_set(one, facts.get("duplicates"))],
                "missing": one.missing,
            }
            for one in sets
        ],
        "between": [verdict._asdict() for verdict in verdicts_between(sets, facts.get("leaks"))],
        "rejected": [row for one in sets for row in rejected_rows(one)],
        "data": [{"name": one.name, "report": page_report(one.report)} for one in sets],
        "pictures": pictures,
    }


def facts_of_set(one: DataSet) -> list[list[str]]:
    """What a data set is, in a few words."""
    report = one.report
    summary = one.summary
    made = one.index.get("pack") or {}
    seconds = report.get("seconds") or 0
    videos = summary.get("videos", one.size)
    images = summary.get("images", 0)
    kinds = [
        text
        for n, text in ((videos, counted_text(videos, "video")), (images, counted_text(images, "image")))
        if n
    ]
    groups = summary.get("groups")
    encode = made.get("encode")
    facts = [
        [
            "holds",
            f"{', '.join(kinds)} of {report['files']:,} files" if "files" in report else ", ".join(kinds),
        ],
        ["hours", f"{seconds / 3600:,.2f}" if seconds else ""],
        ["codecs", ", ".join(f"{name} {n:,}" for name, n in (report.get("codec") or {}).items())],
        ["size", bytes_text(report)],
        [
            "label sets",
            ", ".join(f"{name} ({len(sizes)})" for name, sizes in (report.get("classes") or {}).items()),
        ],
        ["groups", f"{groups:,}, the largest of {summary['largest_group']:,} samples" if groups else "none"],
        ["made by", "vidssl scan" if one.is_scanned else "vidssl pack"],
        [
            "encoded",
            ", ".join(f"{key} {value}" for key, value in encode.items() if value)
            if encode
            else "as the source",
        ],
        [
            "filters",
            ", ".join(f"{key} {value:g}" for key, value in (made.get("filters") or {}).items() if value),
        ],
    ]
    if one.is_scanned:
        facts = [fact for fact in facts if fact[0] != "encoded"]
    return [[name, text] for name, text in facts if text]


def counted_text(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def bytes_text(report: Row) -> str:
    size = f"{(report.get('bytes_out') or 0) / 1e6:,.1f} MB"
    bytes_in = report.get("bytes_in")
    return size if not bytes_in else f"{size} of {bytes_in / 1e6:,.1f} MB"


def page_report(report: Row) -> Row:
    """A report with at most MAX_CLASSES classes of each label set: the largest, and the smallest."""
    kept: Row = {}
    for label_set, sizes in (report.get("classes") or {}).items():
        ordered = sorted(sizes.items(), key=lambda size: -size[1])
        half = MAX_CLASSES // 2
        kept[label_set] = dict(ordered if len(ordered) <= MAX_CLASSES else ordered[:half] + ordered[-half:])
    return {**report, "classes": kept}


def rejected_rows(one: DataSet) -> list[Row]:
    """A row for each reason: how often, and examples."""
    counts = Counter({str(k): int(n) for k, n in (one.report.get("rejected") or {}).items()})
    counts = counts or Counter(str(record["reason"]) for record in one.rejected)
    rows = []
    for reason, n in counts.most_common():
        own = [record for record in one.rejected if record["reason"] == reason]
        rows.append(
            {
                "set": one.name,
                "reason": reason,
                "n": n,
                "meaning": REASONS.get(reason, ""),
                "examples": [[str(r["path"]), str(r.get("detail") or "")] for r in own[:EXAMPLES]],
            }
        )
    return rows


REASONS = {
    "no_video_stream": "The file has no video: sound or text alone.",
    "not_a_video": "The file is none that FFmpeg can open.",
    "no_frames": "A header without a single frame.",
    "decode_error": "Frames are damaged.",
    "empty": "The file has no byte.",
    "no_decoder": "No decoder is installed for its codec.",
    "encrypted": "The frames are encrypted.",
    "timeout": "Decoding made no progress.",
    "decoder_crash": "The decoder ended its process.",
    "too_large": "More than can be held in memory.",
    "unreadable": "The file could not be read from the disk.",
    "too_short": "Dropped by --min-seconds.",
    "too_small": "Dropped by --min-side.",
    "too_dark": "Dropped by --drop-dark.",
    "static": "Dropped by --drop-static: nothing moves.",
    "duplicate": "Dropped by --drop-duplicates: another file that is kept shows the same.",
}

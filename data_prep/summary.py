"""What pack and scan understood of their input: a few printed lines, and summary.json beside the shards."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.index import write_lines
from vidssl.core.suggestions import counted
from vidssl.data.extensions import IMAGE_EXTENSIONS, MEDIA_EXTENSIONS
from vidssl.data.metadata import group_in

EXAMPLES = 3  # names that are kept of each reason
NAME_LENGTH = 80  # characters of a name in a printed line
MAX_LINES = 12  # of reasons; media that are not read are always shown
UNREAD_IMAGES = {
    "heic", "heif", "hif", "avif", "avifs", "tif", "tiff", "jxl", "jp2", "j2k", "jpx", "jpe", "jfif", "tga",
    "psd", "svg", "exr", "hdr", "dds", "ico", "pgm", "ppm", "pnm", "pbm", "pcx", "dng", "cr2", "cr3", "nef",
    "arw", "orf", "rw2", "raf", "apng", "jls", "qoi", "dpx", "dcm", "eps", "wmf", "emf",
}  # fmt: skip
UNREAD_VIDEOS = {
    "mpe", "m1v", "m2v", "mpv", "m2p", "mp2v", "m4p", "3g2", "f4v", "mxf", "rm", "rmvb", "ogg", "ogm",
    "divx", "xvid", "dv", "qt", "y4m", "yuv", "ivf", "h263", "h264", "264", "avc", "h265", "265", "hevc",
    "av1", "obu", "nut", "wtv", "dvr-ms", "tp", "trp", "m2t", "mod", "tod", "amv", "bik", "roq", "swf",
    "flc", "insv", "lrv", "r3d", "mjpeg", "mjpg", "mk3d", "evo", "nsv",
}  # fmt: skip


class Tally(Counter[str]):
    """Counts files by reason and keeps the first names of each.

    Counter's own operators return a Counter without names.
    """

    def __init__(self, counts: Mapping[str, int] | None = None):
        super().__init__(counts or {})
        self.examples: dict[str, list[str]] = {}

    def note(self, reason: str, name: str | None = None, files: int = 1) -> None:
        """Counts `files` files of a reason, of which one is called `name`."""
        self[reason] += files
        names = self.examples.setdefault(reason, [])
        if name is not None and len(names) < EXAMPLES:
            names.append(printable(name))

    def merge(self, other: Mapping[str, int]) -> None:
        """Adds the counts of another tally, and its names if it has some."""
        for reason, files in other.items():
            names = other.examples.get(reason, []) if isinstance(other, Tally) else []
            self.note(reason, None, files)
            for name in names:
                self.note(reason, name, 0)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Returns reason -> count and examples, the most frequent first."""
        ordered = sorted(self.items(), key=lambda item: (-item[1], item[0]))
        return {reason: {"files": n, "examples": self.examples.get(reason, [])} for reason, n in ordered if n}


def count_rejected(records: Iterable[dict]) -> Tally:
    """Counts the records of rejected.jsonl by reason, with examples of paths."""
    tally = Tally()
    for record in records:
        tally.note(record["reason"], record["path"])
    return tally


def printable(name: str) -> str:
    """Returns a file name in one line of UTF-8: other bytes and control characters are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def make_summary(
    records: Iterable[dict], classes: Mapping[str, list[str]], left_out: Mapping[str, int]
) -> dict[str, Any]:
    """Returns the contents of summary.json.

    records: of the shards' .jsonl, with "label" and "labels". classes: label set -> names. left_out: reason
    -> number of files (or of members of shards) that are not in the data set; a Tally adds examples.
    """
    kinds: Counter[str] = Counter()
    sizes = {label_set: [0] * len(names) for label_set, names in classes.items()}
    groups: Counter[str] = Counter()
    unlabelled = Tally()
    repaired = Tally()
    shown = Tally()
    for record in records:
        meta = record["meta"]
        name = str(meta.get("source") or record["key"])
        kinds["images" if record["ext"] in IMAGE_EXTENSIONS else "videos"] += 1
        labels = meta.get("labels") or {}
        for label_set, counts in sizes.items():
            # Of several classes a sample, each counts.
            value = labels.get(label_set, -1)
            numbers = value if isinstance(value, list) else [value]
            known = [number for number in numbers if 0 <= number < len(counts)]
            for number in known:
                counts[number] += 1
            if not known:
                unlabelled.note(label_set, name)
        if (group := group_in(meta)) is not None:
            groups[group] += 1
        for reason, stamps in time_repairs(meta).items():
            repaired.note(reason, name, stamps)
        for fact in display_notes(meta):
            shown.note(fact, name)
    tally = left_out if isinstance(left_out, Tally) else Tally(left_out)
    samples = sum(kinds.values())
    return {
        "samples": samples,
        "videos": kinds["videos"],
        "images": kinds["images"],
        "classes": {
            label_set: dict(zip(classes[label_set], counts, strict=True))
            for label_set, counts in sizes.items()
        },
        "unlabelled": {name: unlabelled.entries()[name] for name in classes if unlabelled[name]},
        "groups": len(groups),
        "largest_group": max(groups.values(), default=0),
        "without_group": samples - sum(groups.values()),
        "time_repairs": repaired.entries(),
        "display": shown.entries(),
        "left_out": tally.entries(),
    }


def time_repairs(meta: Mapping[str, Any]) -> dict[str, int]:
    """Returns reason -> number of time stamps that were repaired in a sample's file."""
    repairs = meta.get("time_repairs") or (meta.get("original") or {}).get("time_repairs") or {}
    return {"repaired": repairs} if isinstance(repairs, int) else dict(repairs)


def display_notes(meta: Mapping[str, Any]) -> Iterator[str]:
    """Yields what a sample's file asks players to do beside turning and mirroring."""
    facts = meta.get("original") or meta
    if is_cut_short(meta):
        yield "segments that end beyond their file and are shorter for that"
    if facts.get("crop"):
        yield "cropped, as the file says"
    yield from facts.get("not_applied") or {}


def is_cut_short(meta: Mapping[str, Any]) -> bool:
    """Whether a clip is shorter than its start and end say, by more than half a second and two frames."""
    if "packed" not in meta or meta.get("end") is None or not meta["fps"]:  # pack measured them
        return False
    missing = meta["end"] - (meta.get("start") or 0.0) - meta["duration"]
    return bool(missing > max(0.5, 2 / meta["fps"]))


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json of a data set."""
    write_lines(folder / "summary.json", [json.dumps(summary, indent=1, ensure_ascii=False)])


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yields what a person should know of a data set, a line for each kind of fact."""
    yield f"  {counted(summary['videos'], 'video')}, {counted(summary['images'], 'image')}"
    if not any(summary["classes"].values()):
        yield "  no classes: no sample has a label"
    for label_set, sizes in summary["classes"].items():
        if sizes:
            yield f"  {label_set}: {_class_line(sizes)}"
    for label_set, entry in summary["unlabelled"].items():
        yield f"  without {label_set}: {counted(entry['files'], 'sample')}{_examples(entry)}"
    if summary["groups"]:
        without = (
            f"; {counted(summary['without_group'], 'sample')} in none" if summary["without_group"] else ""
        )
        largest = counted(summary["largest_group"], "sample")
        yield f"  groups: {summary['groups']}, the largest of {largest}{without}"
    for reason, entry in summary["time_repairs"].items():
        yield f"  time stamps {reason}: {entry['files']}{_examples(entry)}"
    for fact, entry in summary["display"].items():
        yield f"  {fact}: {entry['files']}{_examples(entry)}"
    yield from left_out_lines(summary["left_out"])


def left_out_lines(entries: Mapping[str, Mapping[str, Any]], title: str = "left out") -> Iterator[str]:
    """Yields a line for each reason. entries: as `Tally.entries` returns them."""
    shown = [reason for i, reason in enumerate(entries) if i < MAX_LINES or unread_hint(reason)]
    for reason in shown:
        entry = entries[reason]
        yield f"  {title}, {reason}{unread_hint(reason)}: {entry['files']}{_examples(entry)}"
    if len(shown) < len(entries):
        yield f"  {title} for {len(entries) - len(shown)} more reasons: see summary.json"


def unread_hint(reason: str) -> str:
    """Says what to do with media files whose format is not read. reason: an extension, with its dot."""
    ext = reason.removeprefix(".").lower()
    if not reason.startswith(".") or ext in MEDIA_EXTENSIONS:
        return ""
    if ext in UNREAD_IMAGES:
        return " (images that are not read; convert them to .jpg or .png)"
    return " (videos that are not read; convert them to .mp4)" if ext in UNREAD_VIDEOS else ""


def _class_line(sizes: Mapping[str, int]) -> str:
    present = {name: n for name, n in sizes.items() if n}
    empty = [name for name, n in sizes.items() if not n]
    if not present:
        return f"{counted(len(sizes), 'class', 'es')}, none with a sample"
    largest = max(present, key=lambda name: present[name])
    smallest = min(present, key=lambda name: present[name])
    line = f"{len(sizes)} classes" if len(sizes) > 1 else "1 class"
    if present[largest] == present[smallest]:
        equal = f", {len(present)} of them" if empty else ""
        line += f"{equal} of {counted(present[largest], 'sample')}{' each' * (len(present) > 1)}"
    else:
        line += f", largest {shortened(largest)} ({present[largest]})"
        line += f", smallest {shortened(smallest)} ({present[smallest]})"
    return line + (f"; {len(empty)} without a sample, such as {shortened(empty[0])}" if empty else "")


def _examples(entry: Mapping[str, Any]) -> str:
    names = [shortened(name) for name in entry["examples"]]
    more = ", ..." if entry["files"] > len(names) else ""
    return f" ({', '.join(names)}{more})" if names else ""


def shortened(name: str) -> str:
    """Returns a name of at most NAME_LENGTH characters: the end is what differs."""
    return name if len(name) <= NAME_LENGTH else "..." + name[3 - NAME_LENGTH :]

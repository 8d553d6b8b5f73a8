"""Writes the index of WebDataset shards that pack did not write: `python -m data_prep.scan DIR`.

One pass over the tar headers and the small files; no video is opened. A sample's label comes from its .json
or its .cls, in the usual spellings (see vidssl/data/metadata.py). What other tools say of frames, times and
sizes is kept under "claimed" and not believed: PyAV decodes these files and counts their frames itself. Ends
by saying what was understood.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.index import Member, class_lists, tar_samples, write_lines
from vidssl.core.errors import UserError, run_cli
from vidssl.data.decoding.base import IMAGE_EXTENSIONS
from vidssl.data.format import dumps, dumps_index, read_index, sample_record, select_media, shard_entry
from vidssl.data.metadata import (
    LABEL_EXTENSIONS,
    LABEL_KEYS,
    MAX_JSON_BYTES,
    json_extension,
    parse_meta,
)
from vidssl.data.tar_files import is_system_file

MAX_META_BYTES = 64 << 10  # of the metadata of a sample that its index record holds
OWN_KEYS = ("label", "labels", "class", "claimed")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class Findings:
    """What a scan met beside the samples that it indexed."""

    skipped: Counter[str] = field(default_factory=Counter)  # reason -> samples
    example: dict[str, str] = field(default_factory=dict)  # reason -> the first of them
    ignored: Counter[str] = field(default_factory=Counter)  # reason -> members
    described: int = 0  # samples with metadata
    warnings: list[str] = field(default_factory=list)

    def skip(self, reason: str, example: str) -> None:
        self.skipped[reason] += 1
        self.example.setdefault(reason, example)


def read_shard(tar: Path, findings: Findings) -> list[dict]:
    """Returns the records of one shard; a meta has a "class" and no "label" yet if the shard gives only a
    name.
    """
    found = tar_samples(tar)
    findings.ignored += found.ignored
    if found.scattered:
        findings.warnings.append(
            f"{tar}: the members of {found.scattered} samples do not follow each other; they were joined"
        )
    if not found.has_end:
        findings.warnings.append(f"{tar}: has no end-of-archive mark; it may be cut")
    records = []
    with open(tar, "rb") as file:
        for key, members in found.samples.items():
            media = select_media(members)
            if not is_utf8(key):  # its index could not be written
                findings.skip("with a name that is not UTF-8", f"{tar}: {key!r}")
            elif media is None:
                extensions = ", ".join(sorted(members))
                findings.skip("without a video or image", f"{tar}: {key} has only {extensions}")
            elif media[1].size == 0:
                findings.skip("with an empty file", f"{tar}: {key}.{media[0]}")
            else:
                ext, (offset, size) = media
                others = {other: member for other, member in members.items() if other != ext}
                meta = read_meta(f"{tar}: {key}", file, others, size, findings)
                records.append(sample_record(key, ext, offset, size, meta))
    return records


def read_meta(
    where: str, file: BinaryIO, members: Mapping[str, Member], size: int, findings: Findings
) -> dict[str, Any]:
    """Returns the metadata of a sample and counts its other members. size: bytes of its media file."""
    wanted = {json_extension(members) or "", *LABEL_EXTENSIONS} & set(members)
    contents = {}
    for ext in wanted:
        if members[ext].size > MAX_JSON_BYTES:
            found = f"{where}.{ext}: has {members[ext].size} bytes"
            raise UserError(f"{found}; metadata of at most {MAX_JSON_BYTES} bytes are read")
        file.seek(members[ext].offset)
        contents[ext] = file.read(members[ext].size)
    findings.ignored.update(f"other file (.{ext})" for ext in members if ext not in wanted)
    findings.described += bool(wanted)
    meta = parse_meta(where, contents, size)
    if len(dumps(meta)) <= MAX_META_BYTES:
        return meta
    findings.ignored["metadata beyond 64 KiB"] += 1
    return {key: meta[key] for key in ("label", "class", "group") if key in meta}


def is_utf8(name: str) -> bool:
    """Whether a name in a tar is UTF-8: tarfile replaces other bytes by lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def name_classes(records: list[dict], findings: Findings) -> dict[str, list[str]]:
    """Completes "label", "class" and "labels" of every meta in place; returns label set -> class names.

    Names that samples give beside numbers name the classes, unless they contradict each other.
    """
    metas = [record["meta"] for record in records]
    numbers, names = numbered_classes(metas, findings)
    number_of = {name: number for number, name in numbers.items()}
    unnumbered = names - set(number_of)
    if unnumbered and numbers:
        raise UserError(
            "some samples have a label number and others only a class name, such as "
            f"{min(unnumbered)!r}; which number is which name?"
        )
    if not numbers:
        number_of = {name: i for i, name in enumerate(class_lists({"label": names})["label"])}
        numbers = {i: name for name, i in number_of.items()}
    classes = [numbers.get(i, str(i)) for i in range(max(numbers, default=-1) + 1)]
    for meta in metas:
        label = meta.get("label", -1)
        label = number_of.get(meta.get("class"), -1) if label < 0 else label
        meta["label"] = label
        meta["class"] = classes[label] if label >= 0 else None
        if "labels" not in meta:
            meta["labels"] = {"label": label} if label >= 0 else {}
    return {"label": classes} if classes else {}


def numbered_classes(metas: list[dict], findings: Findings) -> tuple[dict[int, str], set[str]]:
    """Returns number -> class name of the samples that have a number, and the names of the others."""
    labels = {(m.get("label", -1), m.get("class")) for m in metas}
    pairs = {(number, name) for number, name in labels if number >= 0 and name is not None}
    of_several = {
        n for m in metas if isinstance(tags := m.get("labels", {}).get("label"), list) for n in tags
    }
    numbers = {n: str(n) for n in sorted({number for number, _ in labels} | of_several) if n >= 0}
    names = {name for number, name in labels if number < 0 and name is not None}
    if len(pairs) == len({number for number, _ in pairs}) == len({name for _, name in pairs}):
        numbers |= dict(pairs)
    else:
        counts = Counter(number for number, _ in pairs) + Counter(name for _, name in pairs)
        twice = next(pair for pair in sorted(pairs) if counts[pair[0]] > 1 or counts[pair[1]] > 1)
        findings.warnings.append(
            f"samples name class {twice[0]} {twice[1]!r}, others disagree; classes get their numbers as names"
        )
    return numbers, names


def count_line(records: list[dict], classes: dict[str, list[str]]) -> str:
    """Says how many videos, images, classes and groups the samples have."""
    images = sum(record["ext"] in IMAGE_EXTENSIONS for record in records)
    groups = len({record["meta"]["group"] for record in records if record["meta"].get("group")})
    counts = [f"{len(records) - images} videos, {images} images, {len(classes.get('label', []))} classes"]
    return ", ".join(counts + [f"{groups} groups"] * bool(groups))


def label_lines(records: list[dict], classes: dict[str, list[str]], findings: Findings) -> Iterator[str]:
    """Says which labels were understood."""
    sizes = Counter(record["meta"]["class"] for record in records if record["meta"]["label"] >= 0)
    if sizes:
        (largest, most), *_ = sizes.most_common(1)
        smallest, least = min(sizes.items(), key=lambda item: (item[1], item[0]))
        yield f"samples of a class: {least} ({smallest}) to {most} ({largest})"
    unlabelled = [record for record in records if record["meta"]["label"] < 0]
    if sizes and unlabelled:
        yield f"without a label: {len(unlabelled)} samples, such as {unlabelled[0]['key']}"
    if not sizes and findings.described:
        keys = [key for record in records for key in (*record["meta"], *record["meta"].get("claimed", ()))]
        known = ", ".join(key for key, _ in Counter(keys).most_common() if key not in OWN_KEYS) or "no keys"
        yield (
            f"warning: {findings.described} samples have metadata ({known}), but no label was understood; "
            f"labels are read from .cls or from these keys of .json: {', '.join(LABEL_KEYS)}"
        )
    empty = sorted(set(classes.get("label", [])) - set(sizes))
    if empty:
        yield f"warning: {len(empty)} classes have no sample, such as {empty[0]}"


def left_out_lines(findings: Findings) -> Iterator[str]:
    """Says what was passed over, and what is odd."""
    for reason, n in findings.skipped.items():
        yield f"skipped {n} samples {reason}, such as {findings.example[reason]}"
    ignored = [f"{n} x {reason}" for reason, n in sorted(findings.ignored.items())]
    if ignored:
        yield f"ignored members: {', '.join(ignored)}"
    yield from (f"warning: {line}" for line in findings.warnings)


def find_tars(folder: Path) -> list[Path]:
    """Returns the shards of a folder; raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    tars = sorted(p for p in folder.glob("*.tar") if p.is_file() and not is_system_file(p.name))
    if not tars:
        compressed = [p.name for p in sorted(folder.iterdir()) if p.name.endswith(COMPRESSED_TARS)]
        below = sorted({p.parent.name for p in folder.glob("*/*.tar")})
        hint = f"; {compressed[0]} is compressed: unpack it to a .tar" if compressed else ""
        hint = hint or (f"; scan each of the folders in it that do: {', '.join(below[:9])}" if below else "")
        raise UserError(f"{folder}: no .tar file in it{hint}")
    return tars


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.scan", description="Index shards that were not written by pack."
    )
    parser.add_argument("dir", type=Path, help="a folder of .tar shards; the index is written beside them")
    folder = parser.parse_args(argv).dir
    tars = find_tars(folder)
    if (folder / "index.json").exists() and read_index(folder).get("pack") != {"scan": True}:
        raise UserError(f"{folder}: has an index already, written by pack")
    findings = Findings()
    by_tar = {tar: read_shard(tar, findings) for tar in tars}
    records = [record for of_shard in by_tar.values() for record in of_shard]
    if not records:
        reasons = "".join(f"; {n} {why}: {findings.example[why]}" for why, n in findings.skipped.items())
        raise UserError(f"{folder}: no sample with a video or image in its {len(tars)} shards{reasons}")
    classes = name_classes(records, findings)
    for tar, of_shard in by_tar.items():
        write_lines(tar.with_suffix(".jsonl"), map(dumps, of_shard))
    entries = [shard_entry(tar, len(of_shard)) for tar, of_shard in by_tar.items() if of_shard]
    write_lines(folder / "index.json", [dumps_index(classes, entries, 0, {"scan": True})])
    print(f"{folder}: {len(records)} samples in {len(entries)} shards, {count_line(records, classes)}")
    for line in (*label_lines(records, classes, findings), *left_out_lines(findings)):
        print(line)


if __name__ == "__main__":
    run_cli(main)

"""Writes the index of WebDataset shards that pack did not write: `vidssl scan DIR`.

One pass over the tar headers and the small files; no video is opened. A sample's label comes from its .json
or its .cls, in the usual spellings (see vidssl/data/metadata.py). What other tools say of frames, times and
sizes is kept under "claimed" and not believed: PyAV decodes these files and counts their frames itself. Ends
by saying what was understood.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.index import Member, class_lists, tar_samples, write_lines
from data_prep.summary import (
    Tally,
    left_out_lines,
    make_summary,
    shortened,
    summary_lines,
    write_summary,
)
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import claim_folder
from vidssl.core.launch import check_one_process
from vidssl.core.progress import track
from vidssl.core.suggestions import counted
from vidssl.data.format import dumps, dumps_index, read_index, sample_record, select_media, shard_entry
from vidssl.data.metadata import (
    LABEL_EXTENSIONS,
    LABEL_FIELDS,
    LABEL_KEYS,
    MAX_JSON_BYTES,
    json_extension,
    parse_meta,
)
from vidssl.data.split_names import name_splits, parse_split
from vidssl.data.tar_files import is_system_file

MAX_META_BYTES = 64 << 10  # of the metadata of a sample that its index record holds
OWN_KEYS = ("label", "labels", "class", "claimed")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class Findings:
    """What a scan met beside the samples that it indexed."""

    left_out: Tally = field(default_factory=Tally)  # reason -> samples or members
    described: int = 0  # samples with metadata
    warnings: list[str] = field(default_factory=list)


def read_shard(tar: Path, findings: Findings) -> list[dict]:
    """Returns the records of one shard; a meta has a "class" and no "label" yet if the shard gives only a
    name.
    """
    found = tar_samples(tar)
    findings.left_out.merge(found.ignored)
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
                findings.left_out.note("sample with a name that is not UTF-8", f"{tar.name}: {key}")
            elif media is None:
                extensions = ", ".join(sorted(members))
                findings.left_out.note("sample without a video or image", f"{tar.name}: {key}: {extensions}")
            elif media[1].size == 0:
                findings.left_out.note("sample with an empty file", f"{tar.name}: {key}.{media[0]}")
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
    for ext in set(members) - wanted:
        findings.left_out.note(f".{ext} beside a sample", where)
    findings.described += bool(wanted)
    meta = parse_meta(where, contents, size)
    if len(dumps(meta)) <= MAX_META_BYTES:
        return meta
    findings.left_out.note("metadata beyond 64 KiB", where)
    return {key: meta[key] for key in (*LABEL_FIELDS, "class_names", "group") if key in meta}


def is_utf8(name: str) -> bool:
    """Whether a name in a tar is UTF-8: tarfile replaces other bytes by lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def name_classes(records: list[dict], findings: Findings) -> dict[str, list[str]]:
    """Completes "label", "class" and "labels" of every meta in place; returns label set -> class names.

    Names that samples give beside numbers name the classes of the main label set, unless they contradict each
    other. The classes of other label sets have names where pack wrote them; else they get their numbers.
    """
    metas = [record["meta"] for record in records]
    main = main_label_set(metas)
    named = names_in_sets(metas)
    numbers, names = numbered_classes(metas, main, findings)
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
        labels = meta.setdefault("labels", {})
        if label >= 0:
            labels.setdefault(main, label)
    found = {main: classes} if classes else {}
    for label_set in sorted({name for meta in metas for name in meta["labels"]} - {main}):
        if in_set := numbers_in_set(metas, label_set):
            names_of = named.get(label_set, {})
            found[label_set] = [names_of.get(i, str(i)) for i in range(max(in_set) + 1)]
            if not names_of:
                findings.warnings.append(f"{label_set}: no sample names its classes; they get their numbers")
    return found


def names_in_sets(metas: list[dict]) -> dict[str, dict[int, str]]:
    """Label set -> number -> class name, where samples name the numbers of their "labels" ("class_names", as
    pack writes them) one to one."""
    pairs: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for meta in metas:
        names = meta.get("class_names")
        for label_set, name in names.items() if isinstance(names, dict) else ():
            number = (meta.get("labels") or {}).get(label_set)
            if isinstance(number, int) and number >= 0 and isinstance(name, str):
                pairs[label_set].add((number, name))
    return {
        label_set: dict(found)
        for label_set, found in pairs.items()
        if len(found) == len({number for number, _ in found}) == len({name for _, name in found})
    }


def main_label_set(metas: list[dict]) -> str:
    """The label set that "label" and "class" are of: the only one with the same number in every sample; else
    "label", which then is a set beside the others."""
    pairs = [(meta.get("label", -1), labels) for meta in metas if (labels := meta.get("labels"))]
    names = {name for _, labels in pairs for name in labels}
    if "label" in names or not any(number >= 0 for number, _ in pairs):
        return "label"
    same = [name for name in names if all(labels.get(name, -1) == number for number, labels in pairs)]
    return same[0] if len(same) == 1 else "label"


def numbers_in_set(metas: list[dict], label_set: str) -> set[int]:
    """The numbers of the classes of a label set that samples have, also of several a sample."""
    found = [labels[label_set] for meta in metas if label_set in (labels := meta.get("labels") or {})]
    return {n for value in found for n in (value if isinstance(value, list) else [value]) if n >= 0}


def numbered_classes(
    metas: list[dict], label_set: str, findings: Findings
) -> tuple[dict[int, str], set[str]]:
    """Returns number -> class name of the samples that have a number, and the names of the others. label_set:
    that of "label"."""
    labels = {(m.get("label", -1), m.get("class")) for m in metas}
    pairs = {(number, name) for number, name in labels if number >= 0 and name is not None}
    with_number = {number for number, _ in labels if number >= 0} | numbers_in_set(metas, label_set)
    numbers = {n: str(n) for n in sorted(with_number)}
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


def repeated_keys_warning(records: list[dict]) -> str:
    """Says that several shards have samples of the same key, if so."""
    counts = Counter(record["key"] for record in records)
    repeated = [key for key, n in counts.items() if n > 1]
    if not repeated:
        return ""
    keys = "key occurs" if len(repeated) == 1 else "keys occur"
    return (
        f"{len(repeated)} {keys} in several shards, such as {shortened(repeated[0])}; vidssl embed calls "
        "these samples SHARD/KEY"
    )


def label_warning(records: list[dict], classes: Mapping[str, list[str]], findings: Findings) -> str:
    """Says that samples have metadata but no label was understood, if so."""
    if not findings.described or classes:
        return ""
    keys = Counter(key for r in records for key in (*r["meta"], *r["meta"].get("claimed", ())))
    claimed = (c for r in records if isinstance(c := r["meta"].get("claimed"), dict))
    values = [f"{key} = {shortened(dumps(c[key]))}" for c in claimed for key in LABEL_FIELDS if key in c]
    if values:
        return f"no label was understood: {values[0]}; expected the number or the name of one class"
    known = ", ".join(key for key, _ in keys.most_common() if key not in OWN_KEYS) or "no other keys"
    return (
        f"{findings.described} samples have metadata ({shortened(known)}), but no label was understood; "
        f"labels are read from .cls or from these keys of .json: {', '.join(LABEL_KEYS)}"
    )


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


def unscanned_warning(folder: Path) -> str:
    """Says which archives in a folder and below it are not read, if there are any."""
    others = [p.name for p in sorted(folder.iterdir()) if p.name.endswith(COMPRESSED_TARS)]
    others += [
        f"{p.parent.name}/{p.name}" for p in sorted(folder.glob("*/*.tar")) if not is_system_file(p.name)
    ]
    if not others:
        return ""
    return (
        f"{counted(len(others), 'archive')} not read, such as {shortened(others[0])}: unpack compressed ones "
        "to .tar, and scan each folder by itself"
    )


def check_one_split(folder: Path, tars: list[Path]) -> None:
    """Raises UserError for shards whose names are those of several splits: one index makes one data set of
    them."""
    if splits := name_splits(tar.stem for tar in tars):
        raise UserError(
            f"{folder}: shards of several splits: {splits}; move those of each split to a folder of its own "
            "and scan that, or answer with --splits none if they are one data set"
        )


def split_warning(records: list[dict]) -> str:
    """Says that the metadata of samples name several splits, if so: they are in one data set."""
    named = (record["meta"].get("split") for record in records)
    found = [parse_split(name) for name in named if isinstance(name, str)]
    splits = Counter(name.split for name in found if name)
    if len(splits) < 2:
        return ""
    counts = ", ".join(f"{split} ({n})" for split, n in sorted(splits.items()))
    return f'samples name splits, "split" of .json: {counts}; they are one data set here'


def main(argv: list[str]) -> None:
    check_one_process(argv)
    parser = argparse.ArgumentParser(
        prog="vidssl scan", description="Index shards that were not written by pack."
    )
    parser.add_argument("dir", type=Path, help="a folder of .tar shards; the index is written beside them")
    splits = "shards called train, val, test are one data set (none); default: they are refused"
    parser.add_argument("--splits", choices=("auto", "none"), default="auto", help=splits)
    args = parser.parse_args(argv)
    folder = args.dir
    tars = find_tars(folder)
    if args.splits == "auto":
        check_one_split(folder, tars)
    if (folder / "index.json").exists() and read_index(folder).get("pack") != {"scan": True}:
        raise UserError(f"{folder}: has an index already, written by pack")
    with claim_folder(folder, "scan"):
        scan_shards(folder, tars)


def scan_shards(folder: Path, tars: list[Path]) -> None:
    """Indexes the shards of a folder, and prints what they hold."""
    findings = Findings()
    by_tar = {tar: read_shard(tar, findings) for tar in track(tars, "scan", "shards")}
    records = [record for of_shard in by_tar.values() for record in of_shard]
    if not records:
        reasons = "".join(f";{line[1:]}" for line in left_out_lines(findings.left_out.entries()))
        raise UserError(f"{folder}: no sample with a video or image in its {len(tars)} shards{reasons}")
    classes = name_classes(records, findings)
    for tar, of_shard in by_tar.items():
        write_lines(tar.with_suffix(".jsonl"), map(dumps, of_shard))
    entries = [shard_entry(tar, len(of_shard)) for tar, of_shard in by_tar.items() if of_shard]
    write_lines(folder / "index.json", [dumps_index(classes, entries, 0, {"scan": True})])
    print(f"{folder}: {counted(len(records), 'sample')} in {counted(len(entries), 'shard')}")
    summary = make_summary(records, classes, findings.left_out)
    write_summary(folder, summary)
    print(*summary_lines(summary), sep="\n")
    own = (
        label_warning(records, classes, findings),
        repeated_keys_warning(records),
        split_warning(records),
        unscanned_warning(folder),
    )
    for warning in filter(None, (*own, *findings.warnings)):
        print(f"warning: {warning}")


if __name__ == "__main__":
    run_cli(main)

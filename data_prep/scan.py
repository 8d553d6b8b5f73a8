"""Writes the index of WebDataset shards that pack did not write: `python -m data_prep.scan DIR`.

One pass over the tar headers and the small files; no video is opened. A sample's label comes from its .json
("label") or its .cls (a number or a name). The metadata that pack measures (frames, time stamps, decoder) are
absent, so PyAV decodes these files and counts their frames itself.
"""

import argparse
from collections import Counter
from pathlib import Path

from data_prep.index import Member, class_lists, tar_samples, write_lines
from vidssl.core.errors import UserError, run_cli
from vidssl.data.format import (
    dumps,
    dumps_index,
    parse_meta,
    read_index,
    sample_record,
    select_media,
    shard_entry,
)


def read_shard(tar: Path, skipped: Counter) -> list[dict]:
    """Returns the records of one shard; a meta has a "class" and no "label" yet if the shard gives only a
    name.
    """
    records = []
    keys = set()
    with open(tar, "rb") as file:

        def contents(member: Member | None) -> bytes | None:
            if member is None:
                return None
            file.seek(member.offset)
            return file.read(member.size)

        for key, members in tar_samples(tar):
            if not is_utf8(key):  # its index could not be written
                skipped["with a name that is not UTF-8"] += 1
                continue
            media = select_media(members)
            if media is None:
                skipped["without a video or image"] += 1
                continue
            if key in keys:
                raise UserError(
                    f"{tar}: key {key} occurs twice; the files of a sample must follow each other"
                )
            keys.add(key)
            meta = parse_meta(f"{tar}: {key}", contents(members.get("json")), contents(members.get("cls")))
            ext, (offset, size) = media
            records.append(sample_record(key, ext, offset, size, meta))
    return records


def is_utf8(name: str) -> bool:
    """Whether a name in a tar is UTF-8: tarfile replaces other bytes by lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def name_classes(records: list[dict]) -> dict[str, list[str]]:
    """Completes "label", "class" and "labels" of every meta in place; returns label set -> class names."""
    metas = [record["meta"] for record in records]
    numbered = {m["label"]: str(m.get("class", m["label"])) for m in metas if isinstance(m.get("label"), int)}
    named = {
        str(m["class"]) for m in metas if m.get("class") is not None and not isinstance(m.get("label"), int)
    }
    if named and any(label >= 0 for label in numbered):
        raise UserError(
            "some samples have a label number and others only a class name; which number is which name?"
        )
    names = class_lists({"label": named})["label"]
    if not names and numbered:
        names = [numbered.get(i, str(i)) for i in range(max(numbered) + 1)]
    number = {name: i for i, name in enumerate(names)}
    for meta in metas:
        label = meta.get("label")
        meta["label"] = label if isinstance(label, int) else number.get(str(meta.get("class")), -1)
        meta["class"] = names[meta["label"]] if meta["label"] >= 0 else None
        if not isinstance(meta.get("labels"), dict):
            meta["labels"] = {"label": meta["label"]} if meta["label"] >= 0 else {}
    return {"label": names} if names else {}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.scan", description="Index shards that were not written by pack."
    )
    parser.add_argument("dir", type=Path, help="a folder of .tar shards; the index is written beside them")
    folder = parser.parse_args(argv).dir
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: no .tar file in it")
    if (folder / "index.json").exists() and read_index(folder)["pack"] != {"scan": True}:
        raise UserError(f"{folder}: has an index already, written by pack")
    skipped: Counter = Counter()
    records = {tar: read_shard(tar, skipped) for tar in tars}
    classes = name_classes([record for of_shard in records.values() for record in of_shard])
    for tar, of_shard in records.items():
        write_lines(tar.with_suffix(".jsonl"), map(dumps, of_shard))
    entries = [shard_entry(tar, len(of_shard)) for tar, of_shard in records.items() if of_shard]
    if not entries:
        raise UserError(f"{folder}: no sample with a video or image in its {len(tars)} shards")
    write_lines(folder / "index.json", [dumps_index(classes, entries, 0, {"scan": True})])
    samples = sum(map(len, records.values()))
    print(f"{folder}: {samples} samples in {len(entries)} shards, {len(classes.get('label', []))} classes")
    for reason, n in skipped.items():
        print(f"skipped {n} samples {reason}")


if __name__ == "__main__":
    run_cli(main)

"""An index for shards that others wrote: `python -m data_prep.scan DIR`.

One pass over the tar headers and the small files; no video is opened. A sample's label comes from its .json ("label")
or its .cls (a number or a name). What nobody measured is not in its meta: such files are decoded by PyAV, with care.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

from data_prep.index import (
    class_lists,
    dumps,
    line_of,
    media_of,
    shard_entry,
    tar_samples,
    write_index,
    write_text,
)
from vidssl.core.errors import UserError, run_cli
from vidssl.data.index import read_index


def read_shard(tar: Path, skipped: Counter) -> list[dict]:
    """jsonl lines of one shard; meta["class"] is not a label yet where only a name is known."""
    lines, seen = [], set()
    with open(tar, "rb") as f:
        for key, members in tar_samples(tar):
            if not is_utf8(key):  # its index could not be written
                skipped["with a name that is not UTF-8"] += 1
                continue
            media = media_of(members)
            if media is None:
                skipped["without a video or image"] += 1
                continue
            if key in seen:
                raise UserError(f"{tar}: key {key} stands in it twice; its files must follow each other")
            seen.add(key)
            meta: dict = {}
            if "json" in members:
                f.seek(members["json"].offset)
                meta = _parse_json(f"{tar}: {key}.json", f.read(members["json"].size))
            elif "cls" in members:
                f.seek(members["cls"].offset)
                text = f.read(members["cls"].size).decode("utf-8", "replace").strip()
                meta = {"label": int(text)} if text.isdecimal() else {"class": text}
            lines.append(line_of(key, media, meta))
    return lines


def is_utf8(name: str) -> bool:
    """Whether a name from a tar was: tarfile puts lone surrogates for other bytes."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _parse_json(where: str, data: bytes) -> dict:
    try:
        meta = json.loads(data)
    except ValueError as e:
        raise UserError(f"{where}: not JSON: {e}") from e
    if not isinstance(meta, dict):
        raise UserError(f"{where}: expected an object, found {type(meta).__name__}")
    return meta


def name_classes(lines: list[dict]) -> dict[str, list[str]]:
    """Complete "label", "class" and "labels" of every meta, in place; returns label set -> class names."""
    metas = [line["meta"] for line in lines]
    given = {m["label"]: str(m.get("class", m["label"])) for m in metas if isinstance(m.get("label"), int)}
    named = {
        str(m["class"]) for m in metas if m.get("class") is not None and not isinstance(m.get("label"), int)
    }
    if named and any(label >= 0 for label in given):
        raise UserError(
            "some samples have a label number and others only a class name; which number is which name?"
        )
    names = class_lists({"label": named})["label"]
    if not names and given:
        names = [given.get(i, str(i)) for i in range(max(given) + 1)]
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
        prog="python -m data_prep.scan", description="Index shards that others wrote."
    )
    parser.add_argument("dir", type=Path, help="a folder of .tar shards; the index is written beside them")
    folder = parser.parse_args(argv).dir
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: no .tar file in it")
    if (folder / "index.json").exists() and read_index(folder)["pack"] != {"scan": True}:
        raise UserError(f"{folder}: has an index already, written by pack")
    skipped: Counter = Counter()
    of_shard = {tar: read_shard(tar, skipped) for tar in tars}
    classes = name_classes([line for lines in of_shard.values() for line in lines])
    for tar, lines in of_shard.items():
        write_text(tar.with_suffix(".jsonl"), map(dumps, lines))
    entries = [shard_entry(tar, len(lines)) for tar, lines in of_shard.items() if lines]
    if not entries:
        raise UserError(f"{folder}: no sample with a video or image in its {len(tars)} shards")
    write_index(folder, classes, entries, 0, {"scan": True})
    counts: dict[str, int] = defaultdict(int, {k: len(v) for k, v in classes.items()})
    print(
        f"{folder}: {sum(map(len, of_shard.values()))} samples in {len(entries)} shards, {counts['label']} classes"
    )
    for why, n in skipped.items():
        print(f"{n} samples {why}: left out")


if __name__ == "__main__":
    run_cli(main)

"""Parts of a packed data set: folders of their own that list some of its samples. The tars are linked, not
copied, so a part costs its index alone."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write, atomic_write_text, make_folder
from vidssl.core.splits import GroupSplit, split_by_group
from vidssl.data.addresses import is_url
from vidssl.data.format import Sample, dumps_index, read_index
from vidssl.data.metadata import group_in
from vidssl.data.shards import Shards


def group_of(sample: Sample) -> str:
    """The group of a sample, whose samples stay together (group_in); one without a group is alone."""
    return group_in(sample.meta) or f"sample {sample.key}"


def groups_of(samples: Sequence[Sample]) -> list[str]:
    """The groups of samples. Shards of other tools may repeat keys: samples of one key that differ in size
    are not the same, and each is alone."""
    sizes: dict[str, set[int]] = {}
    for sample in samples:
        sizes.setdefault(sample.key, set()).add(sample.size)
    groups = [group_of(sample) for sample in samples]
    return [
        f"{group} of {s.size} bytes" if len(sizes[s.key]) > 1 and group == f"sample {s.key}" else group
        for s, group in zip(samples, groups, strict=True)
    ]


def distinct_keys(samples: Sequence[Sample]) -> list[str]:
    """The keys of samples; shards of other tools may repeat them: the second of a key is "KEY (2)"."""
    seen: Counter[str] = Counter()
    keys = []
    for sample in samples:
        seen[sample.key] += 1
        number = seen[sample.key]
        keys.append(sample.key if number == 1 else f"{sample.key} ({number})")
    return keys


def hold_out(samples: Sequence[Sample], fraction: float, seed: int) -> GroupSplit:
    """Holds out whole groups, balanced over the classes of all label sets."""
    classes = [list(_labels(sample.meta).items()) for sample in samples]
    return split_by_group(groups_of(samples), classes, fraction, seed)


def _labels(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Label set -> number of the class, of those that the sample has one of."""
    found = meta.get("labels") or {}
    return {name: value for name, value in found.items() if isinstance(value, int) and value >= 0}


def write_part(folder: str, keep: np.ndarray, out: Path) -> None:
    """Writes a folder that has the samples of the local packed `folder` where `keep` (bool [n], in the order
    of Shards.list_samples) is true. Raises UserError if that is a URL, or nothing is kept."""
    if is_url(folder):
        raise UserError(f"{folder}: parts are made of local shards only: copy them here first")
    if not keep.any():
        raise UserError(f"{out}: no sample would be in it")
    make_folder(out)
    index = read_index(folder)
    entries = []
    label_sets: set[str] = set()
    first = 0
    for entry in index["shards"]:
        tar = Path(folder).resolve() / entry["name"]
        kept = keep[first : first + entry["samples"]]
        first += entry["samples"]
        if not kept.any():
            continue
        lines = tar.with_suffix(".jsonl").read_bytes().splitlines(keepends=True)
        lines = [line for line, is_kept in zip(lines, kept, strict=True) if is_kept]
        label_sets.update(name for line in lines for name in json.loads(line)["meta"].get("labels") or ())
        data = b"".join(lines)
        records = (out / entry["name"]).with_suffix(".jsonl")
        _link(tar, out / entry["name"])
        atomic_write(records, partial(Path.write_bytes, data=data))
        facts = {"samples": int(kept.sum()), "index_bytes": len(data)}
        entries.append({**entry, **facts, "index_sha256": hashlib.sha256(data).hexdigest()})
    made_by = {**index.get("pack", {}), "part_of": str(Path(folder).resolve())}
    # a label set of which no sample is left would be no label set to learn
    classes = {name: names for name, names in index["classes"].items() if name in label_sets}
    text = dumps_index(classes, entries, 0, made_by)
    atomic_write_text(out / "index.json", text + "\n")


def _link(tar: Path, place: Path) -> None:
    if not place.is_symlink():
        place.symlink_to(tar)


def list_folder(folder: str) -> list[Sample]:
    """All samples of a packed folder, in order."""
    return Shards([folder]).list_samples()

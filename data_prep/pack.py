"""Corpus -> shards: `python -m data_prep.pack SRC OUT`.

Everything that decides the bytes is in a plan, made before any file is opened: which file goes to which data set
and shard. Shards are then made one after the other, each written beside and renamed into place, so a run that was
killed goes on where it stopped, and the result depends neither on that nor on the number of workers.
"""

import argparse
import hashlib
import io
import json
import math
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_prep.folder import Item, Source, read_source
from data_prep.index import (
    Member,
    class_lists,
    dumps,
    key_of,
    line_of,
    read_index,
    read_lines,
    shard_entry,
    write_index,
    write_text,
)
from data_prep.probe import Prober, Rejected
from vidssl.errors import UserError, run_cli
from vidssl.files import check_out, make_folder

SHARD_BYTES = 1_000_000_000  # of source files; a shard is closed before it grows beyond that


class Shard(NamedTuple):
    """One shard to be: `tar` is where it will stand."""

    tar: Path
    items: list[Item]

    @property
    def rejections(self) -> Path:
        return self.tar.with_suffix(".rejected")


class Plan(NamedTuple):
    """sets: folder of each data set -> its shards. options: all that decides the bytes beside the source."""

    source: Path
    sets: dict[Path, list[Shard]]
    classes: dict[str, list[str]]
    first_set: str | None
    rejected: dict[Path, dict[str, str]]
    options: dict
    digest: str


def divide(items: list[Item], label_set: str | None, fraction: float, seed: int) -> dict[str, list[Item]]:
    """Into train and test: whole groups (a file without group is its own), about `fraction` of each class to test.

    A class with two groups or more has at least one in test and one in train.
    """
    units: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        units[f"group {item.group}" if item.group else f"file {item.path}"].append(item)
    counts = {u: Counter(i.labels.get(label_set or "", "") for i in members) for u, members in units.items()}
    of_class: dict[str, list[str]] = defaultdict(list)
    for u in sorted(units, key=lambda u: _draw(seed, u)):
        for c in counts[u]:
            of_class[c].append(u)
    test: set[str] = set()
    for c in sorted(of_class, key=lambda c: (len(of_class[c]), c)):
        want = max(1, round(fraction * sum(counts[u][c] for u in of_class[c])))
        for u in of_class[c]:
            have = sum(counts[v][c] for v in of_class[c] if v in test)
            if have >= want:
                break
            keeps_train = all(any(v not in test and v != u for v in of_class[k]) for k in counts[u])
            if u not in test and keeps_train and (not have or have + counts[u][c] <= want):
                test.add(u)
    parts: dict[str, list[Item]] = {"train": [], "test": []}
    for u, members in units.items():
        parts["test" if u in test else "train"].extend(members)
    return {name: sorted(members) for name, members in parts.items()}


def _draw(seed: int, name: str) -> bytes:
    """A pseudo-random sort key that depends on nothing else (no library's generator, no order)."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def make_plan(source: Source, root: Path, out: Path, args: argparse.Namespace) -> Plan:
    """Which file goes into which shard."""
    first = source.sets[0] if source.sets else None
    parts: dict[Path, list[Item]] = defaultdict(list)
    if any(item.split for item in source.items):
        if args.test_fraction:
            raise UserError(f"{root}: names its own splits; leave out --test-fraction")
        for item in source.items:
            parts[out / str(item.split)].append(item)
    elif args.test_fraction:
        parts |= {out / k: v for k, v in divide(source.items, first, args.test_fraction, args.seed).items() if v}
    else:
        parts[out] = source.items
    names: dict[str, set[str]] = defaultdict(set)
    for item in source.items:
        for label_set, name in item.labels.items():
            names[label_set].add(name)
    if len({key_of(item.path) for item in source.items}) < len(source.items):
        raise UserError(f"{root}: two paths have the same key; rename one of them")
    sizes = {item.path: (root / item.path).stat().st_size for item in source.items}
    options = {
        "decoder": args.decoder,
        "samples_per_shard": args.samples_per_shard,
        "seed": args.seed,
        "test_fraction": args.test_fraction,
    }
    digest = hashlib.sha256(dumps({"version": 1, **options}).encode())
    for item in source.items:
        digest.update(dumps([*item, sizes[item.path]]).encode())
    digest.update(dumps(source.rejected).encode())
    sets = {folder: _cut(folder, parts[folder], sizes, args) for folder in sorted(parts)}
    early = {min(sets): source.rejected}  # of files that no split was read for, the first data set keeps the list
    return Plan(root, sets, class_lists(names), first, early, options, digest.hexdigest())


def _cut(folder: Path, items: list[Item], sizes: dict[str, int], args: argparse.Namespace) -> list[Shard]:
    """Shuffle by seed and cut into shards, by count and by bytes."""
    most = args.samples_per_shard or max(8, min(1000, math.ceil(len(items) / 16)))
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in sorted(items, key=lambda item: _draw(args.seed, item.path)):
        if shards[-1] and (len(shards[-1]) >= most or filled + sizes[item.path] > SHARD_BYTES):
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += sizes[item.path]
    return [Shard(folder / f"shard-{i:06d}.tar", part) for i, part in enumerate(shards)]


def open_out(out: Path, plan: Plan) -> bool:
    """Make OUT, or find this very plan in it; whether all its data sets are finished."""
    file = out / "plan.json"
    if os.path.exists(file):
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("plan")
        except (ValueError, AttributeError):
            found = None
        if found != plan.digest:
            raise UserError(f"{out}: holds a pack of other files or with other options; choose another folder")
        return all((folder / "index.json").exists() for folder in plan.sets)
    if os.path.exists(out) and (not out.is_dir() or any(p.name != "plan.json.tmp" for p in out.iterdir())):
        raise UserError(f"{out}: holds something else already; choose a new folder")
    make_folder(out)
    write_text(file, [dumps({"version": 1, "plan": plan.digest, "options": plan.options})])
    return False


def is_finished(shard: Shard) -> bool:
    """The tar is renamed into place last, so it vouches for the files beside it."""
    return shard.tar.exists() and shard.tar.with_suffix(".jsonl").exists() and shard.rejections.exists()


def write_shard(shard: Shard, found: Iterator[dict | Rejected], plan: Plan) -> None:
    """The tar, its jsonl and the list of what was rejected; `found` is what was seen in each file, in order."""
    beside = shard.tar.with_name(shard.tar.name + ".tmp")
    lines, rejected = [], []
    with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar:
        for item, seen in zip(shard.items, found, strict=True):
            if isinstance(seen, Rejected):
                rejected.append({"path": item.path, "reason": seen.reason, "detail": seen.detail})
                continue
            key, meta = key_of(item.path), sample_meta(item, seen, plan)
            data = (plan.source / item.path).read_bytes()
            media = _add(tar, f"{key}.{item.ext}", data, item.ext)
            _add(tar, f"{key}.json", dumps(meta).encode(), "json")
            lines.append(dumps(line_of(key, media, meta)))
    write_text(shard.tar.with_suffix(".jsonl"), lines)
    write_text(shard.rejections, map(dumps, rejected))
    os.replace(beside, shard.tar)


def _add(tar: tarfile.TarFile, name: str, data: bytes, ext: str) -> Member:
    """One member with a header that says nothing of time, user or machine."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    at = tar.offset + tarfile.BLOCKSIZE  # ustar: the header is one block
    tar.addfile(info, io.BytesIO(data))
    return Member(ext, at, len(data))


def sample_meta(item: Item, seen: dict, plan: Plan) -> dict:
    """What KEY.json holds."""
    first = plan.first_set or ""
    labels = {s: plan.classes[s].index(name) for s, name in item.labels.items()}
    return {
        **seen,
        "label": labels.get(first, -1),
        "class": item.labels.get(first),
        "labels": labels,
        "group": item.group,
        "source": item.path,
    }


def pack(plan: Plan, workers: int, timeout: float) -> None:
    """Make every shard that is not there yet; the next one is looked into while one is written."""
    todo = [s for shards in plan.sets.values() for s in shards if not is_finished(s)]
    done = sum(len(s.items) for shards in plan.sets.values() for s in shards) - sum(len(s.items) for s in todo)
    for folder in plan.sets:
        folder.mkdir(parents=True, exist_ok=True)
    probers = Prober(plan.options["decoder"], timeout)
    with (
        closing(probers),
        ThreadPoolExecutor(workers) as pool,
        tqdm(desc="pack", unit=" files", initial=done, total=done + sum(len(s.items) for s in todo)) as bar,
    ):
        ahead: list[tuple[Shard, list[Future]]] = []

        def results(futures: list[Future]) -> Iterator[dict | Rejected]:
            for future in futures:
                yield future.result()
                bar.update()

        try:
            for shard in [*todo, None]:
                if shard is not None:
                    ahead.append((shard, [pool.submit(probers, plan.source / i.path, i.ext) for i in shard.items]))
                if len(ahead) > (shard is not None):
                    ready, futures = ahead.pop(0)
                    write_shard(ready, results(futures), plan)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # when interrupted, do not first look into what is queued


def finish(plan: Plan) -> None:
    """rejected.jsonl and, last, index.json of every data set."""
    for folder, shards in plan.sets.items():
        rejected = [{"path": p, "reason": r, "detail": ""} for p, r in plan.rejected.get(folder, {}).items()]
        for shard in shards:
            rejected += [json.loads(line) for line in read_lines(shard.rejections)]
        write_text(folder / "rejected.jsonl", map(dumps, sorted(rejected, key=lambda r: r["path"])))
        full = [(s.tar, len(read_lines(s.tar.with_suffix(".jsonl")))) for s in shards]
        entries = [shard_entry(tar, n) for tar, n in full if n]
        write_index(folder, plan.classes, entries, len(rejected), {**plan.options, "plan": plan.digest})


def clean(plan: Plan) -> None:
    """What only a resumed run needs; taken away last, and again by a run that finds all finished."""
    for shards in plan.sets.values():
        for shard in shards:
            shard.rejections.unlink(missing_ok=True)


def summarise(plan: Plan) -> None:
    """A line for each data set."""
    for folder in plan.sets:
        index = read_index(folder)
        reasons = Counter(json.loads(line)["reason"] for line in read_lines(folder / "rejected.jsonl"))
        size = sum(s["bytes"] for s in index["shards"])
        print(f"{folder}: {index['samples']} samples in {len(index['shards'])} shards, {size / 1e6:.1f} MB", end="")
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        print(f"; {sum(reasons.values())} rejected ({why}): see rejected.jsonl" if why else "; none rejected")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.pack", description="Pack a folder of videos or images into shards with an index."
    )
    parser.add_argument("src", type=Path, help="FOLDER/<class>/<file>, or a folder with labels.csv")
    parser.add_argument("out", type=Path, help="a new folder (or that of a pack that was interrupted)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes")
    parser.add_argument("--samples-per-shard", type=int, default=0, help="default: for at least 16 shards, 8 to 1000")
    parser.add_argument("--test-fraction", type=float, default=0.0, help="divide into train and test by group")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle and of the division")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds until a file counts as hanging")
    parser.add_argument(
        "--decoder", choices=("auto", "pyav"), default="auto", help="auto: decord where it proves right"
    )
    args = parser.parse_args(argv)
    if args.workers < 1 or args.samples_per_shard < 0 or not 0 <= args.test_fraction < 1 or args.timeout <= 0:
        raise UserError("--workers and --timeout must be positive, --samples-per-shard >= 0, --test-fraction in [0,1)")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if args.out.resolve().is_relative_to(args.src.resolve()):
        raise UserError(f"{args.out}: lies inside {args.src}; choose a folder outside the source")
    check_out(args.out)
    source = read_source(args.src)
    plan = make_plan(source, args.src, args.out, args)
    if source.ignored:
        print(f"ignored {sum(source.ignored.values())} files by extension: "
              + ", ".join(f"{n} {ext}" for ext, n in source.ignored.most_common()))  # fmt: skip
    if source.rejected:
        print(f"{args.src}: {len(source.rejected)} files are missing, of unknown kind or not named in UTF-8")
    if open_out(args.out, plan):
        print(f"{args.out}: is finished already")
    else:
        pack(plan, args.workers, args.timeout)
        finish(plan)
    clean(plan)
    summarise(plan)
    if not any(read_index(folder)["samples"] for folder in plan.sets):
        raise UserError(f"{args.src}: no file in it can be decoded; see {args.out}/rejected.jsonl")


if __name__ == "__main__":
    run_cli(main)

"""Files all of whose pictures another one shows too, re-encoded or scaled or trimmed: what
`pack --drop-duplicates near` drops.

Looked for as `leaks` does (its page says how): perceptual hashes find pairs, and what moves in the two decides, here at
SURE, since takes of one scene are not duplicates. Pictures and films in which nothing moves go by their hashes. Of a
pair the later one by name is dropped if WITHIN of its looks are in the other one; else the earlier one, if it is in the
later one. What is in none that is kept, is kept. Files are opened in child processes with a deadline; those that could
not be looked at are kept, counted and listed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

from data_prep.filters import Rejected
from data_prep.index import read_lines, write_lines
from data_prep.leaks import File, Fingerprint, Pair, Table, fingerprint_job
from data_prep.sources.common import SourceItem
from data_prep.workers import WorkerPool
from vidssl.core.errors import UserError
from vidssl.core.io import make_folder
from vidssl.data.format import dumps

SURE = 0.985  # correlation of what moves, from which on a file is dropped: re-encoded copies of UCF101 have 0.989 to 1
WITHIN = 0.8  # of a file's looks


def read_file(place: tuple[str, str]) -> File:
    """place: path and extension."""
    path, ext = place
    return File(Path(path).read_bytes(), ext)


def near_files(root: Path, items: list[SourceItem], workers: int, timeout: float) -> dict[str, dict]:
    """Path -> {"first": file that shows it too, "why", "alike", ...}, or {"unseen": why it was not looked at}."""
    files = sorted({item.path: item.ext for item in items}.items())
    places = [(str(root / path), ext) for path, ext in files]
    pool = WorkerPool(partial(fingerprint_job, read_file), timeout)
    with closing(pool):
        jobs: list[tuple] = [("fingerprint", place) for place in places]
        found = pool.map(jobs, workers, "look for duplicates", "files")
        seen: list[Fingerprint | None] = [None if isinstance(looks, Rejected) else looks for looks in found]
        lost = [(path, f) for (path, _), f in zip(files, found, strict=True) if isinstance(f, Rejected)]
        told: dict[str, dict] = {path: {"unseen": f.reason} for path, f in lost}
        table = Table(seen)
        pairs = [p for i, looks in enumerate(seen) if looks for p in table.pairs(i, looks) if p.train < i]
        pairs.sort(key=lambda p: (p.test, p.train))
        jobs = [("compare", p, places[p.test], places[p.train]) for p in pairs]
        answers = pool.map(jobs, workers, "compare", "files")
    for pair, answer in zip(pairs, answers, strict=True):
        path, first = files[pair.test][0], files[pair.train][0]
        if isinstance(answer, Rejected):
            told.setdefault(path, {"unseen": answer.reason})
        elif answer and answer.get("alike", 1.0) >= SURE and not {path, first} & told.keys():
            if is_within(pair, seen[pair.test]):
                told[path] = {"first": first, **answer}
            elif is_within(pair, seen[pair.train]):
                told[first] = {"first": path, **answer, "shift": -answer["shift"]}
    return told


def is_within(pair: Pair, looks: Fingerprint | None) -> bool:
    """Is most of this one of the two in the other one?"""
    return looks is not None and pair.votes >= WITHIN * len(looks.hashes)


def remembered(
    file: Path, root: Path, items: list[SourceItem], search: Callable[[], dict[str, dict]]
) -> dict[str, dict]:
    """What `search` finds, kept in `file`, so that a pack that goes on need not look again."""
    names = sorted({item.path for item in items})
    listed = hashlib.sha256(
        "\n".join(f"{name} {(root / name).stat().st_size}" for name in names).encode()
    ).hexdigest()
    if file.exists():
        head, *lines = map(json.loads, read_lines(file))
        if head != {"files": listed}:
            raise UserError(f"{file}: is of other files; choose another folder, or remove it")
        return {line.pop("path"): line for line in lines}
    same = search()
    make_folder(file.parent)
    write_lines(file, map(dumps, _lines(listed, same)))
    if unseen := [path for path, told in same.items() if "unseen" in told]:
        print(
            f"{len(unseen)} files could not be looked at for duplicates, {unseen[0]} first: {file} lists them"
        )
    return same


def _lines(listed: str, same: dict[str, dict]) -> Iterable[dict]:
    yield {"files": listed}
    yield from ({"path": path, **told} for path, told in sorted(same.items()))

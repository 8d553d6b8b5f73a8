"""Files that show the same pictures as one before them, re-encoded or scaled or trimmed: what
`pack --drop-duplicates near` drops.

Looked for as `leaks` does (its page says how): perceptual hashes find pairs, and what moves in the two decides, here at
SURE, since takes of one scene are not duplicates. Pictures and films in which nothing moves go by their hashes. Files
are opened in child processes with a deadline; one that cannot be decoded is left for pack to reject.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.filters import Rejected
from data_prep.index import dumps, read_lines, write_text
from data_prep.leaks import File, Looks, Table, compare, look
from data_prep.probe import Children, serve
from data_prep.sources.common import Item
from vidssl.errors import UserError
from vidssl.files import make_folder

SURE = 0.985  # correlation of what moves, from which on a file is dropped: re-encoded copies of UCF101 have 0.989 to 1


def _answer(what: str, *job: Any) -> None:
    """In the child: ("look", path, ext, send) or ("compare", pair, (path, ext), (path, ext), send)."""
    *given, send = job
    if what == "look":
        path, ext = given
        send(("known", look(Path(path).read_bytes(), ext, None)))
    else:
        pair, *both = given
        send(("known", (compare(pair, *(File(Path(path).read_bytes(), ext) for path, ext in both)),)))


def _serve(conn: Connection) -> None:
    serve(conn, _answer)


def near_files(root: Path, items: list[Item], workers: int, timeout: float) -> dict[str, dict]:
    """Path -> {"first": path of the file before it (by name) that it repeats, "why", "alike", ...}."""
    files = sorted({item.path: item.ext for item in items}.items())
    places = [(str(root / path), ext) for path, ext in files]
    children = Children(_serve, (), timeout)

    def ask(jobs: list[tuple], name: str) -> list[Any]:
        with ThreadPoolExecutor(workers) as pool:
            return list(tqdm(pool.map(lambda job: children.ask(*job), jobs), total=len(jobs), desc=name, unit=" files"))

    with closing(children):
        found = ask([("look", *place) for place in places], "look for duplicates")
        seen: list[Looks | None] = [None if isinstance(looks, Rejected) else looks for looks in found]
        table = Table(seen)
        pairs = [p for i, looks in enumerate(seen) if looks for p in table.pairs(i, looks) if p.train < i]
        answers = ask([("compare", p, places[p.test], places[p.train]) for p in pairs], "compare")
    same: dict[str, dict] = {}
    for pair, answer in zip(pairs, answers, strict=True):
        told = None if isinstance(answer, Rejected) else answer[0]
        path, first = files[pair.test][0], files[pair.train][0]
        if told and told.get("alike", 1.0) >= SURE and (path not in same or first < same[path]["first"]):
            same[path] = {"first": first, **told}
    return same


def remembered(file: Path, root: Path, items: list[Item], search: Callable[[], dict[str, dict]]) -> dict[str, dict]:
    """What `search` finds, kept in `file`, so that a pack that goes on need not look again."""
    names = sorted({item.path for item in items})
    listed = hashlib.sha256("\n".join(f"{name} {(root / name).stat().st_size}" for name in names).encode()).hexdigest()
    if file.exists():
        head, *lines = map(json.loads, read_lines(file))
        if head != {"files": listed}:
            raise UserError(f"{file}: is of other files; choose another folder, or remove it")
        return {line.pop("path"): line for line in lines}
    same = search()
    make_folder(file.parent)
    write_text(file, map(dumps, _lines(listed, same)))
    return same


def _lines(listed: str, same: dict[str, dict]) -> Iterable[dict]:
    yield {"files": listed}
    yield from ({"path": path, **told} for path, told in sorted(same.items()))

"""Near duplicates: files whose pictures another file shows too, re-encoded, scaled or trimmed.

`pack --drop-duplicates near` drops them. Candidates are found by perceptual hashes (data_prep.fingerprint)
and decided by what moves in the two (data_prep.matching), here at MIN_DUPLICATE_CORRELATION, since takes of
one scene are no duplicates; images and videos in which nothing moves are decided by their hashes. Of a pair
the later file by name is dropped if most of its hashes match the other one; else the earlier file, if most of
its own do. A file is dropped only if a file that is kept contains it. Files are decoded in child processes
with a deadline; those that cannot be decoded are kept, counted and listed.
"""

import hashlib
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

from data_prep.filters import Rejected
from data_prep.fingerprint import Candidate, Fingerprint, HashTable, MediaFile
from data_prep.index import write_lines
from data_prep.matching import matching_job
from data_prep.sources.common import SourceItem
from data_prep.summary import Tally, left_out_lines
from data_prep.workers import WorkerPool
from vidssl.core.errors import UserError
from vidssl.core.io import make_folder, read_json_rows
from vidssl.data.format import dumps

MIN_DUPLICATE_CORRELATION = 0.985  # re-encoded copies of UCF101 have 0.989 to 1
MIN_CONTAINED_SHARE = 0.8  # of a file's hashes


def read_file(location: tuple[str, str]) -> MediaFile:
    """location: path and extension."""
    path, ext = location
    return MediaFile(Path(path).read_bytes(), ext)


def find_near_duplicates(
    root: Path, items: list[SourceItem], workers: int, timeout_s: float
) -> dict[str, dict]:
    """Returns path -> {"duplicate_of": the file that contains it, "match", ...}, or {"error": why it is not
    compared}.

    timeout_s: seconds without progress until a file counts as hanging.
    """
    files = sorted({item.path: item.ext for item in items}.items())
    locations = [(str(root / path), ext) for path, ext in files]
    with closing(WorkerPool(partial(matching_job, read_file), timeout_s)) as pool:
        jobs: list[tuple] = [("fingerprint", location) for location in locations]
        results = pool.map(jobs, workers, "fingerprint", "files")
        fingerprints = [r if isinstance(r, Fingerprint) else None for r in results]
        table = HashTable(fingerprints)
        candidates = [
            c for i, f in enumerate(fingerprints) if f for c in table.candidates(i, f) if c.train < i
        ]
        candidates.sort(key=lambda c: (c.test, c.train))
        jobs = [("compare", c, locations[c.test], locations[c.train]) for c in candidates]
        compared = pool.map(jobs, workers, "compare", "files")
    found = {
        path: {"error": result.reason}
        for (path, _), result in zip(files, results, strict=True)
        if isinstance(result, Rejected)
    }
    for candidate, match in zip(candidates, compared, strict=True):
        later, earlier = files[candidate.test][0], files[candidate.train][0]
        if isinstance(match, Rejected):
            found.setdefault(later, {"error": match.reason})
        elif (
            match
            and match.get("correlation", 1.0) >= MIN_DUPLICATE_CORRELATION
            and not {later, earlier} & found.keys()
        ):
            if is_contained(candidate, fingerprints[candidate.test]):
                found[later] = {"duplicate_of": earlier, **match}
            elif is_contained(candidate, fingerprints[candidate.train]):
                found[earlier] = {"duplicate_of": later, **match, "shift": -match["shift"]}
    return found


def is_contained(candidate: Candidate, own: Fingerprint | None) -> bool:
    """Whether most hashes of one of the two videos, whose fingerprint is `own`, match the other video."""
    return own is not None and candidate.matched >= MIN_CONTAINED_SHARE * len(own.hashes)


def cached_near_duplicates(
    file: Path, root: Path, items: list[SourceItem], search: Callable[[], dict[str, dict]]
) -> dict[str, dict]:
    """Returns the result of `search`, which is kept in `file` so that a pack that is resumed need not search
    again."""
    paths = sorted({item.path for item in items})
    listing = "\n".join(f"{path} {(root / path).stat().st_size}" for path in paths)
    header = {"files": hashlib.sha256(listing.encode()).hexdigest()}
    if file.exists():
        cached_header, *records = read_json_rows(file) or [{}]
        if cached_header != header:
            raise UserError(f"{file}: is of other files; choose another folder, or remove it")
        return {record.pop("path"): record for record in records}
    found = search()
    make_folder(file.parent)
    write_lines(
        file, map(dumps, [header, *({"path": path, **record} for path, record in sorted(found.items()))])
    )
    failed = Tally()
    for path, record in sorted(found.items()):
        if "error" in record:
            failed.note(record["error"], path)
    if failed:
        print(f"{failed.total()} files could not be compared, and are kept: {file} lists them")
        print(*left_out_lines(failed.entries(), "not compared"), sep="\n")
    return found

"""Parts of every source format: items and listings, files by name, and readers of annotation files.

Readers yield (FILE:LINE, entry), so that every error names its line.
"""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_prep.summary import Tally
from vidssl.core.errors import UserError
from vidssl.data.decoding.base import VIDEO_EXTENSIONS
from vidssl.data.format import MEDIA_EXTENSIONS

EXTENSIONS = MEDIA_EXTENSIONS
SPLITS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
}


class SourceItem(NamedTuple):
    """A file, or the segment of it from `start` to `end` (seconds; None: start or end of the file).

    labels: label set -> class name; label sets without a value are absent. Several segments of a file are
    several items.
    """

    path: str  # relative to the source, with "/"
    labels: dict[str, str]
    group: str | None = None
    split: str | None = None
    start: float | None = None
    end: float | None = None

    @property
    def ext(self) -> str:
        return PurePosixPath(self.path).suffix[1:].lower()

    @property
    def span(self) -> tuple[float | None, float | None]:
        return self.start, self.end

    @property
    def sort_key(self) -> tuple[str, float, float]:
        """Unique among the items of a source."""
        return self.path, self.start or 0.0, math.inf if self.end is None else self.end


class SourceListing(NamedTuple):
    """The videos that a source lists, and the files that it rejects or ignores."""

    items: list[SourceItem]  # sorted by `sort_key`
    label_sets: list[str]
    rejected: dict[str, str]  # path (or the name in the annotations) -> reason that is known without decoding
    ignored: Counter[str]  # extension, or a reason in brackets -> number of files; a Tally has examples


class FileFinder:
    """Finds files by name, without folder and extension: annotations name them so, and folders differ by
    mirror."""

    def __init__(self, root: Path, extensions: Sequence[str] = VIDEO_EXTENSIONS):
        self.root = root
        self.paths: dict[str, list[str]] = {}  # name -> sorted paths
        self._ignored = Tally()
        self._used: set[str] = set()
        for path in sorted(list_files(root)):
            name, ext = os.path.splitext(path.rpartition("/")[2])
            if os.fsencode(path).decode("utf-8", "replace") != path:
                self._ignored.note("(not named in UTF-8)", path)
            elif name.startswith(".") or ext[1:].lower() not in extensions or not os.path.isfile(root / path):
                self._ignored.note(ext.lower() or "(no extension)", path)
            else:
                self.paths.setdefault(name, []).append(path)

    def find(self, name: str, folder: str | None = None) -> str | None:
        """Returns the path of `name`, or None. Prefers one inside a folder called `folder`, then the first by
        path."""
        paths = self.paths.get(name, [])
        if not paths:
            return None
        in_folder = [path for path in paths if folder in path.split("/")[:-1]]
        found = (in_folder or paths)[0]
        self._used.add(found)
        return found

    def ignored_files(self) -> Tally:
        """Counts the files of other kinds and those that were never found by name."""
        ignored = Tally()
        ignored.merge(self._ignored)
        for path in (path for paths in self.paths.values() for path in paths if path not in self._used):
            ignored.note("(not in the annotations)", path)
        return ignored


class ListingBuilder:
    """Collects the items of a source.

    allow_repeats: whether a list may name the same item twice with equal labels, as some published ones do;
    repeats are counted.
    """

    def __init__(self, allow_repeats: bool = True):
        self._entries: dict[
            tuple, tuple[SourceItem, str, str | None]
        ] = {}  # sort key -> item, FILE:LINE, reason
        self._allow_repeats = allow_repeats
        self._repeats = 0

    def add(self, where: str, item: SourceItem, reason: str | None = None) -> None:
        """where: FILE:LINE. reason: why the item is rejected; None: it is not. Raises UserError if it
        contradicts."""
        if item.sort_key not in self._entries:
            self._entries[item.sort_key] = item, where, reason
            return
        known, first_where, _ = self._entries[item.sort_key]
        if first_where.rpartition(":")[0] == where.rpartition(":")[0]:
            first_where = f"line {first_where.rpartition(':')[2]}"
        if not self._allow_repeats:
            raise UserError(
                f"{where}: {item.path} is named again (first in {first_where}); expected each once"
            )
        if known != item:
            here, there = _describe(item), _describe(known)
            raise UserError(
                f"{where}: {item.path} is {here} here, but {there} in {first_where}; expected one"
            )
        self._repeats += 1

    def add_named(
        self,
        where: str,
        name: str,
        path: str | None,
        labels: dict[str, str],
        group: str | None = None,
        split: str | None = None,
    ) -> None:
        """Adds the file `name` of the annotations, which FileFinder found at `path` (None: it is missing)."""
        self.add(where, SourceItem(path or name, labels, group, split), None if path else "missing")

    def build(self, label_sets: Iterable[str], ignored: Counter[str] | None = None) -> SourceListing:
        """Returns the listing. Raises UserError if only some items have a split, or one that cannot name a
        folder."""
        entries = [self._entries[key] for key in sorted(self._entries)]
        accepted = [(item, where) for item, where, reason in entries if reason is None]
        if any(item.split for item, _ in accepted):
            for item, where in accepted:
                if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", item.split or ""):
                    problem = f"{where}: split {item.split or ''!r}"
                    raise UserError(f"{problem}: expected a word of letters, digits, - and _")
        rejected = {item.path: reason for item, _, reason in entries if reason is not None}
        left_out = Tally()
        left_out.merge(ignored or {})
        if self._repeats:
            left_out.note("(named twice)", files=self._repeats)
        return SourceListing([item for item, _ in accepted], list(label_sets), rejected, left_out)


def _describe(item: SourceItem) -> str:
    return " ".join([*item.labels.values(), f"({item.split})"])


def list_files(root: Path) -> Iterator[str]:
    """Yields the path of every file below `root`, relative and with "/"; hidden folders are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            yield (Path(folder) / name).relative_to(root).as_posix()


def rejection_reason(root: Path, item: SourceItem) -> str | None:
    """Returns why an item is rejected without opening its file, or None."""
    if not os.path.isfile(root / item.path):  # False, too, for a path that is too long for any file
        return "missing"
    return None if item.ext in EXTENSIONS else "unknown_extension"


def require_annotations(annotations: Sequence[Path], kind: str, names: str) -> None:
    """Raises UserError, with the usual `names` of the files, if there are none."""
    if not annotations:
        raise UserError(f"--source {kind} needs --annotations FILE ...: {names}")


def text_lines(file: Path) -> list[str]:
    """Returns the lines of a UTF-8 file, without line ends (\\r\\n or \\n) and byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 (byte {e.start}: {e.reason}); save it as UTF-8") from e
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}; expected an annotation file") from e


def split_lines(file: Path, form: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (FILE:LINE, words) of every line that is not blank.

    form: what a line is expected to be, for the error; it has as many words as each line must have.
    """
    for number, line in enumerate(text_lines(file), 1):
        if line.strip():
            words = line.split()
            if len(words) != len(form.split()):
                raise UserError(f"{file}:{number}: {line.strip()!r}: expected {form}")
            yield f"{file}:{number}", words


def csv_rows(file: Path, required: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (FILE:LINE, column -> stripped value) of every row of a csv file whose header has the required
    columns."""
    text_lines(file)  # raises UserError if the file is not text
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            rows = csv.DictReader(f, strict=True)
            _check_header(file, list(rows.fieldnames or []), required)
            empty = True
            for row in rows:
                empty = False
                if None in row or None in row.values():
                    raise UserError(
                        f"{file}:{rows.line_num}: a different number of columns than in the header"
                    )
                yield f"{file}:{rows.line_num}", {c: v.strip() for c, v in row.items()}
            if empty:
                raise UserError(f"{file}: no line after the header")
    except csv.Error as e:
        raise UserError(f"{file}:{rows.line_num}: not a valid CSV line: {e}") from e


def _check_header(file: Path, columns: list[str], required: Sequence[str]) -> None:
    if not columns:
        raise UserError(f"{file}: empty; expected a header line with the columns {', '.join(required)}")
    for name in required:
        if name not in columns:
            raise UserError(f"{file}:1: no column `{name}` (found: {', '.join(columns)})")
    for i, name in enumerate(columns):
        if name and name in columns[:i]:
            raise UserError(f"{file}:1: two columns {name!r}; expected each name once")


def read_json_file(file: Path) -> Any:
    """Returns the value of a JSON file."""
    try:
        return json.loads("\n".join(text_lines(file)))
    except ValueError as e:
        raise UserError(f"{file}:{getattr(e, 'lineno', 1)}: not JSON: {e}") from e


def json_objects(file: Path, required: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Yields (FILE:LINE, object) of a JSON file that is a list of objects with the required keys.

    LINE is where the object starts.
    """
    expected = f"with {', '.join(required)}"
    if not isinstance(read_json_file(file), list):  # raises UserError if the file is not JSON
        raise UserError(f"{file}:1: expected a list of objects {expected}")
    text = "\n".join(text_lines(file))
    decode = json.JSONDecoder().raw_decode
    separator = re.compile(r"[\s,]*")
    position = text.index("[") + 1
    line = 1
    counted = 0  # newlines before this position are in `line`
    while True:
        separated = separator.match(text, position)
        assert separated is not None  # it matches the empty string, too
        position = separated.end()
        if text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        entry, position = decode(text, position)
        if not isinstance(entry, dict) or any(name not in entry for name in required):
            raise UserError(f"{file}:{line}: {str(entry)[:80]}: expected an object {expected}")
        yield f"{file}:{line}", entry


def split_from_name(file: Path) -> str:
    """Returns train, val or test, by the name of an annotation file."""
    found = {SPLITS[w] for w in re.findall("train|validation|validate|val|test", file.stem.lower())}
    if len(found) != 1:
        raise UserError(f"{file}: its name must say whose list it is: train, validation or test")
    return found.pop()


def parse_span(where: str, start: Any, end: Any) -> tuple[float | None, float | None]:
    """Returns start and end of a segment in seconds; blank or None: start or end of the file."""
    span: list[float | None] = []
    for name, value in (("start", start), ("end", end)):
        if value is None or value == "":
            span.append(None)
            continue
        try:
            seconds = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise UserError(f"{where}: {name} {value!r}: expected seconds, 0 or more")
        span.append(seconds)
    if span[1] is not None and span[1] <= (span[0] or 0.0):
        raise UserError(f"{where}: start {start} is not before end {end}; expected seconds")
    return span[0], span[1]


def parse_path(where: str, text: Any, root: Path) -> str:
    """Returns a path of an annotation file. Raises UserError if it is not relative and inside the source."""
    path = PurePosixPath(text.strip() if isinstance(text, str) else "")
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise UserError(f"{where}: path {text!r}: expected a path inside {root}")
    return str(path)

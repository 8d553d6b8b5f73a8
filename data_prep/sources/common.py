"""What every source format uses: Item and Source, the files of a folder by name, and readers that know their lines."""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

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
    """One file, or the part of it from `start` to `end` (seconds; None: its own start, its own end).

    labels: label set -> class name (sets without a value are absent). Several parts of one file are several items.
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
    def place(self) -> tuple[str, float, float]:
        """What no two items share, and what they are sorted by."""
        return self.path, self.start or 0.0, math.inf if self.end is None else self.end


class SourceListing(NamedTuple):
    """items: sorted by `place`. rejected: path (or the name that the annotations give) -> reason, known without opening
    a file. ignored: extension, or a reason in brackets -> files."""

    items: list[SourceItem]
    sets: list[str]
    rejected: dict[str, str]
    ignored: Counter


class FileFinder:
    """The files of one kind in a folder, by name without folder and extension: owners' lists name them so, and every
    mirror puts them into other folders."""

    def __init__(self, root: Path, extensions: Sequence[str] = VIDEO_EXTENSIONS):
        self.root, self.ignored = root, Counter[str]()
        self.of: dict[str, list[str]] = {}  # name -> paths, sorted
        self._used: set[str] = set()
        for path in sorted(walk(root)):
            name, ext = os.path.splitext(path.rpartition("/")[2])
            if os.fsencode(path).decode("utf-8", "replace") != path:
                self.ignored["(not named in UTF-8)"] += 1
            elif name.startswith(".") or ext[1:].lower() not in extensions or not os.path.isfile(root / path):
                self.ignored[ext.lower() or "(no extension)"] += 1
            else:
                self.of.setdefault(name, []).append(path)

    def find(self, name: str, folder: str | None = None) -> str | None:
        """The path of `name`; of several one inside a folder called `folder`, else the first by path."""
        paths = self.of.get(name, [])
        inside = [p for p in paths if folder in p.split("/")[:-1]]
        if not paths:
            return None
        self._used.add((inside or paths)[0])
        return (inside or paths)[0]

    def left(self) -> Counter[str]:
        """`ignored`, with the files that were not asked for."""
        rest = sum(map(len, self.of.values())) - len(self._used)
        return self.ignored + Counter({"(not in the annotations)": rest})


class ListingBuilder:
    """The items of a source while they are read. `repeats`: whether a list may name the same file twice, as a published
    one may: the second is counted (with other labels it is an error all the same)."""

    def __init__(self, repeats: bool = True):
        self._at: dict[
            tuple, tuple[SourceItem, str, str | None]
        ] = {}  # place -> item, FILE:LINE, reason of its rejection
        self._repeats, self._twice = repeats, 0

    def add(self, where: str, item: SourceItem, reason: str | None = None) -> bool:
        """where: FILE:LINE. reason: why it is rejected, None if it is not. False: it is there already."""
        if item.place not in self._at:
            self._at[item.place] = item, where, reason
            return True
        there, first, _ = self._at[item.place]
        if first.rpartition(":")[0] == where.rpartition(":")[0]:
            first = f"line {first.rpartition(':')[2]}"
        if not self._repeats:
            raise UserError(f"{where}: {item.path} is named again (first in {first}); expected each once")
        if there != item:
            raise UserError(
                f"{where}: {item.path} is {_told(item)} here, but {_told(there)} in {first}; expected one"
            )
        self._twice += 1
        return False

    def source(self, sets: Iterable[str], ignored: Counter[str] | None = None) -> SourceListing:
        """All of them; either none has a split, or each has one that can name a folder."""
        found = [self._at[place] for place in sorted(self._at)]
        good = [(item, where) for item, where, reason in found if reason is None]
        if any(item.split for item, _ in good):
            for item, where in good:
                if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", item.split or ""):
                    what = f"{where}: split {item.split or ''!r}"
                    raise UserError(f"{what}: expected a word of letters, digits, - and _")
        rejected = {item.path: reason for item, _, reason in found if reason is not None}
        ignored = (ignored or Counter()) + Counter({"(named twice)": self._twice})
        return SourceListing([item for item, _ in good], list(sets), rejected, ignored)


def _told(item: SourceItem) -> str:
    return " ".join([*item.labels.values(), f"({item.split})"])


def walk(root: Path) -> Iterator[str]:
    """Every file below root, its path with "/"; hidden folders are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            yield (Path(folder) / name).relative_to(root).as_posix()


def need(annotations: Sequence[Path], kind: str, what: str) -> None:
    if not annotations:
        raise UserError(f"--source {kind} needs --annotations FILE ...: {what}")


def text_lines(file: Path) -> list[str]:
    """Lines without their ends; \\r\\n or \\n, and a byte order mark or none."""
    try:
        return file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 (byte {e.start}: {e.reason}); save it as UTF-8") from e
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}; expected an annotation file") from e


def words(file: Path, form: str) -> Iterator[tuple[str, list[str]]]:
    """(FILE:LINE, words) of every line that is not blank; as many words as `form` has, which the error shows."""
    for number, line in enumerate(text_lines(file), 1):
        if line.strip():
            parts = line.split()
            if len(parts) != len(form.split()):
                raise UserError(f"{file}:{number}: {line.strip()!r}: expected {form}")
            yield f"{file}:{number}", parts


def table(file: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(FILE:LINE, column -> value without blanks around it) of every row of a csv with a header."""
    text_lines(file)  # so that what is not text is said before
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            rows = csv.DictReader(f, strict=True)
            columns = list(rows.fieldnames or [])
            if not columns:
                raise UserError(f"{file}: empty; expected a header line with the columns {', '.join(needed)}")
            for c in needed:
                if c not in columns:
                    raise UserError(f"{file}:1: no column `{c}` (found: {', '.join(columns)})")
            for i, c in enumerate(columns):
                if c and c in columns[:i]:
                    raise UserError(f"{file}:1: two columns {c!r}; expected each name once")
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


def json_file(file: Path) -> Any:
    """The value of a JSON file."""
    try:
        return json.loads("\n".join(text_lines(file)))
    except ValueError as e:
        raise UserError(f"{file}:{getattr(e, 'lineno', 1)}: not JSON: {e}") from e


def json_list(file: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """(FILE:LINE, object) of a JSON file that is a list of objects, LINE being where the object starts."""
    text, decode = "\n".join(text_lines(file)), json.JSONDecoder().raw_decode
    if not isinstance(json_file(file), list):  # which also finds what is not JSON
        raise UserError(f"{file}:1: expected a list of objects with {', '.join(needed)}")
    between = re.compile(r"[\s,]*")
    at, line, counted = text.index("[") + 1, 1, 0
    while (at := between.match(text, at).end()) and text[at] != "]":  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        entry, at = decode(text, at)
        if not isinstance(entry, dict) or any(name not in entry for name in needed):
            raise UserError(f"{file}:{line}: {str(entry)[:80]}: expected an object with {', '.join(needed)}")
        yield f"{file}:{line}", entry


def split_of(file: Path) -> str:
    """train, val or test, from the name of an annotation file."""
    found = {SPLITS[w] for w in re.findall("train|validation|validate|val|test", file.stem.lower())}
    if len(found) != 1:
        raise UserError(f"{file}: its name must say whose list it is: train, validation or test")
    return found.pop()


def seconds(where: str, start: Any, end: Any) -> tuple[float | None, float | None]:
    """Start and end of a part; blank or None: the file's own."""
    out: list[float | None] = []
    for name, value in (("start", start), ("end", end)):
        if value is None or value == "":
            out.append(None)
            continue
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise UserError(f"{where}: {name} {value!r}: expected seconds, 0 or more")
        out.append(number)
    if out[1] is not None and out[1] <= (out[0] or 0.0):
        raise UserError(f"{where}: start {start} is not before end {end}; expected seconds")
    return out[0], out[1]


def inside(where: str, text: Any, root: Path) -> str:
    """A path that a list names, checked to be relative and inside the source."""
    path = PurePosixPath(text.strip() if isinstance(text, str) else "")
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise UserError(f"{where}: path {text!r}: expected a path inside {root}")
    return str(path)

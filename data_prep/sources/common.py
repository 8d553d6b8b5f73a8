"""Parts of every source format: items and listings, and readers of annotation files.

Readers yield (FILE:LINE, entry), so that every error names its line.
"""

import csv
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_prep.summary import Tally, printable
from vidssl.core.errors import UserError
from vidssl.core.tables import read_table
from vidssl.data.extensions import MEDIA_EXTENSIONS
from vidssl.data.metadata import is_no_label
from vidssl.data.split_names import parse_split
from vidssl.data.tar_files import SYSTEM_FOLDERS

EXTENSIONS = MEDIA_EXTENSIONS
FRAMES_EXT = "frames"  # in place of the extension, of a folder of frames


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
    frame_rate: str | None = None  # frames per second of a folder of frames; None: a file

    @property
    def ext(self) -> str:
        """Lower case, without the dot; of a folder of frames FRAMES_EXT."""
        if self.frame_rate is not None:
            return FRAMES_EXT
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
    notes: Sequence[str] = ()  # how the source was understood, where that is not plain
    rejected_splits: Mapping[str, str] = {}  # path of a rejected file -> its split


class FolderOptions(NamedTuple):
    """Answers to what a folder does not say itself; see the options of pack."""

    splits: str = "auto"  # auto, folders or none
    thumbnails: str = "leave-out"  # leave-out or keep: images beside the videos that they show
    frames: str | None = None  # images: numbered images are not the frames of a video
    frame_rate: str | None = None  # frames per second of folders of numbered images


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

    def build(
        self,
        label_sets: Iterable[str],
        ignored: Counter[str] | None = None,
        notes: Sequence[str] = (),
        root: Path | None = None,
    ) -> SourceListing:
        """Returns the listing. Raises UserError if only some items have a split, or one that cannot name a
        folder.

        root: the videos and images below it that are not listed are counted.
        """
        entries = [self._entries[key] for key in sorted(self._entries)]
        accepted = [(item, where) for item, where, reason in entries if reason is None]
        if any(item.split for item, _ in accepted):
            for item, where in accepted:
                if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", item.split or ""):
                    problem = f"{where}: split {item.split or ''!r}"
                    raise UserError(f"{problem}: expected a word of letters, digits, - and _")
        check_spelling({item.split: where for item, where in accepted if item.split})
        rejected = {item.path: reason for item, _, reason in entries if reason is not None}
        left_out = Tally()
        left_out.merge(ignored or {})
        if self._repeats:
            left_out.note("(named twice)", files=self._repeats)
        if root is not None:
            note_unlisted(root, {item.path for item, _, _ in entries}, left_out)
        splits = {item.path: item.split for item, _, reason in entries if reason is not None and item.split}
        items = [item for item, _ in accepted]
        return SourceListing(items, list(label_sets), rejected, left_out, notes, splits)


# Other words for a split; "trainval", "eval" and "dev" may be meant beside train, val and test
SAME_SPLITS = {"training": "train", "trn": "train", "valid": "val", "validation": "val"}
SAME_SPLITS |= {"testing": "test", "tst": "test"}


def check_spelling(splits: Mapping[str, str]) -> None:
    """Raises UserError for splits that differ in spelling only, such as Train, train and training. splits:
    name -> FILE:LINE."""
    known: dict[str, str] = {}
    for split, where in splits.items():
        word = split.casefold()
        first = known.setdefault(SAME_SPLITS.get(word, word), split)
        if first != split:
            raise UserError(f"{where}: split {split!r}, but {first!r} in {splits[first]}; write one of them")


def note_unlisted(root: Path, listed: set[str], left_out: Tally) -> None:
    """Counts the videos and images below `root` that are neither listed nor in a listed folder."""
    for path in list_files(root, Tally(), []):
        places = (path, *(parent.as_posix() for parent in PurePosixPath(path).parents))
        if SourceItem(path, {}).ext in EXTENSIONS and not listed.intersection(places):
            left_out.note("(not in the list)", path)


def _describe(item: SourceItem) -> str:
    return " ".join([*item.labels.values(), f"({item.split})"])


def list_files(root: Path, ignored: Tally, notes: list[str]) -> Iterator[str]:
    """Yields the path of every file below `root`, relative and with "/"; links are followed.

    Left out and counted: hidden folders, folders of operating systems, and links to a folder that holds them.
    notes: gets a line about links that lead out of the source.
    """
    resolved_root = root.resolve()
    outside = []
    for folder, folders, files in os.walk(root, followlinks=True):
        entered = []
        for name in sorted(folders):
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            target = path.resolve() if path.is_symlink() else None
            if name.startswith(".") or name in SYSTEM_FOLDERS:
                ignored.note("(folder, hidden or of the system)", relative)
            elif target is not None and _leads_back(root, Path(folder), target):
                ignored.note("(link to a folder above it)", relative)
            else:
                entered.append(name)
                if target is not None and not target.is_relative_to(resolved_root):
                    outside.append(relative)
        folders[:] = entered
        for name in files:
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if path.is_symlink() and path.exists() and not path.resolve().is_relative_to(resolved_root):
                outside.append(relative)
            yield relative
    if outside:
        notes.append(
            f"{len(outside)} links lead out of {root} and are followed, such as {printable(outside[0])}"
        )


def _leads_back(root: Path, folder: Path, target: Path) -> bool:
    """Whether `target` holds a folder on the way from `root` to `folder`, so that a link would be a cycle."""
    way = [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return any(place.resolve().is_relative_to(target) for place in way)


def class_name(text: str) -> str | None:
    """Returns the name of a class in annotations, or None for a text that stands for no class.

    Equal letters become equal characters (Unicode NFC): file systems differ in how they store accents.
    """
    return None if is_no_label(text) else unicodedata.normalize("NFC", text.strip())


def listed_item(where: str, root: Path, item: SourceItem, options: FolderOptions) -> SourceItem:
    """Returns an item of a list; a folder is that of the frames of a video. Raises UserError for a folder
    without a frame rate."""
    if not os.path.isdir(root / item.path):
        return item
    if options.frame_rate is None:
        raise UserError(
            f"{where}: {item.path} is a folder; give --frame-rate RATE (frames a second) if its numbered "
            "images are the frames of a video"
        )
    return item._replace(frame_rate=options.frame_rate)


def rejection_reason(root: Path, item: SourceItem) -> str | None:
    """Returns why an item is rejected without opening its file, or None."""
    if item.frame_rate is not None:
        return None
    if not os.path.isfile(root / item.path):  # False, too, for a path that is too long for any file
        return "broken_link" if os.path.islink(root / item.path) else "missing"
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
            rows = read_table(f, strict=True)
            rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
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
            found = f"(found: {', '.join(columns)})"
            raise UserError(f"{file}:1: no column `{name}` {found}{_header_hint(columns, required)}")
    for i, name in enumerate(columns):
        if name and name in columns[:i]:
            raise UserError(f"{file}:1: two columns {name!r}; expected each name once")


def _header_hint(columns: Sequence[str], required: Sequence[str]) -> str:
    """Says what a header line without the required columns seems to be."""
    words = [word for name in columns for word in re.split(r"[;\t ]+", name)]
    if any(word.rpartition(".")[2].lower() in EXTENSIONS for word in words):
        return f"; its first line is no header: put one above it, with commas ({', '.join(required)}, ...)"
    if len(words) > len(columns) and set(required) <= set(words):
        return "; separate columns by commas"
    return ""


HALF_PAIR = re.compile(
    r"\\ud[89ab][0-9a-f]{2}(?!\\ud[c-f])|(?<!\\ud[89ab][0-9a-f]{2})\\ud[c-f][0-9a-f]{2}", re.I
)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; an escape of JSON may give half of a surrogate pair."""
    return text.encode("utf-8", "ignore").decode() == text


def check_unicode(where: str, value: Any) -> None:
    """Raises UserError if a value of JSON, or the name of one, holds half of a surrogate pair."""
    if not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise UserError(f"{where}: half of a surrogate pair (such as \\ud800), which is no character")


def read_json_file(file: Path) -> Any:
    """Returns the value of a JSON file."""
    lines = text_lines(file)
    try:
        value = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}:{getattr(e, 'lineno', 1)}: not JSON: {e}") from e
    line = next((n for n, text in enumerate(lines, 1) if HALF_PAIR.search(text)), 1)
    check_unicode(f"{file}:{line}", value)
    return value


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
    found = parse_split(file.stem)
    if found is None:
        raise UserError(f"{file}: its name must say whose list it is: train, validation or test")
    return found.split


def splits_of_lists(files: Sequence[Path], options: FolderOptions) -> dict[Path, str | None]:
    """Returns the split of each of several lists, by its name; none for a single list.

    It is that of the entries that name no split themselves.
    """
    if len(files) < 2 or options.splits == "none":
        return dict.fromkeys(files)
    splits = {file: parse_split(file.stem) for file in files}
    return {file: split.split if split else None for file, split in splits.items()}


def check_splits_of_lists(
    items: Iterable[SourceItem], splits: Mapping[Path, str | None], options: FolderOptions
) -> None:
    """Raises UserError if several lists name no splits, so that they could be two sets or one."""
    if len(splits) > 1 and options.splits == "auto" and not any(item.split for item in items):
        names = ", ".join(file.name for file in splits)
        raise UserError(
            f"{names}: are these lists splits, or one set? name them such as train.csv and val.csv, give a "
            "column `split`, or answer with --splits none"
        )


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
    """Returns a path of an annotation file, relative to the source. Raises UserError unless it lies
    inside."""
    given = text
    text = text.strip() if isinstance(text, str) else ""
    normal = os.path.normpath(text.removeprefix("file://")) if text else ""
    for base in (root.absolute(), root.resolve()) if os.path.isabs(normal) else ():
        for place in (Path(normal), Path(normal).parent.resolve() / Path(normal).name):
            if place.is_relative_to(base) and place != base:
                return _stored_form(root, place.relative_to(base).as_posix())
    path = PurePosixPath(normal)
    if not path.parts or path.is_absolute() or ".." in path.parts or str(path) == "." or "\0" in text:
        raise UserError(f"{where}: path {given!r}: expected a path inside {root.absolute()}")
    return _stored_form(root, str(path))


def _stored_form(root: Path, path: str) -> str:
    """Returns a path with accents as the file system stores them, in one character or in two, if it is
    there."""
    if path.isascii() or os.path.lexists(root / path):
        return path
    forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
    return next((form for form in forms if os.path.lexists(root / form)), path)

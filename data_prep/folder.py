"""A source: a folder of videos or images, with the labels in the folder names or in labels.csv."""

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vidssl.data.decoders import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from vidssl.errors import UserError

EXTENSIONS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}


class Item(NamedTuple):
    """One file. labels: label set -> class name (sets without a value are absent)."""

    path: str  # relative to the source, with "/"
    labels: dict[str, str]
    group: str | None = None
    split: str | None = None

    @property
    def ext(self) -> str:
        return PurePosixPath(self.path).suffix[1:].lower()


class Source(NamedTuple):
    """items: sorted by path. rejected: path -> reason, known without opening a file. ignored: extension -> files."""

    items: list[Item]
    sets: list[str]
    rejected: dict[str, str]
    ignored: Counter


def read_source(root: Path) -> Source:
    """labels.csv decides where there is one; otherwise the first folder level is the class."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected FOLDER/<class>/<file>, or a folder with labels.csv")
    source = _from_csv(root) if (root / "labels.csv").is_file() else _from_folders(root)
    if not source.items:
        others = ", ".join(f"{n} {ext}" for ext, n in source.ignored.most_common(5))
        if source.rejected:
            raise UserError(
                f"{root}: none of its {len(source.rejected)} files is there, of a known kind, named in UTF-8"
            )
        raise UserError(f"{root}: no video or image in it" + (f" (other files: {others})" if others else ""))
    return source


def _from_folders(root: Path) -> Source:
    """FOLDER/<class>/.../<file>; FOLDER/train/<class>/... if the first level consists of split names only."""
    items: list[Item] = []
    rejected: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            item = Item((Path(folder) / name).relative_to(root).as_posix(), {})
            shown = os.fsencode(item.path).decode("utf-8", "backslashreplace")
            if name.startswith(".") or item.ext not in EXTENSIONS:
                ext = Item(shown, {}).ext
                ignored["." + ext if ext else "(no extension)"] += 1
            elif shown != item.path:
                rejected[shown] = "bad_name"  # not UTF-8: no JSON can hold it
            elif not os.path.isfile(root / item.path):
                rejected[item.path] = "missing"  # a link to nowhere
            else:
                items.append(item)
    parts = {item.path: item.path.split("/")[:-1] for item in items}
    tops = {p[0] if p else "" for p in parts.values()}
    has_splits = bool(tops) and tops <= SPLIT_FOLDERS
    out = []
    for item in sorted(items):
        split = parts[item.path][0] if has_splits else None
        levels = parts[item.path][has_splits:]
        out.append(Item(item.path, {"label": levels[0]} if levels else {}, None, split))
    return Source(out, ["label"] if any(item.labels for item in out) else [], rejected, ignored)


def _from_csv(root: Path) -> Source:
    """labels.csv: path, label and/or label_NAME columns, and optionally group, split."""
    file = root / "labels.csv"
    items: list[Item] = []
    rejected: dict[str, str] = {}
    seen: dict[str, int] = {}  # path -> line
    try:
        with open(file, encoding="utf-8-sig", newline="") as f:
            rows = csv.DictReader(f, strict=True)
            sets = _label_columns(file, rows.fieldnames)
            for row in rows:
                path = _path(file, rows.line_num, row)
                if path in seen:
                    raise UserError(f"{file}:{rows.line_num}: {path} is named again (first in line {seen[path]})")
                seen[path] = rows.line_num
                labels = {name: row[column].strip() for name, column in sets.items() if (row[column] or "").strip()}
                item = Item(path, labels, *((row.get(c) or "").strip() or None for c in ("group", "split")))
                if not os.path.isfile(root / path):  # nor can it be where the path is too long for one
                    rejected[path] = "missing"
                elif item.ext not in EXTENSIONS:
                    rejected[path] = "unknown_extension"
                else:
                    items.append(item)
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 (byte {e.start}: {e.reason}); save it as UTF-8") from e
    except csv.Error as e:
        raise UserError(f"{file}:{rows.line_num}: not a valid CSV line: {e}") from e
    if not seen:
        raise UserError(f"{file}: no line after the header")
    if any(item.split for item in items):
        for item in items:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", item.split or ""):
                where = f"{file}:{seen[item.path]}"
                raise UserError(f"{where}: split {item.split or ''!r}: expected a word of letters, digits, - and _")
    return Source(sorted(items), list(sets), rejected, Counter())


def _label_columns(file: Path, columns: Sequence[str] | None) -> dict[str, str]:
    """Label set -> column."""
    if not columns:
        raise UserError(f"{file}: empty; expected a header line: path,label[,group][,split]")
    if "path" not in columns:
        raise UserError(f"{file}:1: no column `path` (found: {', '.join(columns)})")
    sets: dict[str, str] = {}
    for i, c in enumerate(columns):
        if c and c in columns[:i]:
            raise UserError(f"{file}:1: two columns {c!r}; expected each name once")
        if c == "label" or c.startswith("label_"):
            name = c.removeprefix("label_")
            if not name:
                raise UserError(f"{file}:1: column {c!r}: expected a name after `label_`")
            if name in sets:
                raise UserError(f"{file}:1: columns {sets[name]!r} and {c!r} are the same labels; rename one of them")
            sets[name] = c
    if not sets:
        raise UserError(f"{file}:1: no column `label` or `label_NAME` (found: {', '.join(columns)})")
    return sets


def _path(file: Path, line: int, row: dict) -> str:
    if None in row or None in row.values():
        raise UserError(f"{file}:{line}: a different number of columns than in the header")
    path = PurePosixPath(row["path"].strip())
    if not row["path"].strip() or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{file}:{line}: path {row['path']!r}: expected a path inside {file.parent}")
    return str(path)

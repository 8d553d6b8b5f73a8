"""Metadata of a sample: what pack measured, or what other tools wrote beside a file.

Only pack's own facts are believed. What another tool says of frames, size, rate or times is kept under
"claimed", for the reader; the file itself is measured. Labels are understood in their usual spellings.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vidssl.core.errors import UserError

PACKED_VERSION = 1  # of the facts that pack records in a sample's metadata
MAX_CLASSES = 1_000_000  # a label of this size or more is no number of a class
MAX_JSON_BYTES = 16 << 20  # of the .json of a sample
MAX_DEPTH = 32  # of nested values that are kept
MAX_INT = 2**63 - 1  # larger integers are kept as text: many readers of JSON cannot hold them
MAX_NAME = 255  # characters of a class name; longer text is a caption

# Facts that pack measures. Only its own count, since a clip is cut by them.
MEASURED = (
    *("decoder", "decord", "frames", "height", "width", "fps", "duration", "codec", "rotation", "times"),
    *("crop", "not_applied", "damaged_packets", "original", "packed", "time_repairs"),
)
LABEL_FIELDS = ("label", "class", "labels")
# Members that hold the label itself. A .txt is a caption.
LABEL_EXTENSIONS = ("cls", "label", "class", "cls.txt", "label.txt")
# Keys of a .json that hold a label, the most specific first; the second tuple counts only without the first.
LABEL_KEYS = (
    *("label", "class", "cls", "label_id", "class_id", "class_idx", "class_index", "label_idx"),
    *("label_index", "label_name", "class_name", "label_text"),
)
WEAK_LABEL_KEYS = ("target", "y", "category", "category_id", "category_name", "labels", "classes", "targets")

_WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")
_NO_LABEL = ("", "null", "nan", "NaN")


class Label(NamedTuple):
    """A class by its number, its name, or both; neither: unlabelled."""

    number: int | None = None
    name: str | None = None

    def __or__(self, other: "Label") -> "Label":
        """What is not known yet, from another label."""
        number = other.number if self.number is None else self.number
        return Label(number, other.name if self.name is None else self.name)


def packed_mark(size: int) -> dict[str, int]:
    """The mark of metadata that pack measured on a media file of `size` bytes."""
    return {"version": PACKED_VERSION, "bytes": size}


def is_packed(meta: Mapping[str, Any], size: int) -> bool:
    """Whether pack wrote these metadata, for this media file and not for an earlier form of it."""
    return meta.get("packed") == packed_mark(size)


def without_claims(meta: Mapping[str, Any], keys: Iterable[str] = MEASURED) -> dict[str, Any]:
    """Returns metadata that pack did not write; what they say under `keys` is moved to "claimed"."""
    claimed = {key: meta[key] for key in keys if meta.get(key) is not None}
    if not claimed:
        return {key: value for key, value in meta.items() if key not in keys}
    kept = {key: value for key, value in meta.items() if key not in (*keys, "claimed")}
    return kept | {"claimed": claimed}


def parse_meta(where: str, members: Mapping[str, bytes], size: int) -> dict[str, Any]:
    """Returns the metadata of a sample, of values that JSON can hold.

    members: lower-case extension -> contents, of all small files of the sample. size: bytes of its media
    file. Metadata that pack did not write have a "label" (a number), a "class" (a name), both or neither.
    Raises UserError, with `where` and the extension, for contents that cannot be read and for labels that
    contradict each other.
    """
    meta: dict[str, Any] = {}
    label = Label()
    ext = json_extension(members)
    if ext is not None:
        value = _parse_json(f"{where}.{ext}", members[ext])
        meta = _storable(value if isinstance(value, dict) else {"label": value})
        if is_packed(meta, size):
            return meta
        label = find_label(f"{where}.{ext}", value if isinstance(value, dict) else meta)
        meta = _without_foreign_fields(meta, label)
    for ext in LABEL_EXTENSIONS:
        if ext in members:
            found = as_label(f"{where}.{ext}", _text(f"{where}.{ext}", members[ext]))
            _check_agreement(f"{where}.{ext}", label, found)
            label |= found
    if label.number is not None:
        meta["label"] = label.number
    if label.name is not None:
        meta["class"] = label.name
    return meta


def group_in(meta: Mapping[str, Any]) -> str | None:
    """Returns the group that a sample's metadata name, whose samples stay together: `group`, else of a clip
    the file that it is cut from; None of a sample that is alone."""
    # pack always writes a group, if only null; `source` of others is often the name of a site or a data set
    is_clip = "group" in meta and ("start" in meta or "end" in meta)
    file = meta.get("source") if is_clip else None
    group = meta.get("group") or file
    return None if group is None else str(group)


def _without_foreign_fields(meta: dict[str, Any], label: Label) -> dict[str, Any]:
    """Returns metadata without the fields that have another meaning under the same names in pack's."""
    if label != Label():
        meta = {key: value for key, value in meta.items() if key not in LABEL_FIELDS[:2]}
    foreign = (
        (*MEASURED, "label", "class") if _are_label_sets(meta.get("labels")) else MEASURED + LABEL_FIELDS
    )
    meta = without_claims(meta, foreign)
    group = meta.pop("group", None)
    if isinstance(group, str | int | float) and not isinstance(group, bool):
        meta["group"] = str(group)
    return meta


def _are_label_sets(labels: Any) -> bool:
    """Whether a value is label set -> number of a class, or numbers of several (multi-label), as pack's."""
    return isinstance(labels, dict) and all(
        type(number) is int and -1 <= number < MAX_CLASSES
        for value in labels.values()
        for number in (value if isinstance(value, list) else [value])
    )


def json_extension(extensions: Iterable[str]) -> str | None:
    """Returns the extension of the member that holds a sample's metadata."""
    found = [ext for ext in extensions if ext == "json" or ext.endswith(".json")]
    return min(found, key=lambda ext: (ext != "json", ext), default=None)


def find_label(where: str, meta: Mapping[str, Any]) -> Label:
    """Returns the label of a sample from its .json."""
    values = {str(key).strip().lower().replace("-", "_").replace(" ", "_"): meta[key] for key in meta}
    for keys in (LABEL_KEYS, WEAK_LABEL_KEYS):
        label = Label()
        for key in keys:
            if key in values:
                label |= as_label(f'{where}: "{key}"', values[key])
        if label != Label():
            return label
    return Label()


def is_no_label(text: str) -> bool:
    """Whether annotations say by a text that there is no class: blank, -1, null or NaN."""
    text = text.strip()
    return text in _NO_LABEL or re.fullmatch(r"-1(\.0*)?", text) is not None


def as_label(where: str, value: Any) -> Label:
    """Returns the label that a value of any kind stands for; an empty one if it stands for none.

    Raises UserError for a number that cannot be that of a class.
    """
    if isinstance(value, bool):
        return Label(name=str(value).lower())
    if isinstance(value, float) and (value.is_integer() or math.isinf(value)):
        value = int(value) if value.is_integer() else MAX_CLASSES
    if isinstance(value, int | _HugeNumber):
        if value == -1:
            return Label()
        if isinstance(value, str) or not 0 <= value < MAX_CLASSES:
            raise UserError(
                f"{where}: {str(value)[:40]} is no number of a class; expected 0 to {MAX_CLASSES - 1}, "
                "-1 for none, or a name"
            )
        return Label(number=value)
    if isinstance(value, str):
        return _label_of_text(where, value)
    if isinstance(value, list) and len(value) == 1:
        return as_label(where, value[0])
    if isinstance(value, dict):
        values = [value.get(key) for key in ("id", "index", "number", "name", "label")]
        label = Label()
        for each in values:
            if not isinstance(each, dict | list):
                label |= as_label(where, each)
        return label
    return Label()


def _label_of_text(where: str, text: str) -> Label:
    text = text.replace("\ufeff", "").strip().strip("\0").strip()
    if text[:1] in ('"', "[", "{"):
        try:
            return as_label(where, json.loads(text))
        except (ValueError, RecursionError):
            pass
    if _WHOLE.fullmatch(text):
        return as_label(where, int(text.split(".")[0]))
    if text in _NO_LABEL or len(text) > MAX_NAME or "\n" in text:
        return Label()
    return Label(name=_storable(text))


def _check_agreement(where: str, known: Label, found: Label) -> None:
    for first, second in zip(known, found, strict=True):
        if first is not None and second is not None and first != second:
            raise UserError(f"{where}: the label is {second!r}, but {first!r} in another file of this sample")


def _text(where: str, data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; expected the number or the name of a class") from None


def _parse_json(where: str, data: bytes) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{where}: has {len(data)} bytes; metadata of up to {MAX_JSON_BYTES} are read")
    if not data.strip(b"\0 \t\r\n"):
        return {}
    try:
        return json.loads(data, parse_int=_whole_number, object_pairs_hook=_object)
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as e:
        raise UserError(f"{where}: not JSON: {e}") from e


class _HugeNumber(str):
    """The digits of an integer that is kept as text."""


def _whole_number(digits: str) -> int | str:
    return int(digits) if len(digits) < 20 else _HugeNumber(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose label is not given twice; of other keys the last counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in LABEL_KEYS and key in found and found[key] != value:
            raise ValueError(f'the key "{key}" occurs twice, with {found[key]!r} and {value!r}')
        found[key] = value
    return found


def _storable(value: Any, depth: int = 0) -> Any:
    """Returns a value of strict JSON: NaN and Infinity become null, huge integers text, lone surrogates
    U+FFFD."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) > MAX_INT:
        return str(value)
    if isinstance(value, list):
        return [_storable(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_storable(str(key)): _storable(item, depth + 1) for key, item in value.items()}
    return value

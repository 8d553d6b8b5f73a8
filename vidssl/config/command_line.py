"""The command line of a program with a configuration: --help and mistakes are answered without torch."""

import dataclasses
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from inspect import Parameter
from typing import Any, get_type_hints

from vidssl.config import (
    SHIPPED,
    Arguments,
    Choice,
    choice_of,
    declarations,
    default_of,
    describe,
    load_config,
)
from vidssl.config.signatures import Declaration, Part, meanings
from vidssl.core.errors import asks_for_help, run_cli
from vidssl.core.log import logger

WIDTH = 110


def check_command_line(cls: type, about: str, folders: Sequence[str]) -> None:
    """Prints help, or the first mistake in the configuration, and exits; returns if there is neither.

    folders: of configs/ that hold files for this program. A program calls this before it imports torch.
    """
    if asks_for_help(sys.argv[1:]):
        print("\n".join([about.strip(), "", *help_lines(cls, folders)]))
        sys.exit(0)
    run_cli(partial(check_configuration, cls=cls))


def check_configuration(argv: Sequence[str], cls: type) -> None:
    """Raises UserError if the configuration is wrong, or names a local file that does not exist."""
    cfg: Any = load_config(argv, cls)
    cfg.check_before_work()
    notes = cfg.notes() if hasattr(cfg, "notes") and os.environ.get("RANK", "0") == "0" else []
    for note in notes:
        logger.warning(note)


def help_lines(cls: type, folders: Sequence[str]) -> Iterator[str]:
    """All keys with types, defaults and meanings, then the shipped files."""
    yield "Files are merged; key=value overrides them, in any order. A string needs only the shell's quotes."
    yield "Several values are [a, b]; null leaves out what may be left out. Keys, defaults and meanings:"
    yield from _section_lines(cls, "")
    for folder in folders:
        files = sorted((SHIPPED / folder).glob("*.yaml"))
        if files:
            yield f"\nconfigs/{folder}:"
        for path in files:
            comment = path.read_text("utf-8").splitlines()[0]
            text = comment.lstrip("# ") if comment.startswith("#") else ""
            yield from _entry(f"  {path.name}", text)


def _section_lines(cls: type, key_path: str) -> Iterator[str]:
    hints = get_type_hints(cls, include_extras=True)
    texts = meanings(cls)
    for field in dataclasses.fields(cls):
        key = f"{key_path}.{field.name}".lstrip(".")
        hint = hints[field.name]
        if choice := choice_of(hint):
            yield from _choice_lines(choice, key)
        elif dataclasses.is_dataclass(hint):
            about = (hint.__doc__ or "").split(". ")[0].split(": ", 1)[-1]
            yield ""
            yield from textwrap.wrap(f"{key}: {' '.join(about.split())}", WIDTH)
            yield from _section_lines(hint, key)  # type: ignore[arg-type]
        else:
            yield from _key_lines(key, Declaration(hint, default_of(field), texts.get(field.name, "")))


def _choice_lines(choice: Choice | Arguments, key: str) -> Iterator[str]:
    """The keys of each kind; of kinds with equal keys the first, and where the others differ."""
    yield ""
    if isinstance(choice, Arguments):
        texts = meanings(choice.factory)  # type: ignore[arg-type]
        for name, declared in declarations(choice.factory).items():
            if name not in choice.supplied:
                yield from _key_lines(f"{key}.{name}", declared._replace(meaning=texts.get(name, "")))
        return
    yield from _entry(f"  {key}.kind", "one of " + ", ".join(choice.table))
    shown: dict[tuple[str, ...], tuple[str, dict[str, Declaration]]] = {}
    parts: dict[str, Choice | Arguments] = {}  # of the part itself
    for kind, part in choice.table.items():
        all_keys = part.declarations() if isinstance(part, Part) else declarations(part)
        keys = {name: d for name, d in all_keys.items() if name not in choice.supplied}
        first_kind, first = shown.setdefault(tuple(keys), (kind, keys))
        differing = {n: d for n, d in keys.items() if first is keys or _default(d) != _default(first[n])}
        if keys:
            as_first = f", as {first_kind}{' but for' * bool(differing)}"
            yield f"  with {key}.kind={kind}{'' if first is keys else as_first}:"
        for name, d in differing.items():
            if inner := choice_of(d.hint):
                parts[name] = inner
            else:
                yield from _key_lines(f"{key}.{name}", d, indent=4)
    for name, inner in parts.items():
        yield from _choice_lines(inner, f"{key}.{name}")


def _default(declared: Declaration) -> str:
    value = declared.default
    if value is Parameter.empty:
        return "(required)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if dataclasses.is_dataclass(value):
        return "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_default(declared._replace(default=item)) for item in value)}]"
    return str(value)


def _key_lines(key: str, declared: Declaration, indent: int = 2) -> Iterator[str]:
    default = _default(declared)
    text = f"{describe(declared.hint)}{'; ' * bool(declared.meaning)}{declared.meaning}"
    sign = " " if declared.default is Parameter.empty else "="
    yield from _entry(f"{' ' * indent}{key}{sign}{default}", text)


def _entry(name: str, text: str) -> list[str]:
    """A name and its text, in two columns."""
    column = 46
    start = f"{name:{column}}" if len(name) < column else f"{name}  "
    return textwrap.wrap(start + text, WIDTH, subsequent_indent=" " * column, break_long_words=False) or [
        name
    ]

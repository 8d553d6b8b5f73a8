"""The command line of a program with a configuration: --help and mistakes are answered without torch."""

import dataclasses
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Any

import yaml

from vidssl.config import SHIPPED, Origin, describe, is_config_file, load_config, merge, to_tree
from vidssl.config.key_tree import (
    KeyNode,
    KindNode,
    PartNode,
    SectionNode,
    find_topic,
    first_sentence,
    shipped_values,
    tree_of,
)
from vidssl.config.signatures import Declaration
from vidssl.core.errors import UserError, asks_for_help, run_cli
from vidssl.core.launch import PROCESSES, check_gpus, check_one_process, relaunch, take_processes
from vidssl.core.log import logger

WIDTH = 110
COLUMN = 46  # of the second of two
PRINT_CONFIG = "--print-config"
DRY_RUN = "--dry-run"
MAX_VALUES = 16  # of a key in the shipped files
MAX_FILES = 4  # that are named beside a value


def check_command_line(cls: type, about: str, folders: Sequence[str], shares_work: bool = True) -> None:
    """Prints what is asked for, or the first mistake in the configuration, and exits; returns if there is
    neither. With --processes N it starts them and exits with their status.

    folders: of configs/ that hold files for this program. shares_work: whether it takes --processes. A
    program calls this before it imports torch.
    """
    if asks_for_help(sys.argv[1:]) or PRINT_CONFIG in sys.argv[1:]:
        run_cli(partial(answer, cls=cls, about=about, folders=folders, shares_work=shares_work))
        sys.exit(0)
    if not shares_work:
        run_cli(check_one_process)
    run_cli(partial(check_processes, cls=cls))
    if (count := take_processes(sys.argv)) > 1:
        relaunch(count)


def check_processes(argv: Sequence[str], cls: type) -> None:
    """Raises UserError if the configuration is wrong, also of as many processes as are asked for."""
    arguments = list(argv)
    if (count := take_processes(arguments)) > 1:
        os.environ["WORLD_SIZE"] = str(count)
        check_gpus(count)
    # what is worth a note is said by the first process
    check_configuration(arguments, cls, says_notes=count == 1 and os.environ.get("RANK", "0") == "0")


def answer(
    argv: Sequence[str], cls: type, about: str, folders: Sequence[str], shares_work: bool = True
) -> bool:
    """Prints help or the resolved configuration; False if the command line does not ask for them.

    shares_work: whether the program takes --processes.
    """
    if asks_for_help(argv):
        print_help(argv, cls, about, folders, shares_work)
    elif PRINT_CONFIG in argv:
        print_config(argv, cls)
    else:
        return False
    return True


def check_configuration(argv: Sequence[str], cls: type, says_notes: bool = True) -> None:
    """Raises UserError if the configuration is wrong, or names a local file that does not exist."""
    if not argv:
        raise UserError("no configuration: give .yaml files and key=value; --help lists them")
    cfg: Any = load_config(without_dry_run(argv)[0], cls)
    cfg.check_before_work()
    notes = cfg.notes() if says_notes and hasattr(cfg, "notes") else []
    for note in notes:
        logger.warning(note)


def print_config(argv: Sequence[str], cls: type) -> None:
    """Prints the resolved configuration as a file that gives the same one, with the source of each value."""
    arguments = [word for word in argv if word not in (PRINT_CONFIG, DRY_RUN)]
    tree = to_tree(load_config(arguments, cls))
    print("\n".join(annotated_lines(tree, merge(arguments)[1])))


def annotated_lines(tree: Mapping[str, Any], origin: Origin, key_path: str = "") -> Iterator[str]:
    """YAML of a tree; behind each value is a comment with the file or argument that set it."""
    indent = "  " * (key_path.count(".") + 1) if key_path else ""
    for name, value in tree.items():
        key = f"{key_path}.{name}".lstrip(".")
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:"
            yield from annotated_lines(value, origin, key)
            continue
        # a scalar by itself would be followed by the end of the document
        text = yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[
            1:-1
        ]
        yield f"{f'{indent}{name}: {text}':{COLUMN}}  # {_source_of(key, origin)}"


def _source_of(key: str, origin: Origin) -> str:
    """What set a key, or the section or list that it is in."""
    while key and key not in origin:
        key = key.rpartition(".")[0]
    if not key:
        return "default"
    return origin[key].text if origin[key].is_file else "command line"


def without_dry_run(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Returns (argv without --dry-run, whether it was there)."""
    return [word for word in argv if word != DRY_RUN], DRY_RUN in argv


def print_help(
    argv: Sequence[str], cls: type, about: str, folders: Sequence[str], shares_work: bool = True
) -> None:
    """The overview, or what is known of the keys that are named beside --help."""
    topics = [word for word in argv if not word.startswith("-") and "=" not in word]
    topics = [word for word in topics if not is_config_file(word)]
    lines: list[str] = []
    for topic in topics:
        lines += [*all_lines(cls, folders)] if topic == "all" else [*topic_lines(cls, topic, folders)]
    program = Path(sys.argv[0]).stem.replace("_", "-")
    print("\n".join(lines or overview(cls, about, folders, program, shares_work)))


def overview(cls: type, about: str, folders: Sequence[str], program: str, shares_work: bool) -> Iterator[str]:
    """Sections and parts with a line each, options and files."""
    yield about.strip()
    yield ""
    yield "Files are merged; key=value overrides them, in any order. A string needs only the shell's quotes."
    yield "Several values are [a, b]; null leaves out what may be left out."
    yield f"\nKeys (vidssl {program} --help KEY says more: types, bounds, defaults, kinds, published values):"
    yield from _children_lines(tree_of(cls), deep=True)
    yield "\nOptions:"
    yield from _entry("  --help [KEY ...]", "this, or a section, part, kind or key; --help all: every key")
    yield from _entry("  --print-config", "the resolved configuration as YAML, with the source of each value")
    yield from _entry(f"  {DRY_RUN}", "check everything, print the plan, write nothing")
    if shares_work:
        yield from _entry(f"  {PROCESSES} N", "so many processes of this machine, one for each of its GPUs")
    yield from _entry("  --quiet", "only warnings, errors and the last line")
    yield "\nFiles:"
    for folder in folders:
        names = [path.stem for path in sorted((SHIPPED / folder).glob("*.yaml"))]
        yield from _entry(f"  configs/{folder}/NAME.yaml", ", ".join(names))


def all_lines(cls: type, folders: Sequence[str]) -> Iterator[str]:
    """All keys with types, defaults and meanings, then the shipped files."""
    yield from _section_lines(tree_of(cls))
    for folder in folders:
        files = sorted((SHIPPED / folder).glob("*.yaml"))
        if files:
            yield f"\nconfigs/{folder}:"
        for path in files:
            yield from _entry(f"  {path.name}", header_line(path))


def header_line(path: Path) -> str:
    """The first line of a file's comment."""
    comment = path.read_text("utf-8").splitlines()[0]
    return comment.lstrip("# ") if comment.startswith("#") else ""


def topic_lines(cls: type, topic: str, folders: Sequence[str]) -> Iterator[str]:
    """What is known of a section, part, kind or key."""
    nodes = find_topic(cls, topic)
    for node in nodes:
        if isinstance(node, SectionNode):
            yield from _wrapped(f"{node.path}: {node.about}")
            yield from _children_lines(node, deep=False)
        elif isinstance(node, PartNode):
            yield from _part_lines(node)
        elif isinstance(node, KindNode):
            yield from _kind_lines(node, folders)
        else:
            yield from _long_key_lines(node, folders)
        yield ""


def _children_lines(node: SectionNode, deep: bool) -> Iterator[str]:
    """A line for each child; deep: and for each part of a section."""
    for child in node.children.values():
        if isinstance(child, KeyNode):
            yield from _key_lines(child)
            continue
        if isinstance(child, PartNode):
            yield from _entry(f"  {child.path}", _part_text(child))
            continue
        yield from _entry(f"  {child.path}", child.about)
        if deep:
            parts = [inner for inner in child.children.values() if isinstance(inner, PartNode)]
            for part in parts:
                yield from _entry(f"    {part.path}", _part_text(part))


def _part_text(node: PartNode) -> str:
    """What a part is, and its kinds."""
    return f"{node.about}{'; ' * bool(node.about)}kinds: {', '.join(node.choice.table)}"


def _part_lines(node: PartNode) -> Iterator[str]:
    optional = " (may be left out)" if node.choice.is_optional or node.choice.is_list else ""
    several = "list of " if node.choice.is_list else ""
    yield from _wrapped(
        f"{node.path}: {node.about or 'a part'}{optional}; {several}{{kind: ..., keys}}, kind is one of"
    )
    for kind in node.kinds.values():
        yield from _entry(f"  {kind.kind}", first_sentence(kind.about))


def _kind_lines(node: KindNode, folders: Sequence[str]) -> Iterator[str]:
    yield from _wrapped(f"{node.path}.kind={node.kind}")
    for paragraph in re.split(r"\n\n|\n(?=- )", node.about):
        yield from _wrapped(" ".join(paragraph.split()), indent=2)
    yield ""
    for child in node.children.values():
        if isinstance(child, KeyNode):
            yield from _key_lines(child)
            yield from _record_lines(child)
        elif isinstance(child, PartNode):
            yield from _entry(f"  {child.path}", _part_text(child))
    chosen = KeyNode(f"{node.path}.kind", Declaration(str, Parameter.empty, ""), node.kinds)
    for folder in folders:
        if users := shipped_values(chosen, folder).get(node.kind):
            yield ""
            yield from _entry(f"  used by configs/{folder}:", ", ".join(users))


def _long_key_lines(node: KeyNode, folders: Sequence[str]) -> Iterator[str]:
    """A key with the values of the shipped files."""
    if node.kinds:
        yield f"with {', '.join(f'{part}.kind={kind}' for part, kind in node.kinds)}:"
    yield from _key_lines(node)
    yield from _record_lines(node)
    for folder in folders:
        values = shipped_values(node, folder)
        if values:
            yield f"  in configs/{folder}:"
        for value, names in [*values.items()][:MAX_VALUES]:
            more = f" and {len(names) - MAX_FILES} more" if len(names) > MAX_FILES else ""
            yield from _entry(f"    {value}", ", ".join(names[:MAX_FILES]) + more)
        if len(values) > MAX_VALUES:
            yield f"    and {len(values) - MAX_VALUES} other values"


def _record_lines(node: KeyNode) -> Iterator[str]:
    """The fields of what the list or mapping of a key holds."""
    for child in node.children.values():
        _, _, name = child.path.rpartition(".")
        yield from _key_lines(child, indent=6, name=name)


def _section_lines(node: SectionNode) -> Iterator[str]:
    for child in node.children.values():
        if isinstance(child, KeyNode):
            yield from _key_lines(child)
        elif isinstance(child, PartNode):
            yield from _all_kinds_lines(child)
        else:
            yield ""
            yield from _wrapped(f"{child.path}: {child.about}")
            yield from _section_lines(child)


def _all_kinds_lines(node: PartNode) -> Iterator[str]:
    """The keys of each kind; of kinds with equal keys the first, and where the others differ."""
    yield ""
    yield from _entry(f"  {node.path}.kind", "one of " + ", ".join(node.kinds))
    shown: dict[tuple[str, ...], KindNode] = {}
    parts: dict[str, PartNode] = {}
    for kind in node.kinds.values():
        first = shown.setdefault(tuple(kind.children), kind)
        differing = {
            n: child
            for n, child in kind.children.items()
            if first is kind or _differs(child, first.children[n])
        }
        if kind.children:
            as_first = f", as {first.kind}{' but for' * bool(differing)}"
            yield f"  with {node.path}.kind={kind.kind}{'' if first is kind else as_first}:"
        for child in differing.values():
            if isinstance(child, KeyNode):
                yield from _key_lines(child, indent=4)
            elif isinstance(child, PartNode):
                parts[child.path] = child
    for part in parts.values():
        yield from _all_kinds_lines(part)


def _differs(a: Any, b: Any) -> bool:
    if isinstance(a, KeyNode) and isinstance(b, KeyNode):
        return default_text(a.declared.default) != default_text(b.declared.default)
    return False


def default_text(value: Any) -> str:
    """A default as one would write it in a file."""
    if value is Parameter.empty:
        return "(required)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if dataclasses.is_dataclass(value):
        return "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(default_text, value))}]"
    return str(value)


def type_and_meaning(declared: Declaration) -> str:
    meaning = re.sub(r"\bNone\b", "null", declared.meaning)
    return f"{describe(declared.hint)}{'; ' * bool(meaning)}{meaning}"


def _key_lines(node: KeyNode, indent: int = 2, name: str = "") -> Iterator[str]:
    sign = " " if node.declared.default is Parameter.empty else "="
    start = f"{' ' * indent}{name or node.path}{sign}{default_text(node.declared.default)}"
    yield from _entry(start, type_and_meaning(node.declared))


def _wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _entry(name: str, text: str) -> list[str]:
    """A name and its text, in two columns."""
    start = f"{name:{COLUMN}}" if len(name) < COLUMN else f"{name}  "
    return textwrap.wrap(start + text, WIDTH, subsequent_indent=" " * COLUMN, break_long_words=False) or [
        name
    ]

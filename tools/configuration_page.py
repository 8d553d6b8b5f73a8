"""Writes docs/configuration.md: all keys of the programs with YAML files, from their signatures.

python tools/configuration_page.py      after a key, a default or a comment was changed
"""

from collections.abc import Iterator
from pathlib import Path

from vidssl.commands.programs import PROGRAMS
from vidssl.config.command_line import default_text, type_and_meaning
from vidssl.config.key_tree import KeyNode, PartNode, SectionNode, first_sentence, tree_of
from vidssl.core.errors import run_cli

PAGE = Path(__file__).parents[1] / "docs/configuration.md"
HEAD = """# Configuration: all keys

Written by `python tools/configuration_page.py` from the signatures of the code; `vidssl PROGRAM --help KEY`
says the same, and which values the shipped files have. [running.md](running.md#configuration)
says how files and `key=value` are put together. **required**: a key without a default. The last column of a
part's table names the kinds that have the key (with that default).
"""
HEADER = "| key | default | type; meaning |"


def main(argv: list[str]) -> None:
    PAGE.write_text(page())


def page() -> str:
    """The page as the code gives it now."""
    shown: dict[str, str] = {}
    lines = [HEAD]
    for name, program in PROGRAMS.items():
        lines.append(f"## vidssl {name}\n")
        lines += section_lines(tree_of(program.cls()), name, shown)
    return "\n".join(lines).rstrip() + "\n"


def section_lines(node: SectionNode, program: str, shown: dict[str, str]) -> Iterator[str]:
    """A table of the keys of a section, then its parts and sections. shown: what has a table already, and
    where it is."""
    keys = [child for child in node.children.values() if isinstance(child, KeyNode)]
    if keys:
        yield f"{HEADER}\n|---|---|---|"
        yield from key_rows(keys)
        yield ""
    for child in node.children.values():
        if isinstance(child, KeyNode):
            continue
        yield f"### {program}: {child.path}\n"
        if isinstance(child, PartNode):
            yield from part_lines(child, program, shown)
            continue
        what = f"{child.cls.__qualname__} without {child.supplied}"
        if what in shown:
            yield f"As [{shown[what]}](#{anchor(shown[what])}).\n"
            continue
        shown[what] = f"{program}: {child.path}"
        yield f"{sentence(child.about)}\n"
        yield from section_lines(child, program, shown)


def part_lines(node: PartNode, program: str, shown: dict[str, str]) -> Iterator[str]:
    """The kinds of a part with what each is, and one table of the keys of all."""
    optional = " It may be left out." if node.choice.is_optional or node.choice.is_list else ""
    yield f"{sentence(node.about or 'a part')}{' A list.' * node.choice.is_list}{optional}\n"
    what = f"{list(node.kinds)} without {node.choice.supplied}"
    if what in shown:
        yield f"Its kinds are those of [{shown[what]}](#{anchor(shown[what])}).\n"
        return
    shown[what] = f"{program}: {node.path}"
    yield "| kind | what it is |\n|---|---|"
    for kind in node.kinds.values():
        yield f"| `{kind.kind}` | {cell(first_sentence(kind.about))} |"
    yield ""
    kinds_of: dict[str, list[str]] = {}
    for kind in node.kinds.values():
        for line in key_rows([c for c in kind.children.values() if isinstance(c, KeyNode)]):
            kinds_of.setdefault(line, []).append(kind.kind)
    if kinds_of:
        yield f"{HEADER} kind |\n|---|---|---|---|"
    for line, kinds in kinds_of.items():
        yield f"{line} {'all' if len(kinds) == len(node.kinds) > 1 else ', '.join(kinds)} |"
    yield ""
    children = [c for kind in node.kinds.values() for c in kind.children.values()]
    for part in {c.path: c for c in children if isinstance(c, PartNode)}.values():
        yield f"### {program}: {part.path}\n"
        yield from part_lines(part, program, shown)


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def key_rows(keys: list[KeyNode]) -> Iterator[str]:
    """Keys with defaults, types and meanings; the fields of what a list holds follow it."""
    for key in keys:
        yield row(key, key.path)
        for field in key.children.values():
            yield row(field, f"{key.path.rpartition('.')[2]}: {field.path.rpartition('.')[2]}")


def row(key: KeyNode, name: str) -> str:
    default = default_text(key.declared.default)
    shown = "**required**" if default == "(required)" else f"`{default}`"
    return f"| `{name}` | {shown} | {cell(type_and_meaning(key.declared))} |"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in "-_ ")
    return kept.replace(" ", "-")


if __name__ == "__main__":
    run_cli(main)

"""All keys of a configuration as a tree, for --help, docs/configuration.md and completion; without torch."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, get_args, get_type_hints

import yaml

from vidssl.config import (
    RENAMED_VALUES,
    SHIPPED,
    Arguments,
    Choice,
    UnknownKeyError,
    choice_of,
    declarations,
    default_of,
    keys_of,
)
from vidssl.config.signatures import Declaration, Part, meanings
from vidssl.core.errors import UserError

# the parser in C is eight times as fast; an installation may lack it
FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Kinds = tuple[tuple[str, str], ...]  # (key of a part, its kind)


@dataclass(frozen=True)
class KeyNode:
    """A key with a value. kinds: the parts' kinds with which it exists."""

    path: str
    declared: Declaration
    kinds: Kinds = ()

    @cached_property
    def children(self) -> dict[str, "KeyNode"]:
        """The fields of what a list or mapping of this key holds."""
        record = _record_of(self.declared.hint)
        if record is None:
            return {}
        hints = get_type_hints(record, include_extras=True)
        texts = meanings(record)
        if dataclasses.is_dataclass(record):
            defaults = {f.name: default_of(f) for f in dataclasses.fields(record)}
        else:
            defaults = dict(record._field_defaults)
        return {
            name: KeyNode(
                f"{self.path}.{name}",
                Declaration(hint, defaults.get(name, inspect.Parameter.empty), texts.get(name, "")),
                self.kinds,
            )
            for name, hint in hints.items()
            if not name.startswith("_")
        }


@dataclass(frozen=True)
class KindNode:
    """One kind of a part."""

    path: str  # of the part
    kind: str
    factory: Callable[..., Any]
    supplied: tuple[str, ...]
    kinds: Kinds

    @property
    def about(self) -> str:
        return documentation(self.factory)

    @cached_property
    def children(self) -> dict[str, "KeyNode | SectionNode | PartNode"]:
        declared = parameters_of(self.factory)
        kinds = (*self.kinds, (self.path, self.kind))
        found: dict[str, KeyNode | SectionNode | PartNode] = {}
        for name, d in declared.items():
            if name not in self.supplied:
                path = f"{self.path}.{name}"
                # a dataclass is a value here, a mapping
                found[name] = _node(path, d, kinds) if choice_of(d.hint) else KeyNode(path, d, kinds)
        return found


@dataclass(frozen=True)
class PartNode:
    """A part that is chosen by its kind."""

    path: str
    about: str
    choice: Choice
    outer: Kinds

    @cached_property
    def kinds(self) -> dict[str, KindNode]:
        supplied = self.choice.supplied
        return {
            kind: KindNode(self.path, kind, factory, supplied, self.outer)
            for kind, factory in self.choice.table.items()
        }


@dataclass(frozen=True)
class SectionNode:
    """A section: a mapping of keys."""

    path: str
    about: str
    cls: type
    supplied: tuple[str, ...] = ()
    kinds: Kinds = ()

    @cached_property
    def children(self) -> dict[str, "KeyNode | SectionNode | PartNode"]:
        hints = get_type_hints(self.cls, include_extras=True)
        texts = meanings(self.cls)
        return {
            f.name: _node(
                f"{self.path}.{f.name}".lstrip("."),
                Declaration(hints[f.name], default_of(f), texts.get(f.name, "")),
                self.kinds,
            )
            for f in dataclasses.fields(self.cls)
            if f.name not in self.supplied
        }


@cache
def tree_of(cls: type) -> SectionNode:
    """The tree of a configuration class."""
    return SectionNode("", first_sentence(cls.__doc__ or ""), cls)


def _node(path: str, declared: Declaration, kinds: Kinds) -> "KeyNode | SectionNode | PartNode":
    choice = choice_of(declared.hint)
    if isinstance(choice, Choice):
        return PartNode(path, declared.meaning, choice, kinds)
    if isinstance(choice, Arguments):
        assert isinstance(choice.factory, type)
        return SectionNode(path, section_text(choice.factory), choice.factory, choice.supplied, kinds)
    if dataclasses.is_dataclass(declared.hint):
        assert isinstance(declared.hint, type)
        return SectionNode(path, section_text(declared.hint), declared.hint, (), kinds)
    return KeyNode(path, declared, kinds)


def parameters_of(factory: Callable[..., Any]) -> dict[str, Declaration]:
    """The parameters of a part with their meanings, from the source where it has them."""
    part = _in_source(factory)
    return part.declarations() if part else declarations(factory)


def documentation(factory: Callable[..., Any] | Part) -> str:
    """The docstring of a part."""
    if part := _in_source(factory):
        return part.docstring()
    inner = factory.load() if isinstance(factory, Part) else factory
    while isinstance(inner, partial):
        inner = inner.func
    return inspect.getdoc(inner) or ""


def _in_source(factory: Callable[..., Any] | Part) -> Part | None:
    """The part, if it is in the table as the source has it, not added to it since."""
    return factory if isinstance(factory, Part) and factory.kind in factory.table.expressions() else None


def section_text(cls: type) -> str:
    """What the docstring of a section says behind its name."""
    return first_sentence(re.sub(r"^The `\w+` section[.:]\s+", "", cls.__doc__ or ""))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    match = re.match(r"(.*?(?<!\beq)(?<! al))\.(?=\s+[\"'(A-Z]|$)", paragraph)
    return match[1] if match else paragraph


def _record_of(hint: Any) -> Any:
    """The dataclass or named tuple that a hint holds, alone or in a list."""
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields")):
        return hint
    return next((r for a in get_args(hint) if (r := _record_of(a)) is not None), None)


def find_topic(cls: type, topic: str) -> Sequence[Any]:
    """The nodes that a dotted topic names: a section, a part, a kind, a key; several where kinds of a part
    have a key of that name. Raises UserError with the nearest one."""
    nodes: list[Any] = [tree_of(cls)]
    names = topic.split(".")
    for depth, name in enumerate(names):
        found = [child for node in nodes for child in _step(node, name)]
        if not found:
            parent = ".".join(names[:depth])
            allowed = list(dict.fromkeys(n for node in nodes for n in _names_below(node)))
            where = f"--help {topic}" if depth == len(names) - 1 else f"--help {topic}: {parent}"
            key = ".".join(names[: depth + 1])
            error = UnknownKeyError(key, "key", allowed, where)
            raise UserError(f"{error}; {error.hint([*keys_of(cls), *_sections_below(tree_of(cls))])}")
        nodes = found
    return nodes


def _step(node: Any, name: str) -> Iterator[Any]:
    """The children of a name; of a part its kind, or the keys of that name in any of its kinds."""
    if not isinstance(node, PartNode):
        yield from [node.children[name]] if name in node.children else []
        return
    name = RENAMED_VALUES.get((f"{node.path}.kind", name), name)
    if name == "kind":
        yield node
    elif name in node.kinds:
        yield node.kinds[name]
    else:
        yield from (kind.children[name] for kind in node.kinds.values() if name in kind.children)


def _names_below(node: Any) -> list[str]:
    if not isinstance(node, PartNode):
        return list(node.children)
    return ["kind", *node.kinds, *(name for kind in node.kinds.values() for name in kind.children)]


def _sections_below(node: Any) -> Iterator[str]:
    for child in node.children.values():
        if isinstance(child, SectionNode | PartNode):
            yield child.path
        if isinstance(child, SectionNode):
            yield from _sections_below(child)


def shipped_values(node: KeyNode, folder: str) -> dict[str, list[str]]:
    """Value, as it is written there -> names of the shipped files of a folder that give it to a key."""
    *_, name = node.path.split(".")
    found: dict[str, list[str]] = {}
    for path in sorted((SHIPPED / folder).glob("*.yaml")):
        text = path.read_text("utf-8")
        if re.search(rf"\b{name}:", text):
            root = yaml.compose(text, Loader=FastLoader)
            for value in _values_at(root, node.path.split("."), "", dict(node.kinds)):
                names = found.setdefault(_text_of(value), [])
                names += [path.stem] * (path.stem not in names)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _values_at(
    node: yaml.Node, names: Sequence[str], at: str, kinds: Mapping[str, str]
) -> Iterator[yaml.Node]:
    """The values of a dotted key, in every item of a list on its way; at: the key of the node."""
    if isinstance(node, yaml.SequenceNode) and (names or at in kinds):
        for item in node.value:
            yield from _values_at(item, names, at, kinds)
        return
    entries = {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
    if at in kinds and ("kind" not in entries or entries["kind"].value != kinds[at]):
        return
    if not names:
        yield node
    elif names[0] in entries:
        yield from _values_at(entries[names[0]], names[1:], f"{at}.{names[0]}".lstrip("."), kinds)


def _text_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(_text_of, node.value))}]"
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{key.value}: {_text_of(value)}' for key, value in node.value)}}}"
    return str(node.value)

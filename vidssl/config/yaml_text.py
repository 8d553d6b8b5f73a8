"""YAML whose scalars keep their text.

YAML reads `2024_01_31` as an integer, `1e3` as a number and `no` as false. Here such a scalar is a `Scalar`
with both readings, so that the caller can take the text where it wants a string. Interpolation does not
exist: `${x}` is text.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import yaml

from vidssl.core.errors import UserError

TAG = "tag:yaml.org,2002:"
NULL, BOOL, INT, FLOAT, STR, MERGE = (TAG + name for name in ("null", "bool", "int", "float", "str", "merge"))
TRUE = ("true", "yes", "on")


class Scalar(NamedTuple):
    """A scalar that YAML does not read as a string: its value, and its text."""

    value: bool | int | float | None
    text: str


class Argument(NamedTuple):
    """The value of a key=value argument: not read as YAML before the type of the key is known."""

    text: str


class Loader(yaml.SafeLoader):
    """SafeLoader with decimal numbers only: 010 is ten, 1e-3 a float, 1:30 and dates are strings."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in (
    (BOOL, r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    (INT, r"[-+]?(?:0x[0-9a-fA-F]+|[0-9][0-9_]*)", "-+0123456789"),
    (
        FLOAT,
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (MERGE, "<<", "<"),
):
    Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Dicts with keys of type str, lists, strings and Scalars. Raises UserError with `where` if not YAML."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        return Scalar(None, "") if node is None else _convert(loader, node, ())
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{where}: {' '.join(str(e).split())}") from None


def _convert(loader: Loader, node: yaml.Node, parents: tuple[yaml.Node, ...]) -> Any:
    if node in parents:
        raise yaml.YAMLError(f"an alias contains itself, line {node.start_mark.line + 1}")
    parents = (*parents, node)
    if isinstance(node, yaml.ScalarNode):
        return _convert_scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_convert(loader, item, parents) for item in node.value]
    _check_keys(node)
    loader.flatten_mapping(node)
    return {key.value: _convert(loader, value, parents) for key, value in node.value}


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"a key must be a word, line {line}")
        if key.value in seen:
            raise yaml.YAMLError(f"found duplicate key {key.value}, line {line}")
        seen.add(key.value)


def _convert_scalar(node: yaml.ScalarNode) -> str | Scalar:
    text = node.value
    digits = text.replace("_", "")
    if node.tag == STR:
        return text
    if node.tag == NULL:
        return Scalar(None, text)
    if node.tag == BOOL:
        return Scalar(text.lower() in TRUE, text)
    if node.tag == INT:
        return Scalar(int(digits, 16 if "x" in digits else 10), text)
    if node.tag == FLOAT:
        return Scalar(float(re.sub(r"\.(?=inf|nan)", "", digits.lower())), text)
    raise yaml.YAMLError(f"no tag {node.tag} is known, line {node.start_mark.line + 1}")


def list_argument(key: str, items: Iterable[object]) -> str:
    """key=[...] that is read as the texts of the items: paths and names may contain what YAML has a use for,
    such as a comma or '#'."""
    quoted = {"default_style": '"', "default_flow_style": True, "allow_unicode": True, "width": math.inf}
    return f"{key}={yaml.safe_dump([*map(str, items)], **quoted).strip()}"


def plain(node: Any) -> Any:
    """The values of a tree as YAML reads them, without their texts."""
    if isinstance(node, Argument):
        node = parse_yaml(node.text, f"'{node.text}'")
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return [plain(item) for item in node] if isinstance(node, list) else node

"""Configuration: YAML files and key=value on the command line become one strict tree of keyword arguments.

A section is the keyword arguments of one callable, or `kind` + the keyword arguments of TABLE[kind]. Defaults live in
the callables' signatures only. An unknown key or kind, a wrong type, or two files that set the same key is an error
that names file, key and what is allowed.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write


class Part(NamedTuple):
    """A section of the schema: what it configures, and the arguments that the code itself gives."""

    table: Mapping[str, Callable] | Callable
    given: tuple[str, ...] = ()


class Value(NamedTuple):
    """A single value of the schema."""

    hint: Any
    default: Any = inspect.Parameter.empty


Schema = Mapping[str, Any]  # nested: names -> Part | Value | Schema

# Types of values. The signature is where a value's bounds stand, once.
Names = Annotated[  # one name, or several
    list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)
]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the first must not be larger than the second")
    return pair


Range = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]  # from, to


def load(argv: list[str], schema: Schema) -> dict[str, Any]:
    """Files and overrides -> the resolved tree: validated, with every default written out."""
    tree, origin = merge(argv)
    return _fill(tree, schema, "", origin)


def merge(argv: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """-> (the merged tree, {dotted key: the file or argument that set it})."""
    merged: Any = OmegaConf.create({})
    origin: dict[str, str] = {}
    for item in sorted(argv, key=lambda a: "=" in a):  # stable: files first, then overrides
        if "=" in item:
            part = _read(partial(OmegaConf.from_dotlist, [item]), item)
        elif item.endswith((".yaml", ".yml")):
            if not Path(item).is_file():
                raise UserError(f"{item}: no such file")
            part = _read(partial(OmegaConf.load, item), item)
        else:
            raise UserError(f"'{item}' is neither a .yaml file nor key=value")
        if not isinstance(part, DictConfig):
            raise UserError(f"{item}: not a mapping of sections")
        if missing := OmegaConf.missing_keys(part):
            raise UserError(f"{item}: '{sorted(missing)[0]}' is '???': give a value")
        for key in _leaves(OmegaConf.to_container(part), ""):
            clash = next(
                (k for k in origin if k == key or k.startswith(key + ".") or key.startswith(k + ".")), None
            )
            if clash and "=" not in item:
                raise UserError(
                    f"{item}: '{key}' is already set by {origin[clash]}; give it on the command line to override"
                )
            origin[key] = item
        merged = OmegaConf.merge(merged, part)
    return _read(lambda: OmegaConf.to_container(merged, resolve=True), "configuration"), origin


def _read(action: Callable[[], Any], where: str) -> Any:
    try:
        return action()
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as e:
        raise UserError(f"{where}: {' '.join(str(e).split())}") from None


def _leaves(node: Any, at: str) -> list[str]:
    if not isinstance(node, dict) or (at and not node):
        return [at]
    return [leaf for k, v in node.items() for leaf in _leaves(v, f"{at}.{k}" if at else str(k))]


def _where(key: str, origin: dict[str, str]) -> str:
    """'file: key' of the file that set `key` or something in it."""
    for k, source in origin.items():
        if k == key or k.startswith(key + "."):
            return f"{source}: {key}" if "=" not in source else f"'{source}'"
    return key


def _fill(node: Any, schema: Schema, at: str, origin: dict[str, str]) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise UserError(f"{_where(at, origin)}: must be a mapping with {sorted(schema)}")
    for key in node:
        if key not in schema:
            path = f"{at}.{key}" if at else str(key)
            raise UserError(f"{_where(path, origin)}: unknown section; allowed: {', '.join(schema)}")
    out = {}
    for key, part in schema.items():
        path = f"{at}.{key}" if at else key
        if isinstance(part, Value):
            out[key] = _check(node.get(key, part.default), part.hint, path, origin)
        else:
            fill = _arguments if isinstance(part, Part) else _fill
            out[key] = fill(node.get(key, {}), part, path, origin)
    return out


def _arguments(node: Any, part: Part, at: str, origin: dict[str, str]) -> dict[str, Any]:
    """The section's keyword arguments, checked and completed from the signature."""
    if not isinstance(node, dict):
        raise UserError(f"{_where(at, origin)}: must be a mapping of arguments")
    values, out = dict(node), {}
    target = part.table
    if isinstance(target, Mapping):
        allowed = ", ".join(target)
        if "kind" not in values:
            raise UserError(f"{_where(at, origin)}: 'kind' is missing; allowed: {allowed}")
        kind = values.pop("kind")
        if not isinstance(kind, str) or kind not in target:
            raise UserError(f"{_where(at + '.kind', origin)}: no kind '{kind}'; allowed: {allowed}")
        out["kind"], target = kind, target[kind]
    parameters = {k: p for k, p in inspect.signature(target).parameters.items() if k not in part.given}
    hints = _hints(target)
    for key in values:
        if key not in parameters:
            raise UserError(
                f"{_where(f'{at}.{key}', origin)}: unknown key; allowed: {', '.join(parameters) or 'none'}"
            )
    for key, p in parameters.items():
        out[key] = _check(values.get(key, p.default), hints[key], f"{at}.{key}", origin)
    return out


def _check(value: Any, hint: Any, at: str, origin: dict[str, str]) -> Any:
    """The value as plain data, once it is of the type that the hint asks for."""
    if value is inspect.Parameter.empty:
        raise UserError(
            f"'{at}' is missing (expected {_name(hint)}): set it in a file, or {at}=... on the command line"
        )
    adapter = TypeAdapter(hint)
    try:
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError as e:
        first = e.errors()[0]
        inside = "".join(f"[{i}]" for i in first["loc"])
        raise UserError(
            f"{_where(at, origin)}{inside}: {first['msg'].lower()}, not {first['input']!r} (expected {_name(hint)})"
        ) from None


def _hints(target: Callable) -> dict[str, Any]:
    while isinstance(target, partial):
        target = target.func
    plain_class = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    return get_type_hints(target.__init__ if plain_class else target, include_extras=True)  # type: ignore[misc]


def _name(hint: Any) -> str:
    """A type as a reader would write it."""
    if hasattr(hint, "__metadata__"):
        hint = get_args(hint)[0]
    return str(hint).replace("typing.", "") if get_args(hint) else getattr(hint, "__name__", str(hint))


def build(values: dict[str, Any], table: Mapping[str, Callable] | Callable, **given: Any) -> Any:
    """Call what a filled section configures."""
    values = dict(values)
    target = table[values.pop("kind")] if isinstance(table, Mapping) else table
    hints = _hints(target)
    typed = {
        k: TypeAdapter(hints[k]).validate_python(v) for k, v in values.items()
    }  # lists -> tuples and the like
    return target(**typed, **given)


def save(tree: dict[str, Any], path: Path) -> None:
    """Write a resolved tree as YAML; it is itself a runnable configuration."""
    atomic_write(path, lambda beside: beside.write_text(yaml.safe_dump(tree, sort_keys=False)))


def differences(a: Any, b: Any, free: Sequence[str] = (), at: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) wherever two trees differ; None where a key is absent. free: dotted keys
    that may differ, with all below them."""
    if at in free:
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for k in keys for d in differences(a.get(k), b.get(k), free, f"{at}.{k}" if at else k)]
    return [] if a == b else [(at, a, b)]

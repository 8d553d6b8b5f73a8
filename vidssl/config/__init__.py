"""Configuration: YAML files and key=value arguments are merged and validated into nested frozen dataclasses.

A field of a configuration class is one of three things: a section (a dataclass of its own), a `Spec` (the
keyword arguments of one callable, chosen by `kind` from a table), or a plain value. Defaults live only in the
signatures of the classes and callables. Raises UserError with file, key and the allowed values for an unknown
key or kind, a wrong type (true, "3" and 3.0 are rejected as integers), or two files that set the same key.
"""

import dataclasses
import difflib
import inspect
import json
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from vidssl.config.signatures import Declaration, Part
from vidssl.config.yaml_text import Argument, Scalar, parse_yaml, plain
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text
from vidssl.core.log import logger

# Types of values; each states its bounds once.
Text = Annotated[str, Field(min_length=1)]  # a path or a name
Names = Annotated[list[Text], Field(min_length=1)]  # one name, or several
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _check_ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the first must not be larger than the second")
    return pair


Range = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_check_ascending)]  # from, to
IntRange = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_check_ascending)]  # from, to


def _no_part(**supplied: Any) -> None:
    """Builds nothing: the factory of an absent part."""


@dataclass(frozen=True)
class Spec:
    """A callable and its validated keyword arguments: a part that is built later."""

    kind: str | None  # name in the table; None: there is no choice
    arguments: dict[str, Any]
    factory: Callable[..., Any] = field(compare=False, repr=False)

    @property
    def is_absent(self) -> bool:
        """Whether it stands for an optional part that the configuration does not have."""
        return self.factory is _no_part

    def build(self, **supplied: Any) -> Any:
        """Calls the factory; `supplied` are the arguments that code supplies, not the user."""
        return self.factory(**self.arguments, **supplied)


class Choice(NamedTuple):
    """Annotation of a Spec field: `kind` selects a callable from `table`."""

    table: Mapping[str, Callable[..., Any]]
    supplied: tuple[str, ...] = ()  # parameters that code supplies
    is_optional: bool = False  # without it the Spec is absent and builds None
    is_list: bool = False  # the field is a tuple of Specs


class Arguments(NamedTuple):
    """Annotation of a Spec field: the keyword arguments of one callable, without `kind`."""

    factory: Callable[..., Any]
    supplied: tuple[str, ...] = ()  # parameters that code supplies


class Source(NamedTuple):
    """Where a key was set: a file, or a key=value argument."""

    text: str
    is_file: bool = True


Origin = Mapping[str, Source]  # by dotted key
Config = TypeVar("Config")

# Old name of a key -> its present name; an unknown key that is listed here is reported with its present name.
RENAMED = {
    "watch": "online_probe",
    "optim.settle": "optim.schedule_steps",
    "optim.stretch": "optim.ipe_scale",
    "optim.momentum": "method.target.momentum",
    "optim.lr_start": "optim.warmup_lr",
    "optim.lr_end": "optim.final_lr",
    "optim.lr_per": "optim.lr_batch",
    "optim.lr_rule": "optim.lr_scaling",
    "optim.clip_each": "optim.clip_per_module",
    "optim.decay": "optim.lr_decay",
    "optim.layer_decay": "optim.layer_lr_decay",
    "optim.clip_from": "optim.clip_start",
    "optim.weight_decay_end": "optim.final_weight_decay",
    "online_probe.keep_mb": "online_probe.memory_mb",
    "run.spike": "run.loss_spike_std",
    "run.skip_bad": "run.max_consecutive_skips",
    "run.rollbacks": "run.max_rollbacks",
    "run.keep": "run.keep_last",
    "run.window": "run.shuffle_window",
    "run.health_every": "run.feature_stats_every",
    "data.also": "data.extra_streams",
    "data.max_bad": "data.max_decode_error_rate",
    "data.deadline": "data.decode_timeout_s",
    "data.share": "data.train_fractions",
    "efficiency.recompute": "efficiency.activation_checkpointing",
    "efficiency.isolate": "efficiency.decode_in_subprocess",
    "efficiency.keep_memory": "efficiency.tune_malloc",
    "efficiency.timeout": "efficiency.peer_timeout_s",
    "augment.erase": "augment.random_erasing",
    "augment.erase_mode": "augment.random_erasing_mode",
    "augment.colour": "augment.color_jitter",
    "augment.color_jitter.chance": "augment.color_jitter.p",
    "augment.color_jitter.grey": "augment.color_jitter.grayscale_p",
    "method.mask.floor": "method.mask.keep_quantile",
    "method.mask.published": "method.mask.reference_quirks",
    "method.mask.decode_ratio": "method.mask.decoder_drop_ratio",
    "probe.pool": "probe.aggregate",
    "probe.clip": "probe.clip_grad",
    "probe.stream": "probe.recompute",
    "probe.slices": "probe.temporal_bins",
    "probe.held_out": "probe.val_fraction",
    "task.held_out": "task.val_fraction",
    "task.levels": "task.layers",
    "task.context": "task.context_frames",
    "task.windows": "task.encode_batch",
    "data.limit": "data.max_train_sequences",
    "tune.held_out": "tune.val_fraction",
    "tune.smoothing": "tune.label_smoothing",
}
# Key that no longer exists -> what there is instead; stored configurations are read without it.
REMOVED = {
    "efficiency.cache_mb": "data.cache keeps decoded videos",
    "dry_run": "give --dry-run",
}
# The same for values: (key, old value) -> present value.
RENAMED_VALUES = {
    ("data.rule", "reference"): "vjepa",
    ("method.mask.kind", "blocks"): "multiblock_3d",
    ("method.mask.kind", "block"): "single_block",
    ("method.mask.kind", "multiblock"): "multiblock_2d",
}
MAX_LISTED = 8  # names in a message
# key=value, or --key=value
ARGUMENT = re.compile(r"(?:--)?((?:\w+\.)*\w+)=(.*)", re.DOTALL)


def load_config(argv: Sequence[str], cls: type[Config]) -> Config:
    """The configuration that files and key=value arguments describe."""
    tree, origin = _merge(argv)
    return _build(tree, cls, origin)


def from_tree(tree: Any, cls: type[Config], source: str) -> Config:
    """The configuration of a stored tree; absent options get their defaults, and those that were removed are
    left out, which a line says. source: its file, for messages."""
    kept = _without_removed(tree, "", source)
    return _build(kept, cls, _origin_of(kept, "", Source(source)))


def _without_removed(node: Any, key_path: str, source: str) -> Any:
    if not isinstance(node, dict):
        return node
    kept = {}
    for name, value in node.items():
        key = _join(key_path, name)
        if key in REMOVED:
            logger.info(f"{source}: {key} was removed since and does nothing now; {REMOVED[key]}")
        else:
            kept[name] = _without_removed(value, key, source)
    return kept


def to_tree(cfg: Any) -> dict[str, Any]:
    """Plain resolved tree of a configuration dataclass, every default included; itself a runnable
    configuration."""
    hints = get_type_hints(type(cfg), include_extras=True)
    return {f.name: _dump(getattr(cfg, f.name), hints[f.name]) for f in dataclasses.fields(cfg)}


def merge(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Source]]:
    """Returns (merged tree, {dotted key: where it was set}). Arguments override files, in any order."""
    tree, origin = _merge(argv)
    return plain(tree), origin


def _merge(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Source]]:
    """As `merge`; the leaves of the tree keep their texts."""
    files = [item for item in argv if is_config_file(item)]
    arguments = [_split_argument(item) for item in argv if not is_config_file(item)]
    overridden = [key for _, key, _ in arguments]
    tree: dict[str, Any] = {}
    origin: dict[str, Source] = {}
    for source in map(Source, files):
        part = _read_file(source.text)
        keys = [key for key in _leaves(part, "") if not any(_overlap(key, k) for k in overridden)]
        _check_set_once(source, keys, origin)
        origin.update(dict.fromkeys(_leaves(part, ""), source))
        _merge_into(tree, part)
    for source, key, part in arguments:
        # a value for the section replaces what files say of its keys
        for replaced in [k for k in origin if _overlap(k, key) and not isinstance(_at(part, key), dict)]:
            del origin[replaced]
        origin.update(dict.fromkeys(_leaves(part, ""), source))
        _merge_into(tree, part)
    return tree, origin


def _check_set_once(source: Source, keys: Sequence[str], origin: Origin) -> None:
    """Raises UserError if an earlier file sets one of the keys as well."""
    twice = [(key, origin[k].text) for key in keys for k in origin if _overlap(k, key)]
    if not twice:
        return
    key, earlier = twice[0]
    if Path(earlier).parent == Path(source.text).parent and len(twice) > 1:
        raise UserError(
            f"{source.text}: '{key}' and {len(twice) - 1} more keys are already set by {earlier}; "
            f"give one of the two files"
        )
    raise UserError(
        f"{source.text}: '{key}' is already set by {earlier}; give {key}=VALUE on the command line to choose"
    )


def _merge_into(tree: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        old = tree.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _is_other_kind(old, value):
            _merge_into(old, value)
        else:
            tree[key] = value


def _is_other_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether an argument KEY={kind: ...} names another kind: what files say is of the kind that they
    name."""
    kinds = [plain(part.get("kind")) for part in (old, new)]
    return isinstance(new, TextMapping) and None not in kinds and kinds[0] != kinds[1]


def is_config_file(item: str) -> bool:
    """Whether an argument names a YAML file; its path may contain "="."""
    if not item.endswith((".yaml", ".yml")):
        return False
    return "=" not in item or Path(item).is_file() or not ARGUMENT.match(item)


def _overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")


SHIPPED = Path(__file__).parents[1] / "configs"  # a link in the source tree, a folder where it is installed


def find_config(path: str) -> Path:
    """The file itself, or the shipped one where a path that begins with configs/ does not exist."""
    name = Path(path)
    if name.is_file() or name.parts[:1] != ("configs",):
        return name
    shipped = SHIPPED.joinpath(*name.parts[1:])
    return shipped if shipped.is_file() else name


def _read_file(path: str) -> dict[str, Any]:
    file = find_config(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file{_nearest_file(path)}")
    tree = parse_yaml(file.read_bytes(), path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a mapping of sections")
    return tree


def _nearest_file(path: str) -> str:
    folder = Path(path).parent
    seen = folder
    if folder.parts[:1] == ("configs",) and not folder.is_dir():
        seen = SHIPPED.joinpath(*folder.parts[1:])
    names = sorted(p.name for p in seen.glob("*.y*ml")) if seen.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _split_argument(item: str) -> tuple[Source, str, dict[str, Any]]:
    """Returns (source, dotted key, tree with that key) of a key=value argument; --key=value is the same."""
    match = ARGUMENT.match(item)
    if not match:
        example = f"{item.lstrip('-')}=VALUE" if re.fullmatch(r"-*[\w.]+", item) else "key=value"
        raise UserError(f"'{item}' is neither a .yaml file nor key=value, such as {example}")
    key, text = match.groups()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key}=...: the value is not valid UTF-8") from None
    value: Any = Argument(text)
    if text.startswith("{") and isinstance(mapping := _as_mapping(text), dict):
        value = TextMapping(mapping, text)
    for name in reversed(key.split(".")):
        value = {name: value}
    return Source(item, is_file=False), key, value


def _as_mapping(text: str) -> Any:
    try:
        return parse_yaml(text, text)
    except UserError:
        # not YAML: text, unless the key says otherwise
        return None


class TextMapping(dict[str, Any]):
    """The value of an argument KEY={...}: a mapping, or its text where the key is a string."""

    def __init__(self, values: dict[str, Any], text: str):
        super().__init__(values)
        self.text = text


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _leaves(node: Any, key_path: str) -> Iterator[str]:
    """Dotted keys of the values of a tree."""
    if not isinstance(node, dict) or (key_path and not node):
        yield key_path
        return
    for key, value in node.items():
        yield from _leaves(value, _join(key_path, key))


def _origin_of(tree: Any, key_path: str, source: Source) -> Origin:
    return dict.fromkeys(_leaves(tree, key_path), source)


def _join(key_path: str, key: Any) -> str:
    return f"{key_path}.{key}" if key_path else str(key)


def _where(key: str, origin: Origin) -> str:
    """'file: key', or the argument, that set `key` or something below it."""
    for k, source in origin.items():
        if k == key or k.startswith(key + "."):
            return f"{source.text}: {key}" if source.is_file else f"'{source.text}'"
    return key


# Sections that one program has: the file of another program is given by mistake.
SECTION_OWNERS = {
    "method": "train",
    "run": "train",
    "probe": "probe",
    "tune": "finetune",
    "task": "dense",
    "runs": "zoo-run",
}


class UnknownKeyError(UserError):
    """A key that does not exist. key: dotted; allowed: the names of its section; where: file and key, or the
    argument."""

    def __init__(self, key: str, what: str, allowed: Sequence[str], where: str):
        super().__init__(f"{where}: unknown {what} '{key}'")
        self.key = key
        self.allowed = allowed

    def hint(self, all_keys: Sequence[str]) -> str:
        """The present name of an old key, or the nearest one."""
        if self.key in REMOVED:
            return f"it was removed; {REMOVED[self.key]}"
        if self.key in RENAMED:
            return f"it is called {RENAMED[self.key]} now"
        if near := _nearest_key(self.key, self.allowed, all_keys):
            return f"did you mean {near}?"
        if self.key in SECTION_OWNERS:
            return f"it belongs to vidssl {SECTION_OWNERS[self.key]}"
        is_short = 0 < len(self.allowed) <= MAX_LISTED
        return f"allowed: {', '.join(self.allowed)}" if is_short else "see --help"


class MissingKeyError(UserError):
    """A key without a value and without a default."""


def _build(tree: Any, cls: type[Config], origin: Origin) -> Config:
    try:
        return _section(tree, cls, "", origin)
    except UnknownKeyError as e:
        raise UserError(f"{e}; {e.hint(keys_of(cls))}") from None


def _nearest_key(key: str, allowed: Sequence[str], all_keys: Sequence[str]) -> str | None:
    """The most similar key of the same section, else one of that name elsewhere, else any similar one."""
    *sections, name = key.split(".")
    if near := difflib.get_close_matches(name, allowed, n=1, cutoff=0.7):
        return ".".join([*sections, near[0]])
    elsewhere = [k for k in all_keys if k.split(".")[:-1] != sections]
    if same := [k for k in elsewhere if k.split(".")[-1] == name]:
        depth = min(k.count(".") for k in same)  # a key of a section, rather than one of a part
        return " or ".join([k for k in same if k.count(".") == depth][:2])
    return next(iter(difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.7)), None)


def keys_of(cls: type, key_path: str = "") -> list[str]:
    """Dotted keys of a configuration class; of parts that have a kind, those of every kind."""
    hints = get_type_hints(cls, include_extras=True)
    keys: list[str] = []
    for name, hint in hints.items():
        key = _join(key_path, name)
        choice = choice_of(hint)
        if choice is not None:
            keys += keys_of_part(choice, key)
        else:
            keys += keys_of(hint, key) if dataclasses.is_dataclass(hint) else [key]  # type: ignore[arg-type]
    return keys


def keys_of_part(choice: "Choice | Arguments", key_path: str) -> list[str]:
    """Dotted keys of a part; of one that has a kind, those of every kind."""
    keys = [f"{key_path}.kind"] * isinstance(choice, Choice)
    for factory in choice.table.values() if isinstance(choice, Choice) else [choice.factory]:
        for name, declared in declarations(factory).items():
            inner = choice_of(declared.hint)
            key = _join(key_path, name)
            if name not in choice.supplied:
                keys += [key] if inner is None else keys_of_part(inner, key)
    return list(dict.fromkeys(keys))


def _section(node: Any, cls: type[Config], key_path: str, origin: Origin) -> Config:
    """The dataclass `cls` from a mapping of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [f.name for f in fields]
    if not isinstance(node, dict):
        raise UserError(f"{_where(key_path, origin)}: must be a mapping with {', '.join(names)}")
    has_sections = any(choice_of(h) or dataclasses.is_dataclass(h) for h in hints.values())
    for key in node:
        if key not in names:
            what = "section" if has_sections else "key"
            raise UnknownKeyError(_join(key_path, key), what, names, _where(_join(key_path, key), origin))
    values: dict[str, Any] = {}
    missing: list[MissingKeyError] = []
    for f in fields:
        key = _join(key_path, f.name)
        hint = hints[f.name]
        # a wrong key is reported before a missing one, which it may be meant for
        try:
            if choice := choice_of(hint):
                values[f.name] = _parts(node.get(f.name, {}), choice, key, origin)
            elif dataclasses.is_dataclass(hint):
                values[f.name] = _section(node.get(f.name, {}), hint, key, origin)  # type: ignore[arg-type]
            else:
                values[f.name] = _value(node.get(f.name, default_of(f)), hint, key, origin)
        except MissingKeyError as e:
            missing.append(e)
    if missing:
        raise missing[0]
    return cls(**values)


def choice_of(hint: Any) -> Choice | Arguments | None:
    """The annotation of a Spec field."""
    if get_origin(hint) is not Annotated:
        return None
    return next((m for m in hint.__metadata__ if isinstance(m, Choice | Arguments)), None)


def default_of(f: dataclasses.Field) -> Any:
    """The default of a field; Parameter.empty: none."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return inspect.Parameter.empty if f.default is dataclasses.MISSING else f.default


def _parts(node: Any, choice: Choice | Arguments, key_path: str, origin: Origin) -> Spec | tuple[Spec, ...]:
    """The Spec of a field, or all of a list."""
    if not isinstance(choice, Choice):
        return _spec(node, choice, key_path, origin)
    if choice.is_list:
        if isinstance(node, Argument):
            node = parse_yaml(node.text, _where(key_path, origin))
        items = node if isinstance(node, list) else [] if _is_nothing(node) else [node]
        return tuple(_spec(item, choice, f"{key_path}[{i}]", origin) for i, item in enumerate(items))
    if choice.is_optional and _is_nothing(node):
        return Spec(None, {}, _no_part)
    return _spec(node, choice, key_path, origin)


def _is_nothing(node: Any) -> bool:
    return node in (None, {}, Argument("null")) or (isinstance(node, Scalar) and node.value is None)


def _spec(node: Any, choice: Choice | Arguments, key_path: str, origin: Origin) -> Spec:
    """The callable's keyword arguments, validated and completed from its signature."""
    if not isinstance(node, dict):
        raise UserError(f"{_where(key_path, origin)}: must be a mapping of arguments")
    values = dict(node)
    kind = None
    if isinstance(choice, Choice):
        allowed = ", ".join(choice.table)
        if "kind" not in values:
            raise MissingKeyError(f"{_where(key_path, origin)}: 'kind' is missing; allowed: {allowed}")
        kind = _typed(values.pop("kind"), str, _where(key_path + ".kind", origin))
        if not isinstance(kind, str) or kind not in choice.table:
            hint = _renamed_value(f"{key_path}.kind", kind) or f"allowed: {allowed}"
            raise UserError(f"{_where(key_path + '.kind', origin)}: no kind '{kind}'; {hint}")
        factory = choice.table[kind]
    else:
        factory = choice.factory
    parameters = {k: p for k, p in declarations(factory).items() if k not in choice.supplied}
    for key in values:
        if key not in parameters:
            where = _where(_join(key_path, key), origin)
            raise UnknownKeyError(_join(key_path, key), "key", list(parameters), where)
    # those that are given come first: a wrong value is reported before a missing one
    order = sorted(parameters, key=lambda k: k not in values)
    found: dict[str, Any] = {}
    for k in order:
        hint = parameters[k].hint
        if inner := choice_of(hint):
            found[k] = _parts(values.get(k, {}), inner, _join(key_path, k), origin)
        else:
            found[k] = _value(values.get(k, parameters[k].default), hint, _join(key_path, k), origin)
    arguments = {k: found[k] for k in parameters}
    return Spec(kind, arguments, factory)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    """The adapter of a hint, made once: a configuration has a hundred values of some twenty hints."""
    return TypeAdapter(hint)


def _value(value: Any, hint: Any, key_path: str, origin: Origin) -> Any:
    """The value as the type that the hint names; strict, as JSON is: 3 is a float, but 3.0 and true are no
    integers. A string is the text as it was written."""
    if value is inspect.Parameter.empty:
        raise MissingKeyError(
            f"'{key_path}' is missing (expected {describe(hint)}): "
            f"set it in a file, or {key_path}=... on the command line"
        )
    where = _where(key_path, origin)
    value = _typed(value, hint, where)
    _check_finite(value, where)
    try:
        return _adapter(hint).validate_json(json.dumps(value, default=_plain), strict=True)
    except ValidationError as e:
        errors = e.errors()
        # of a hint with alternatives the one that has the value's type; pydantic names it in the location
        first = next((error for error in errors if not error["type"].endswith("_type")), errors[0])
        inner = [str(i) for i in first["loc"] if str(i).isalnum() or str(i).isidentifier()]
        if (key := ".".join([key_path, *inner])) in RENAMED:
            raise UnknownKeyError(key, "key", [], where) from None
        where += "".join(f"[{i}]" for i in inner)
        hint_text = _renamed_value(key_path, value) or f"expected {describe(hint)}"
        raise UserError(f"{where}: {first['msg'].lower()}, not {first['input']!r} ({hint_text})") from None


def _typed(node: Any, hint: Any, where: str) -> Any:
    """A node of a tree as plain values: the text where the hint names a string, otherwise what YAML reads.
    One value where the hint names a list is a list of one."""
    options, is_optional = _options(hint)
    is_text = _are_text(hint)
    items = [item for option in options if (item := _item_type(option)) is not None]
    if isinstance(node, TextMapping) and not is_text and items and _are_text(items[0]):
        return [node.text]
    if isinstance(node, Argument):
        if is_optional and node.text == "null":
            return None
        if is_text:
            return node.text
        is_bracketed = node.text.startswith("[") and node.text.endswith("]")
        if items and not is_bracketed and _are_text(items[0]):
            return [node.text]
        node = parse_yaml(node.text, where)
    if node is None or (isinstance(node, Scalar) and node.value is None):
        return None
    if is_text and isinstance(node, Scalar | TextMapping):
        return node.text
    is_single = isinstance(node, Scalar | str | int | float)
    if is_single and len(options) == len(items) == 1:
        return [_typed(node, items[0], where)]
    if isinstance(node, dict):
        return {key: _typed(value, _field_type(options, key), where) for key, value in node.items()}
    if isinstance(node, list | tuple) and not is_single:
        return [_typed(item, _element_type(options, i), where) for i, item in enumerate(node)]
    return plain(node)


def _options(hint: Any) -> tuple[list[Any], bool]:
    """Returns (the types that a hint allows, without None and annotations, whether None is allowed)."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_options(a) for a in get_args(hint) if a is not type(None)]
        return [o for options, _ in parts for o in options], type(None) in get_args(hint)
    return [hint], False


def _is_text(hint: Any) -> bool:
    """Whether a type is a string, a path, or a choice of strings."""
    if get_origin(hint) is Literal:
        return all(isinstance(value, str) for value in get_args(hint))
    return hint in (str, Path)


def _are_text(hint: Any) -> bool:
    """Whether every type that a hint allows is text."""
    return all(map(_is_text, _options(hint)[0]))


def _item_type(hint: Any) -> Any:
    """The type of the items of a list of any length; None for other types."""
    args = get_args(hint)
    if get_origin(hint) is list or (get_origin(hint) is tuple and args[-1] is Ellipsis):
        return args[0]
    return None


def _element_type(options: Sequence[Any], i: int) -> Any:
    """The type of element i of a list or tuple."""
    for option in options:
        if (item := _item_type(option)) is not None:
            return item
        if get_origin(option) is tuple and i < len(get_args(option)):
            return get_args(option)[i]
        if fields := list(getattr(option, "_fields", ())):
            return get_type_hints(option, include_extras=True)[fields[i]] if i < len(fields) else Any
    return Any


def _field_type(options: Sequence[Any], key: str) -> Any:
    """The type of a field of a mapping."""
    for option in options:
        if get_origin(option) is dict:
            return get_args(option)[1]
        if dataclasses.is_dataclass(option) or hasattr(option, "_fields"):
            return get_type_hints(option, include_extras=True).get(key, Any)
    return Any


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is no finite number")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_finite(item, where)


def _renamed_value(key: str, value: Any) -> str | None:
    new = RENAMED_VALUES.get((key, value)) if isinstance(value, str) else None
    return new and f"it is called {new} now"


def _plain(value: Any) -> Any:
    """A default that is no JSON type (a dataclass, say) as one."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def _dump(value: Any, hint: Any) -> Any:
    if isinstance(value, tuple) and choice_of(hint):
        return [_dump(item, hint) for item in value]
    if isinstance(value, Spec):
        if value.is_absent:
            return {}
        declared = declarations(value.factory)
        arguments = {k: _dump(v, declared[k].hint) for k, v in value.arguments.items()}
        return arguments if value.kind is None else {"kind": value.kind, **arguments}
    if dataclasses.is_dataclass(hint):
        return to_tree(value)
    return TypeAdapter(hint).dump_python(value, mode="json")


def declarations(factory: Callable[..., Any]) -> dict[str, Declaration]:
    """The parameters of a callable; of a part whose module is not imported, from the source."""
    if isinstance(factory, Part):
        if factory.table.loaded() is None:
            return factory.declarations()
        factory = factory.load()
    hints = _hints(factory)
    parameters = inspect.signature(factory).parameters
    return {k: Declaration(hints.get(k, Any), p.default, "") for k, p in parameters.items()}


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(factory, partial):
        factory = factory.func
    plain_class = inspect.isclass(factory) and not dataclasses.is_dataclass(factory)
    signature: Any = factory.__init__ if plain_class else factory  # type: ignore[misc]
    return get_type_hints(signature, include_extras=True)


def describe(hint: Any) -> str:
    """A type as a reader would write it: 'int >= 1', 'list of float > 0, or null'."""
    args = get_args(hint)
    if get_origin(hint) is Annotated:
        return " ".join([describe(args[0]), *_bounds(args[1:])])
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, args))
    if get_origin(hint) in (Union, types.UnionType):
        options = [describe(a) for a in args if a is not type(None)]
        return " or ".join(options + ["null"] * (type(None) in args))
    if (item := _item_type(hint)) is not None:
        return f"list of {describe(item)}"
    if get_origin(hint) is tuple:
        return f"[{', '.join(map(describe, args))}]"
    if get_origin(hint) is dict:
        return f"mapping of {describe(args[1])}"
    if hasattr(hint, "_fields"):
        return f"[{', '.join(hint._fields)}]"
    if dataclasses.is_dataclass(hint):
        return f"{{{', '.join(f.name for f in dataclasses.fields(hint))}}}"
    return getattr(hint, "__name__", str(hint))


SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _bounds(metadata: Sequence[Any]) -> list[str]:
    """The bounds among the metadata of an Annotated type."""
    found = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return [f"{sign} {getattr(m, name)}" for m in found for name, sign in SIGNS.items() if hasattr(m, name)]


def build_from_header(
    values: Mapping[str, Any], table: Mapping[str, Callable[..., Any]] | Callable[..., Any], **supplied: Any
) -> Any:
    """Calls `table`, or table[kind], with plain arguments, such as those of a file's header."""
    values = dict(values)
    factory = table[values.pop("kind")] if isinstance(table, Mapping) else table
    hints = _hints(factory)
    typed = {k: TypeAdapter(hints[k]).validate_python(v) for k, v in values.items()}  # lists become tuples
    return factory(**typed, **supplied)


def save(tree: dict[str, Any], path: Path) -> None:
    """Writes a resolved tree as YAML."""
    atomic_write_text(path, yaml.safe_dump(tree, sort_keys=False))


def differences(
    a: Any, b: Any, ignored: Sequence[str] = (), key_path: str = ""
) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) wherever two trees differ; None where a key is absent.

    ignored: dotted keys that may differ, with all below them.
    """
    if key_path in ignored:
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for k in keys for d in differences(a.get(k), b.get(k), ignored, _join(key_path, k))]
    return [] if a == b else [(key_path, a, b)]

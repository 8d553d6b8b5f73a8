"""Signatures and their comments, read from source files without importing them.

The parts of a method are torch modules, and importing torch takes seconds. A command checks its configuration
and answers --help before that, so a table of parts is read here as text: kinds, parameters, types, defaults.
Once its module is imported, the table itself is used.
"""

import ast
import builtins
import dataclasses
import importlib
import importlib.util
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from inspect import Parameter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

Definition = ast.ClassDef | ast.FunctionDef


class Declaration(NamedTuple):
    """A parameter of a callable, or a field of a dataclass."""

    hint: Any
    default: Any  # Parameter.empty: none
    meaning: str  # its comment


class PartTable(Mapping[str, "Part"]):
    """The dictionary `name` of a module, kind -> callable; the module is imported when a part is built."""

    def __init__(self, module: str, name: str):
        self.module = module
        self.name = name

    def loaded(self) -> Mapping[str, Callable[..., Any]] | None:
        """The dictionary itself, if its module is imported."""
        return getattr(sys.modules.get(self.module), self.name, None)

    def __getitem__(self, kind: str) -> "Part":
        if kind not in list(self):
            raise KeyError(kind)
        return Part(self, kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaded() or self.expressions())

    def __len__(self) -> int:
        return len(list(iter(self)))

    def expressions(self) -> dict[str, ast.expr]:
        """kind -> expression of the callable, as the source has it."""
        table = _top_level(self.module)[self.name]
        assert isinstance(table, ast.Dict), f"{self.module}.{self.name} is no dictionary"
        pairs = zip(table.keys, table.values, strict=True)
        return {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}


class Part(NamedTuple):
    """A callable of a PartTable."""

    table: PartTable
    kind: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)

    def load(self) -> Callable[..., Any]:
        """The callable itself."""
        return getattr(importlib.import_module(self.table.module), self.table.name)[self.kind]

    def declarations(self) -> dict[str, Declaration]:
        """Its parameters, from the source."""
        return _arguments_of(self.table.expressions()[self.kind], self.table.module)

    def docstring(self) -> str:
        """Its docstring, from the source."""
        node: ast.expr = self.table.expressions()[self.kind]
        while isinstance(node, ast.Call):
            node = node.args[0]
        definition = _definition(node.id, self.table.module)[0] if isinstance(node, ast.Name) else None
        return (ast.get_docstring(definition) if isinstance(definition, Definition) else "") or ""

    def module_docstring(self) -> str:
        """The docstring of the module that it is defined in, from the source."""
        node = self.table.expressions()[self.kind]
        home = _definition(node.id, self.table.module)[1] if isinstance(node, ast.Name) else self.table.module
        return ast.get_docstring(ast.parse(_source(home))) or ""

    def given(self) -> dict[str, Any]:
        """The arguments that its entry in the table gives: those of a partial."""
        node = self.table.expressions()[self.kind]
        found: dict[str, Any] = {}
        while isinstance(node, ast.Call):
            found = {k.arg: _evaluate(k.value, self.table.module) for k in node.keywords if k.arg} | found
            node = node.args[0]
        return found


@lru_cache
def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, module
    return Path(spec.origin).read_text("utf-8")


@lru_cache
def _top_level(module: str) -> dict[str, Any]:
    """Name -> its definition at the top of a module: class, function, expression, or (module, name)."""
    found: dict[str, Any] = {}
    for node in ast.parse(_source(module)).body:
        if isinstance(node, Definition):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: (node.module, a.name) for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.asname or a.name: (a.name, None) for a in node.names}
    return found


def _arguments_of(node: ast.expr, module: str) -> dict[str, Declaration]:
    """Parameters of the callable that an expression names: NAME, partial(NAME, ...), or a lambda."""
    if isinstance(node, ast.Lambda):
        return {}
    if isinstance(node, ast.Call):
        given = {k.arg: _evaluate(k.value, module) for k in node.keywords}
        arguments = _arguments_of(node.args[0], module)
        return {k: a._replace(default=given.get(k, a.default)) for k, a in arguments.items()}
    assert isinstance(node, ast.Name), ast.dump(node)
    definition, home = _definition(node.id, module)
    return _fields(definition, home) if _is_dataclass(definition) else _parameters(definition, home)


def _definition(name: str, module: str) -> tuple[Any, str]:
    """Returns (definition of a name, module that contains it), through the project's imports."""
    found = _top_level(module).get(name)
    while isinstance(found, tuple) and found[0].startswith(("vidssl", "data_prep")):
        module, name = found[0], found[1]
        found = _top_level(module).get(name)
    return found, module


def _is_dataclass(node: Definition) -> bool:
    return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def _bases(node: ast.ClassDef, module: str) -> Iterator[tuple[ast.ClassDef, str]]:
    for base in node.bases:
        if isinstance(base, ast.Name):
            definition, home = _definition(base.id, module)
            if isinstance(definition, ast.ClassDef):
                yield definition, home


def _fields(node: ast.ClassDef, module: str) -> dict[str, Declaration]:
    """Fields of a dataclass, those of its bases first, from the last base to the first."""
    fields: dict[str, Declaration] = {}
    for base, home in reversed([*_bases(node, module)]):
        fields |= _fields(base, home) if _is_dataclass(base) else {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if "ClassVar" in ast.unparse(item.annotation):
                continue
            default = Parameter.empty if item.value is None else _evaluate(item.value, module)
            if isinstance(default, dataclasses.Field):
                default = default.default_factory() if callable(default.default_factory) else default.default
            hint = _evaluate(item.annotation, module)
            meaning = _comment(module, item) or _from_docstring(item.target.id, ast.get_docstring(node) or "")
            fields[item.target.id] = Declaration(hint, default, meaning)
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            # a base's field with another default
            name = item.targets[0].id
            if name in fields:
                fields[name] = fields[name]._replace(default=_evaluate(item.value, module))
    return fields


def _parameters(node: Definition, module: str) -> dict[str, Declaration]:
    """Parameters of a function, or of a class's __init__."""
    function = node
    if isinstance(node, ast.ClassDef):
        own = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        if not own:
            return next((_parameters(base, home) for base, home in _bases(node, module)), {})
        function = own[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(positional, defaults, strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    texts = [ast.get_docstring(function) or "", ast.get_docstring(node) or ""]
    return {
        a.arg: Declaration(
            Any if a.annotation is None else _evaluate(a.annotation, module),
            Parameter.empty if default is None else _evaluate(default, module),
            _comment(module, a) or next(filter(None, (_from_docstring(a.arg, t) for t in texts)), ""),
        )
        for a, default in pairs
        if a.arg != "self"
    }


def fields_in_source(module: str, name: str) -> list[str]:
    """Names of the fields of the dataclass `name`."""
    definition, home = _definition(name, module)
    return list(_fields(definition, home))


class Unresolved:
    """Stands for a name of a module that is not imported, such as Tensor."""

    instances: ClassVar[dict[str, type]] = {}

    @classmethod
    def named(cls, name: str) -> type:
        return cls.instances.setdefault(name, type(name, (), {}))


def _evaluate(node: ast.expr, module: str) -> Any:
    """The value of an annotation or default."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    namespace = {name: _resolve(name, module) for name in names}
    return eval(compile(ast.Expression(node), module, "eval"), namespace)


def _resolve(name: str, module: str) -> Any:
    """The value of a name at the top of a module."""
    found, home = _definition(name, module)
    if home in sys.modules and hasattr(sys.modules[home], name):
        return getattr(sys.modules[home], name)
    if found is None:
        return getattr(builtins, name)
    if isinstance(found, ast.expr):
        return _evaluate(found, home)
    if isinstance(found, tuple):
        package = found[0].split(".")[0]
        if package in sys.modules or package in sys.stdlib_module_names:
            imported = importlib.import_module(found[0])
            return imported if found[1] is None else getattr(imported, found[1])
    return Unresolved.named(name)


@lru_cache
def _comments(module: str) -> dict[int, tuple[str, bool]]:
    """Line -> (its comment, whether the line has nothing else)."""
    tokens = tokenize.generate_tokens(io.StringIO(_source(module)).readline)
    return {
        t.start[0]: (t.string.lstrip("# "), t.line.strip().startswith("#"))
        for t in tokens
        if t.type == tokenize.COMMENT
    }


def _comment(module: str, node: ast.stmt | ast.arg) -> str:
    """The comment above a field, or else on its lines."""
    comments = _comments(module)
    above: list[str] = []
    line = node.lineno - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    beside = [comments[n][0] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in comments]
    return " ".join(above + beside)


def _from_docstring(name: str, text: str) -> str:
    """What a docstring says of an argument: the sentence that begins with its name and a colon."""
    # what is in parentheses may have a full stop
    sentence = r"((?:\([^()]*\)|[.;](?!\s|$)|[^.;])*)"
    begin = rf"(?:^|[.;:]\s+|, )`?{name}`?(?:, \w+)*: (?:- )?"
    match = re.search(begin + sentence, " ".join(text.split()))
    return match[1] if match else ""


def meanings(cls: type) -> dict[str, str]:
    """Field -> comment, of a dataclass."""
    node, home = _definition(cls.__name__, cls.__module__)
    return {name: a.meaning for name, a in _fields(node, home).items()} if node else {}

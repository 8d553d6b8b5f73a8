"""Prints every break of the structural rules of the code: layers, names, lengths.

python tools/check_architecture.py [--layers]      exit status 1 if there is any; --layers: only who imports
whom

The rules (docs/architecture.md gives the reasons):
- layers: a package imports only the packages that ALLOWED lists for it;
- names: a public class or function name at module level means one thing in vidssl and data_prep;
- lengths: no function over 80 lines, no line over 110 columns;
- packed assignments: `a, b = x.y, f(z)` is one assignment a line, unless the values are written alike or are
a swap;
- files directly in vidssl/ do not hide a module in use, since `accelerate launch vidssl/train.py` puts that
folder first on the import path;
- torch.load reads weights only, and nothing is unpickled or extracted from a tar.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_FUNCTION_LINES = 80
MAX_COLUMNS = 110
ENTRY_POINTS = ("train", "probe", "finetune", "dense")
ALLOWED = {  # package: the packages of this project that it may import, besides itself
    "core": set(),
    "config": {"core"},
    "data": {"core", "config"},
    "model": {"core", "config"},
    "objective": {"core", "config", "model"},
    "pretrained": {"core", "config", "model", "objective"},
    "evaluation": {"core", "config", "data", "model", "pretrained"},
    "training": {"core", "config", "data", "model", "objective", "pretrained", "evaluation"},
    "data_prep": {"core", "config", "data"},
}
ALLOWED["zoo"] = set(ALLOWED) - {"data_prep"}
ALLOWED["pictures"] = set(ALLOWED) - {"zoo"}
ALLOWED["report"] = set(ALLOWED) - {"zoo"}
ALLOWED["adaptation"] = set(ALLOWED) - {"data_prep", "pictures", "report"}
ALLOWED["planning"] = set(ALLOWED) - {"data_prep", "pictures", "report", "adaptation"}
ALLOWED["quickstart"] = set(ALLOWED) - {"adaptation", "planning"}
ALLOWED["commands"] = {*ALLOWED, *ENTRY_POINTS}
NOT_OF_ENTRY_POINTS = {
    "data_prep",
    "zoo",
    "pictures",
    "report",
    "adaptation",
    "planning",
    "quickstart",
    "commands",
}
ALLOWED |= {entry: set(ALLOWED) - NOT_OF_ENTRY_POINTS for entry in ENTRY_POINTS}
# Imported only where a run has trackers, to which it sends pictures
ALLOWED["train"].add("pictures")
SHARED_NAMES = {"main", "read"}  # every command has a main, every source format of data_prep a read
LIBRARIES_IN_USE = {
    "PIL", "accelerate", "av", "datasets", "decord", "einops", "fsspec", "numpy", "pydantic",
    "safetensors", "timm", "torch", "torchvision", "tqdm", "transformers", "webdataset", "yaml",
}  # fmt: skip


def package_of(module: str) -> str:
    """Returns the layer of a dotted module: `data` for vidssl.data.order, `data_prep` for data_prep.pack."""
    parts = module.split(".")
    if parts[0] == "data_prep":
        return "data_prep"
    return parts[1] if len(parts) > 1 else "vidssl"


def module_of(path: Path, root: Path = ROOT) -> str:
    """Returns the dotted name of a source file."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted module of this project), imports inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "vidssl":
            modules = [f"vidssl.{alias.name}" for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            if module.split(".")[0] in ("vidssl", "data_prep"):
                yield node.lineno, module


def wrong_imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Yields the imports that the layers do not allow."""
    own = package_of(module)
    if own not in ALLOWED:  # vidssl/__init__.py offers names of all layers
        return
    for line, imported in imported_modules(tree):
        package = package_of(imported)
        if package not in ALLOWED[own] | {own, "vidssl"}:
            yield f"{line}: {own} must not import {imported}"


def public_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of the classes and functions of a module."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node.lineno, node.name


def long_functions(tree: ast.AST) -> Iterator[str]:
    """Yields the functions over MAX_FUNCTION_LINES lines, decorators not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"


def shape(node: ast.AST) -> str:
    """Returns an expression with its names, attributes and constants blanked: equal for expressions written
    alike."""
    text = ast.dump(node, annotate_fields=False)
    text = re.sub(r"Constant\([^()]*\)", "Constant", text)
    return re.sub(r"'[^']*'", "_", text)


def packed_assignments(tree: ast.AST) -> Iterator[str]:
    """Yields tuple assignments of values that have nothing to do with each other."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)):
            continue
        if not isinstance(node.value, ast.Tuple) or any(isinstance(v, ast.Starred) for v in node.value.elts):
            continue
        targets = {ast.unparse(target) for target in node.targets[0].elts}
        reads = {ast.unparse(n) for n in ast.walk(node.value) if isinstance(n, (ast.Name, ast.Attribute))}
        alike = len({shape(value) for value in node.value.elts}) == 1
        if not alike and not targets & reads:
            yield f"{node.lineno}: packed assignment: {ast.unparse(node)[:80]}"


def unsafe_reads(text: str) -> Iterator[str]:
    """Yields reads that could run code or write where a file says."""
    for pattern in (r"^import pickle", r"\bextractall\(", r"torch\.load\((?![^)]*weights_only=True)"):
        for match in re.finditer(pattern, text, re.MULTILINE):
            yield f"{text[: match.start()].count(chr(10)) + 1}: {match.group()}"


def hidden_modules(root: Path = ROOT) -> Iterator[str]:
    """Yields the files and folders of vidssl/ that hide a module in use."""
    for path in (root / "vidssl").iterdir():
        if path.stem in set(sys.stdlib_module_names) | LIBRARIES_IN_USE:
            yield f"{path.relative_to(root)} hides the module {path.stem}"


def find_breaks(root: Path = ROOT, only_layers: bool = False) -> list[str]:
    """Returns a line for each break of a rule in vidssl, data_prep and (lengths, assignments) tools and
    tests."""
    breaks: list[str] = []
    homes: dict[str, list[str]] = defaultdict(list)
    for folder in ("vidssl", "data_prep", "tools", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            tree = ast.parse(text)
            name = path.relative_to(root).as_posix()
            product = folder in ("vidssl", "data_prep")
            found = list(wrong_imports(tree, module_of(path, root))) if product else []
            if product and not only_layers:
                for line, public in public_names(tree):
                    homes[public].append(f"{name}:{line}")
                found += unsafe_reads(text)
            if not only_layers:
                found += [*long_functions(tree), *packed_assignments(tree)]
                wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > MAX_COLUMNS]
                found += [f"{i}: over {MAX_COLUMNS} columns" for i in wide]
            breaks += [f"{name}:{one}" for one in found]
    if not only_layers:
        breaks += hidden_modules(root)
        twice = {
            name: places for name, places in homes.items() if len(places) > 1 and name not in SHARED_NAMES
        }
        breaks += [
            f"{name} is defined {len(places)} times: {', '.join(places)}" for name, places in twice.items()
        ]
    return breaks


def main(argv: list[str]) -> int:
    breaks = find_breaks(only_layers="--layers" in argv)
    print("\n".join([*breaks, f"{len(breaks)} breaks of the structural rules"]))
    return int(bool(breaks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The structural rules of tools/check_architecture.py hold, and the script finds what breaks them."""

import ast

import pytest
from check_architecture import (
    find_breaks,
    long_functions,
    packed_assignments,
    public_names,
    unsafe_reads,
    wrong_imports,
)


def test_rules_hold():
    assert find_breaks() == []


@pytest.mark.parametrize(
    "module, statement",
    [
        ("vidssl.core.io", "from vidssl.data.order import Order"),
        ("vidssl.data.loader", "from vidssl.model.grid import Grid"),
        ("vidssl.model.vit", "import vidssl.objective.masks"),
        ("vidssl.objective.targets", "from vidssl.pretrained.load import load_encoder"),
        ("vidssl.pretrained.files", "from vidssl.training import checkpoint"),
        ("vidssl.evaluation.heads", "def f():\n    from vidssl.training.optim import schedule"),
        ("vidssl.training.optim", "from vidssl.train import main"),
        ("vidssl.probe", "from vidssl import train"),
        ("data_prep.pack", "from vidssl.model.vit import Encoder"),
    ],
)
def test_wrong_import_is_found(module, statement):
    assert list(wrong_imports(ast.parse(statement), module))


@pytest.mark.parametrize(
    "module, statement",
    [
        ("vidssl.training.state", "from vidssl.evaluation.tasks import class_of"),
        ("vidssl.evaluation.heads", "from vidssl.core.schedules import cosine"),
        ("data_prep.pack", "from vidssl.data.format import VERSION"),
        ("vidssl.core.io", "import vidssl"),
    ],
)
def test_allowed_import_passes(module, statement):
    assert not list(wrong_imports(ast.parse(statement), module))


@pytest.mark.parametrize(
    "statement, is_packed",
    [
        ("a, b = x.y, f(z)", True),
        ("self.a, self.b = a, [0]", True),
        ("a, b = b, a", False),
        ("rows, columns = cover(u[0]), cover(u[1])", False),
        ("a, b = f(x)", False),
        ("a, b = x, y", False),
    ],
)
def test_packed_assignment_is_found(statement, is_packed):
    assert bool(list(packed_assignments(ast.parse(statement)))) == is_packed


def test_long_function_and_public_names():
    body = "\n".join("    x = 1" for _ in range(80))
    tree = ast.parse(f"def long():\n{body}\n\ndef _private(): ...\n\nclass Public: ...\n")
    assert len(list(long_functions(tree))) == 1
    assert [name for _, name in public_names(tree)] == ["long", "Public"]


@pytest.mark.parametrize("text", ["import pickle", "tar.extractall(x)", "torch.load(path)"])
def test_unsafe_read_is_found(text):
    assert list(unsafe_reads(text)) and not list(unsafe_reads("torch.load(path, weights_only=True)"))

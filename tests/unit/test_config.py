"""A wrong key, kind, type or file is one line that says where and what would be right."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import pytest

from vidssl import config
from vidssl.config import Names, Part, Value
from vidssl.core.errors import UserError


class Box(NamedTuple):
    count: int
    scale: float


@dataclass(frozen=True)
class Shape:
    side: int
    boxes: tuple[Box, ...] = (Box(1, 0.5),)
    mode: Literal["a", "b"] = "a"
    wide: float | None = None


class Disc:
    def __init__(self, radius: float, width: int):
        self.radius, self.width = radius, width


@dataclass(frozen=True)
class Run:
    out: Names
    steps: int = 3


SCHEMA = {
    "part": {"shape": Part({"shape": Shape, "disc": Disc}, ("width",))},
    "run": Part(Run),
    "name": Value(str, "x"),
}


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.fixture
def good(tmp_path):
    return write(tmp_path, "good.yaml", "part: {shape: {kind: shape, side: 3}}\nrun: {out: somewhere}\n")


def test_defaults_are_filled_in_and_the_result_is_itself_a_configuration(good, tmp_path):
    tree = config.load([good], SCHEMA)
    assert tree["part"]["shape"] == {
        "kind": "shape",
        "side": 3,
        "boxes": [[1, 0.5]],
        "mode": "a",
        "wide": None,
    }
    assert tree["run"] == {"out": ["somewhere"], "steps": 3}
    config.save(tree, tmp_path / "resolved.yaml")
    assert config.load([str(tmp_path / "resolved.yaml")], SCHEMA) == tree
    built = config.build(tree["part"]["shape"], {"shape": Shape, "disc": Disc})
    assert built == Shape(3, (Box(1, 0.5),))


def test_command_line_overrides_files_in_any_place(good):
    tree = config.load(["run.steps=7", good, "part.shape.boxes=[{count: 2, scale: 0.1}]", "name=y"], SCHEMA)
    assert tree["run"]["steps"] == 7
    assert tree["part"]["shape"]["boxes"] == [[2, 0.1]]
    assert tree["name"] == "y"


def test_given_arguments_reach_the_callable():
    disc = config.build({"kind": "disc", "radius": 2.0}, {"disc": Disc}, width=4)
    assert (disc.radius, disc.width) == (2.0, 4)


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "part: {shape: {kind: shape, side: 3, sides: 4}}",
            ["bad.yaml: part.shape.sides", "unknown key", "boxes"],
        ),
        ("part: {shape: {kind: cube, side: 3}}", ["bad.yaml: part.shape.kind", "'cube'", "shape, disc"]),
        ("part: {shape: {side: 3}}", ["bad.yaml: part.shape", "'kind' is missing"]),
        ("part: {shape: {kind: shape, side: big}}", ["bad.yaml: part.shape.side", "integer", "'big'", "int"]),
        (
            "part: {shape: {kind: shape, side: 3, mode: c}}",
            ["bad.yaml: part.shape.mode", "'a' or 'b'", "'c'"],
        ),
        ("part: {shape: {kind: shape}}", ["part.shape.side", "missing", "int"]),
        ("part: {shape: {kind: disc, radius: 1, width: 2}}", ["part.shape.width", "unknown key", "radius"]),
        ("party: {}", ["bad.yaml: party", "unknown section", "part, run, name"]),
        ("part: {shap: {}}", ["bad.yaml: part.shap", "unknown section"]),
        ("part: 3", ["bad.yaml: part", "mapping"]),
        ("part: {shape: [1, 2}", ["bad.yaml", "line 1"]),
        ("- a\n- b", ["bad.yaml", "mapping"]),
    ],
)
def test_one_clear_line(text, words, tmp_path):
    bad = write(tmp_path, "bad.yaml", text)
    with pytest.raises(UserError) as e:
        config.load([bad, "run.out=x"], SCHEMA)
    message = str(e.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_two_files_that_set_one_key(good, tmp_path):
    other = write(tmp_path, "other.yaml", "run: {steps: 4}\n")
    third = write(tmp_path, "third.yaml", "run: {steps: 5}\n")
    assert config.load([good, other], SCHEMA)["run"]["steps"] == 4
    with pytest.raises(UserError, match=r"third.yaml: 'run.steps' is already set by .*other.yaml"):
        config.load([good, other, third], SCHEMA)
    assert config.load([good, other, "run.steps=9"], SCHEMA)["run"]["steps"] == 9


def test_wrong_arguments(good):
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file"):
        config.load(["nowhere.yaml"], SCHEMA)
    with pytest.raises(UserError, match="neither"):
        config.load([good, "steps"], SCHEMA)
    with pytest.raises(UserError, match=r"'run.stepz=3'.*unknown key"):
        config.load([good, "run.stepz=3"], SCHEMA)


def test_what_may_differ_is_left_out_with_all_below_it():
    a, b = {"a": {"b": 1, "c": 2}, "ab": 1, "d": {"e": 1}}, {"a": {"b": 2}, "ab": 2, "d": {"e": 2}}
    assert config.differences(a, b, ("a", "d.e")) == [("ab", 1, 2)]


def test_differences():
    assert config.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        ("a.b", 1, 3),
        ("c", 2, None),
        ("d", None, 4),
    ]

"""vidssl.config: valid configurations are typed; a mistake is one line with file, key and remedy."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pytest

from vidssl.config import (
    Arguments,
    Choice,
    Names,
    Spec,
    differences,
    from_tree,
    load_config,
    merge,
    save,
    to_tree,
)
from vidssl.core.errors import UserError
from vidssl.evaluation.dense.schema import DenseConfig
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[2]


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
    exact: bool = False


@dataclass(frozen=True)
class Part:
    shape: Annotated[Spec, Choice({"shape": Shape, "disc": Disc}, supplied=("width",))]


@dataclass(frozen=True)
class Example:
    part: Part
    run: Run
    name: str = "x"
    tags: tuple[str, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class WithoutKind:
    disc: Annotated[Spec, Arguments(Disc, supplied=("width",))]


def write(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.fixture
def good(tmp_path):
    return write(tmp_path, "good.yaml", "part: {shape: {kind: shape, side: 3}}\nrun: {out: somewhere}\n")


def test_defaults_are_filled_in_and_values_are_typed(good):
    cfg = load_config([good, "part.shape.wide=2"], Example)
    assert cfg.run == Run(["somewhere"], 3) and cfg.name == "x" and cfg.tags == ()
    assert cfg.part.shape.build() == Shape(3, (Box(1, 0.5),), wide=2.0)
    assert isinstance(cfg.part.shape.arguments["wide"], float)


def test_the_saved_tree_is_itself_a_configuration(good, tmp_path):
    cfg = load_config([good], Example)
    tree = to_tree(cfg)
    shape = {"kind": "shape", "side": 3, "boxes": [[1, 0.5]], "mode": "a", "wide": None}
    assert tree["part"]["shape"] == shape
    assert tree["run"] == {"out": ["somewhere"], "steps": 3, "exact": False}
    save(tree, tmp_path / "resolved.yaml")
    again = load_config([str(tmp_path / "resolved.yaml")], Example)
    assert again == cfg and to_tree(again) == tree


def test_a_stored_tree_gets_defaults_of_options_it_lacks():
    tree = {"part": {"shape": {"kind": "shape", "side": 3}}, "run": {"out": ["a"]}}
    assert from_tree(tree, Example, "old").run.steps == 3
    with pytest.raises(UserError, match=r"old: run\.speed: unknown key"):
        from_tree({**tree, "run": {"out": ["a"], "speed": 1}}, Example, "old")


def test_command_line_overrides_files_in_any_place(good):
    cfg = load_config(["run.steps=7", good, "part.shape.boxes=[{count: 2, scale: 0.1}]", "name=y"], Example)
    assert cfg.run.steps == 7 and cfg.name == "y"
    assert cfg.part.shape.arguments["boxes"] == (Box(2, 0.1),)


def test_a_mapping_with_another_kind_replaces_the_part(good):
    """What the file says is of the kind that it names."""
    cfg = load_config([good, "part.shape={kind: disc, radius: 2}"], Example)
    assert (cfg.part.shape.kind, cfg.part.shape.arguments["radius"]) == ("disc", 2.0)
    same = load_config([good, "part.shape={kind: shape, wide: 2}"], Example)
    assert (same.part.shape.arguments["side"], same.part.shape.arguments["wide"]) == (3, 2.0)


@dataclass(frozen=True)
class Several:
    """A part that may be left out, and a list of parts."""

    one: Annotated[Spec, Choice({"shape": Shape, "disc": Disc}, supplied=("width",), is_optional=True)]
    more: Annotated[tuple[Spec, ...], Choice({"shape": Shape, "disc": Disc}, ("width",), is_list=True)]


@pytest.mark.parametrize("arguments", [[], ["one=null", "more=null"], ["one={}", "more=[]"]])
def test_a_part_may_be_left_out(arguments):
    cfg = load_config(arguments, Several)
    assert cfg.one.is_absent and cfg.one.build(width=1) is None and cfg.more == ()
    assert from_tree(to_tree(cfg), Several, "stored") == cfg


def test_a_list_of_parts(tmp_path):
    text = "one: {kind: disc, radius: 1}\nmore: [{kind: disc, radius: 2}, {kind: shape, side: 3}]\n"
    cfg = load_config([write(tmp_path, "several.yaml", text)], Several)
    assert not cfg.one.is_absent and [spec.kind for spec in cfg.more] == ["disc", "shape"]
    assert from_tree(to_tree(cfg), Several, "stored") == cfg
    single = load_config(["more={kind: disc, radius: 4}"], Several)
    assert single.more[0].build(width=2).radius == 4
    for wrong, words in (
        ("more=[{kind: cube}]", r"more\[0\]\.kind: no kind 'cube'; allowed: shape, disc"),
        ("more=[{radius: 2}]", r"more\[0\]: 'kind' is missing"),
        ("more=[{kind: shape, side: 3}, {kind: disc, radius: x}]", r"more\[1\]\.radius"),
        ("more=[3]", r"more\[0\]: must be a mapping"),
        ("one=3", "one: must be a mapping|must be a mapping"),
    ):
        with pytest.raises(UserError, match=words):
            load_config([wrong], Several)


def test_given_arguments_reach_the_callable():
    disc = load_config(["disc.radius=2"], WithoutKind).disc
    assert disc.kind is None and disc.build(width=4).width == 4 and disc.build(width=4).radius == 2.0
    assert to_tree(WithoutKind(disc)) == {"disc": {"radius": 2.0}}


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "part: {shape: {kind: shape, side: 3, sides: 4}}",
            ["bad.yaml: part.shape.sides", "unknown key", "did you mean part.shape.side?"],
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
        ("party: {}", ["bad.yaml: party", "unknown section", "did you mean part?"]),
        ("part: {shap: {}}", ["bad.yaml: part.shap", "unknown section"]),
        ("part: 3", ["bad.yaml: part", "mapping"]),
        ("part: {shape: [1, 2}", ["bad.yaml", "line 1"]),
        ("- a\n- b", ["bad.yaml", "mapping"]),
        ("watch: {every: 3}", ["bad.yaml: watch", "it is called online_probe now"]),
        (
            "part: {shape: {kind: disc, radius: 1}}\nrun: {skip_bad: 3}",
            ["bad.yaml: run.skip_bad", "it is called run.max_consecutive_skips now"],
        ),
    ],
)
def test_one_clear_line(text, words, tmp_path):
    bad = write(tmp_path, "bad.yaml", text)
    with pytest.raises(UserError) as e:
        load_config([bad, "run.out=x"], Example)
    message = str(e.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("value", ["true", "'3'", "3.0", "1e3", "null"])
def test_integers_are_strict(value, good):
    with pytest.raises(UserError, match=r"run\.steps.*valid integer.*expected int"):
        load_config([good, f"run.steps={value}"], Example)


@pytest.mark.parametrize("setting", ["run.exact=1", "part.shape.wide='2'", "part.shape.wide=true"])
def test_other_scalars_are_strict(setting, good):
    with pytest.raises(UserError, match="should be a valid"):
        load_config([good, setting], Example)


def test_two_files_that_set_one_key(good, tmp_path):
    other = write(tmp_path, "other.yaml", "run: {steps: 4}\n")
    third = write(tmp_path, "third.yaml", "run: {steps: 5}\n")
    assert load_config([good, other], Example).run.steps == 4
    with pytest.raises(UserError, match=r"third.yaml: 'run.steps' is already set by .*other.yaml"):
        load_config([good, other, third], Example)
    assert load_config([good, other, "run.steps=9"], Example).run.steps == 9


def test_a_path_may_contain_an_equals_sign(tmp_path, good):
    path = write(tmp_path, "lr=1e-3/config.yaml", "run: {steps: 4}\n")
    assert load_config([good, path], Example).run.steps == 4
    with pytest.raises(UserError, match=r"runs/lr=2/config.yaml: no such file"):
        load_config([good, "runs/lr=2/config.yaml"], Example)
    assert load_config([good, "name=list.yaml"], Example).name == "list.yaml"


def test_merge_says_where_each_key_was_set(good):
    origin = merge([good, "run.steps=7"])[1]
    assert origin["run.out"].is_file and origin["run.steps"] == ("run.steps=7", False)


def test_wrong_arguments(good):
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file"):
        load_config(["nowhere.yaml"], Example)
    with pytest.raises(UserError, match="neither"):
        load_config([good, "steps"], Example)
    with pytest.raises(UserError, match=r"'run.stepz=3'.*unknown key"):
        load_config([good, "run.stepz=3"], Example)


def test_ignored_differences_include_all_below_them():
    a = {"a": {"b": 1, "c": 2}, "ab": 1, "d": {"e": 1}}
    b = {"a": {"b": 2}, "ab": 2, "d": {"e": 2}}
    assert differences(a, b, ("a", "d.e")) == [("ab", 1, 2)]


def test_differences():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        ("a.b", 1, 3),
        ("c", 2, None),
        ("d", None, 4),
    ]


@pytest.mark.parametrize(
    "cls, argument, present",
    [
        (TrainConfig, "optim.momentum=[0.9,1.0]", "method.target.momentum"),
        (TrainConfig, "optim.settle=5", "optim.schedule_steps"),
        (DenseConfig, "task.held_out=0.1", "task.val_fraction"),
    ],
)
def test_an_old_key_of_a_command_is_an_error_with_its_present_name(cls, argument, present):
    files = {
        TrainConfig: ["method/vjepa_tiny", "model/vit_micro", "data/quickstart", "run/smoke"],
        DenseConfig: ["dense/depth"],
    }
    argv = [str(ROOT / f"configs/{name}.yaml") for name in files[cls]]
    argv += ["encoder=x", "out=x", "data.test=x"] if cls is DenseConfig else []
    with pytest.raises(UserError, match=f"it is called {re.escape(present)} now"):
        load_config([*argv, argument], cls)


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    """As an installed package is used: there is no folder configs/ here."""
    monkeypatch.chdir(tmp_path)
    given = ["configs/method/vjepa_tiny.yaml", "configs/model/vit_micro.yaml", "configs/data/quickstart.yaml"]
    cfg = load_config([*given, "configs/run/smoke.yaml", "data.train=x", "run.out=y"], TrainConfig)
    assert cfg.method.target.kind == "ema"
    with pytest.raises(UserError, match=r"no such file; did you mean configs/method/vjepa_tiny\.yaml"):
        load_config(["configs/method/vjepa_tiney.yaml"], TrainConfig)
    own = tmp_path / "configs/method/vjepa_tiny.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("method: {target: {kind: ema, momentum: [0.5, 0.5]}}")
    with pytest.raises(UserError, match=r"method\.mask"):  # one's own file comes first
        load_config(given[:1], TrainConfig)

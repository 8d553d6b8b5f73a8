"""vidssl.config: a string is the text as written, on the command line, in a file, and in the stored copy."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vidssl import config
from vidssl.config import Spec, load_config, save, to_tree
from vidssl.config.yaml_text import list_argument, parse_yaml, plain
from vidssl.core.errors import UserError
from vidssl.evaluation.dense.schema import DenseConfig
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.training.finetune_schema import FinetuneConfig
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[2]
PROGRAMS: dict[type, list[str]] = {
    TrainConfig: [
        *("method/vjepa2_1_distilled", "data/quickstart", "run/smoke", "online_probe.train=x"),
        *("online_probe.test=x", "method.target.path=x", "model.kind=vit_tiny"),
    ],
    ProbeConfig: ["probe/linear", "encoder=x", "data.train=x", "data.test=x", "out=x"],
    FinetuneConfig: ["finetune/folder", "encoder=x", "data.train=x", "data.test=x", "out=x"],
    DenseConfig: ["dense/depth", "encoder=x", "data.test=x", "out=x"],
}
NASTY = (
    *(
        "a #2",
        "#",
        "run${x}",
        "${oc.env:HOME}",
        "$x",
        "2024_01_31",
        "2024-01-31",
        "1e3",
        "1_000",
        "007",
        "0x1f",
    ),
    *(
        "3",
        "3.0",
        ".5",
        "1:30",
        "yes",
        "no",
        "on",
        "off",
        "true",
        "False",
        "~",
        "Null",
        "none",
        ".inf",
        ".nan",
    ),
    *(
        "a: b",
        "a:",
        ": b",
        "[x",
        "x]",
        "{y",
        "{a: b}",
        "{a, b}",
        "*",
        "*x",
        "&",
        "&x",
        "%",
        "!",
        "!!int 3",
        "|",
    ),
    *(
        ">",
        "@",
        "`",
        "-",
        "- a",
        "-x",
        "--out=3",
        "---",
        "...",
        "?",
        "? a",
        "a=b",
        "=",
        "lr=1e-3/x.yaml",
        "'a",
        '"a',
    ),
    *(
        "'a'",
        '"a"',
        "a\\b",
        "a\nb",
        "a\tb",
        "a\r",
        "\x85",
        "\u2028",
        " a",
        "a ",
        " ",
        "é ü",
        "视频",
        "🎬",
        "<<",
        ",",
    ),
    *("a, b", "a,b", "http://h:80/p?q=1#f", "C:\\data", "~/data", "???", "a" * 300),
)


def arguments(cls: type) -> list[str]:
    return [item if "=" in item else str(ROOT / f"configs/{item}.yaml") for item in PROGRAMS[cls]]


def string_keys(cfg: Any, key_path: str = "") -> list[str]:
    """Dotted keys of a configuration that hold any string, or a list of them."""
    is_spec = isinstance(cfg, Spec)
    declared = config.declarations(cfg.factory if is_spec else type(cfg))
    values = cfg.arguments if is_spec else vars(cfg)
    keys = []
    for name, value in values.items():
        key = f"{key_path}.{name}".lstrip(".")
        options = config._options(declared[name].hint)[0]
        if dataclasses.is_dataclass(value):
            keys += string_keys(value, key)
        elif any(option is str or option == list[config.Text] for option in options):
            keys.append(key)
    return keys


CASES = [(cls, key) for cls in PROGRAMS for key in string_keys(load_config(arguments(cls), cls))]


def value_at(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg.arguments[name] if isinstance(cfg, Spec) else getattr(cfg, name)
    return cfg


def test_every_program_has_keys_that_are_tried():
    keys = {cls: [key for c, key in CASES if c is cls] for cls in PROGRAMS}
    assert {"run.out", "run.init", "data.train", "method.target.path"} <= set(keys[TrainConfig])
    assert {"out", "encoder", "data.train"} <= set(keys[ProbeConfig]) & set(keys[FinetuneConfig])
    assert {"out", "encoder", "data.test"} <= set(keys[DenseConfig])


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c.__name__}-{k}" for c, k in CASES])
def test_a_string_key_of_a_program_holds_the_text_and_so_does_the_stored_copy(number, tmp_path):
    cls, key = CASES[number]
    # two texts a key; over all keys each text is tried
    for text in (NASTY[number % len(NASTY)], NASTY[(number + len(CASES)) % len(NASTY)]):
        cfg = load_config([*arguments(cls), f"{key}={text}"], cls)
        assert value_at(cfg, key) in (text, [text])
        save(to_tree(cfg), tmp_path / "resolved.yaml")
        assert load_config([str(tmp_path / "resolved.yaml")], cls) == cfg


@dataclass(frozen=True)
class Strings:
    one: config.Text
    names: config.Names
    maybe: config.Text | None
    several: tuple[str, ...]


@pytest.mark.parametrize("text", NASTY)
def test_a_string_is_the_text_of_the_argument_and_of_the_stored_copy(text, tmp_path):
    cfg = load_config([f"{key}={text}" for key in ("one", "names", "maybe", "several")], Strings)
    assert cfg == Strings(text, [text], text, (text,))
    save(to_tree(cfg), tmp_path / "resolved.yaml")
    assert load_config([str(tmp_path / "resolved.yaml")], Strings) == cfg


@pytest.mark.parametrize(
    "text", ["2024_01_31", "2024-01-31", "1e3", "007", "1_000", "0x1f", "yes", "true", "3.0", "1:30"]
)
def test_an_unquoted_scalar_of_a_file_is_text_where_a_string_is_wanted(text, tmp_path):
    (tmp_path / "a.yaml").write_text(f"encoder: {text}\nout: {text}\ndata: {{train: [{text}], test: {text}}}")
    cfg = load_config([str(ROOT / "configs/probe/linear.yaml"), str(tmp_path / "a.yaml")], ProbeConfig)
    assert (cfg.encoder, cfg.out, cfg.data.train, cfg.data.test) == (text, text, [text], [text])


def test_a_list_of_strings_is_given_in_brackets():
    cfg = load_config([*arguments(ProbeConfig), "data.train=[2024_01_31, 1e3, 'a, b']"], ProbeConfig)
    assert cfg.data.train == ["2024_01_31", "1e3", "a, b"]


def test_null_leaves_out_what_may_be_left_out_and_is_a_name_elsewhere():
    cfg = load_config([*arguments(TrainConfig), "run.init=null", "run.out=null"], TrainConfig)
    assert cfg.run.init is None and cfg.run.out == "null"


@pytest.mark.parametrize(
    "cls, key", [(TrainConfig, "run.out"), (ProbeConfig, "encoder"), (DenseConfig, "data.test")]
)
def test_an_empty_path_is_an_error(cls, key):
    with pytest.raises(UserError, match=f"'{key}='.*at least 1 character"):
        load_config([*arguments(cls), f"{key}="], cls)


@pytest.mark.parametrize(
    "setting", ["run.out=a\udcff", "run.steps=[1", "run.steps={a", "optim.lr=a: b", "run.steps="]
)
def test_a_value_that_cannot_be_read_is_one_line_with_the_argument(setting):
    with pytest.raises(UserError, match=setting.split("=")[0]) as e:
        load_config([*arguments(TrainConfig), setting], TrainConfig)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("0x1f", 31),
        ("-.inf", float("-inf")),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("no", False),
        ("~", None),
        ("", None),
        ("!!str 3", "3"),
        ("{a: 1, b: [x, 2]}", {"a": 1, "b": ["x", 2]}),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{a: &x {c: 1}, b: {<<: *x, d: 2}}", {"a": {"c": 1}, "b": {"c": 1, "d": 2}}),
    ],
)
def test_yaml_values(text, value):
    assert plain(parse_yaml(text, "x")) == value


@pytest.mark.parametrize(
    "text", ["{a: 1, a: 2}", "&a [*a]", "[", "{[a]: 1}", "!x 3", "a: b: c", b"\xff\xfe\x00", "!!int x"]
)
def test_what_is_no_yaml_is_an_error_of_one_line(text):
    with pytest.raises(UserError, match=r"^here: ") as e:
        parse_yaml(text, "here")
    assert "\n" not in str(e.value)


def test_a_list_that_a_program_writes_is_read_as_its_items():
    items = [*NASTY, "a, b", "[x]", "{x}", "x: y", "\x7f", "🚪", "a " * 200, "*a", "null"]
    files = [a if "=" in a else f"configs/{a}.yaml" for a in PROGRAMS[ProbeConfig]]
    cfg = load_config([*files, list_argument("data.labels", items)], ProbeConfig)
    assert cfg.data.labels == items
    one = load_config([*files, list_argument("data.labels", [Path("null")])], ProbeConfig)
    assert one.data.labels == ["null"]

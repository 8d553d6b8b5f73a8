"""Files of others: what lies around the weights, and what their names were wrapped in."""

import collections
import datetime
import decimal
import enum
import itertools
import os
import pathlib
import subprocess
import types
import uuid

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from vidssl.core.errors import UserError
from vidssl.pretrained.public import load_state_file, strip_wrappers, unwrap_state_dict

NAMES = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "norm.weight"]
STATE = {name: torch.full((2,), float(i)) for i, name in enumerate(NAMES)}
PURE = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
HOLDERS = ("backbone", "model", "net", "ema_model", "teacher")


def same(got: dict, want: dict) -> bool:
    return got.keys() == want.keys() and all(got[k] is want[k] for k in want)


@pytest.mark.parametrize("order", [*itertools.permutations(("module", "_orig_mod", "backbone", "model"), 3)])
def test_wrappers_come_off_in_any_order(order):
    prefix = ".".join(order) + "."
    assert same(strip_wrappers({prefix + k: v for k, v in STATE.items()}, "x.pth"), STATE)


@pytest.mark.parametrize("wrapper", PURE)
def test_wrappers_come_off_inside_names(wrapper):
    inside = {
        k.replace("blocks.0.", f"blocks.0.{wrapper}.").replace("proj.", f"proj.{wrapper}."): v
        for k, v in STATE.items()
    }
    assert set(inside) != set(STATE)
    assert same(strip_wrappers(inside, "x.pth"), STATE)


@pytest.mark.parametrize("prefix", [f"{a}.{b}." for a in PURE for b in HOLDERS])
@pytest.mark.parametrize(
    "container", [(), ("model",), ("state_dict",), ("model_state_dict",), ("model", "state_dict")]
)
def test_state_dicts_are_found(prefix, container):
    content = {prefix + k: v for k, v in STATE.items()}
    for name in reversed(container):
        content = {"epoch": 3, name: content}
    assert same(unwrap_state_dict(content, "x.pth"), STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.backbone.", "backbone."])
def test_networks_of_the_jepa_family(prefix):
    content = {
        n: {prefix + k: v for k, v in STATE.items()} for n in ("encoder", "target_encoder", "predictor")
    }
    want = {f"{n}.{k}": STATE[k] for n in content for k in STATE}
    assert same(unwrap_state_dict({**content, "opt": {}, "epoch": 1}, "x.pth"), want)


def test_a_prefix_that_only_some_keys_have_is_part_of_the_name():
    state = {"model.a": torch.zeros(1), "head.weight": torch.zeros(1)}
    assert same(strip_wrappers(state, "x.pth"), state)


def test_two_weights_of_one_name():
    state = {"module.norm.weight": torch.zeros(1), "norm.weight": torch.ones(1)}
    with pytest.raises(UserError, match=r"x\.pth: 'norm\.weight' and 'module\.norm\.weight' are the same"):
        strip_wrappers(state, "x.pth")


class Colour(enum.Enum):
    RED = 1


class Meter:
    def __init__(self):
        self.mean = 0.5


def a_function() -> None:
    pass


BESIDE = {
    "NumPy's random state": np.random.get_state(),
    "generator": np.random.default_rng(0),
    **{f"{t} array": np.zeros(2, t) for t in ("uint8", "int16", "uint32", "complex64", "float16")},
    "strings": np.array(["a", "bc"]),
    "time": datetime.datetime(2020, 1, 1),
    "duration": datetime.timedelta(1),
    "NumPy time": np.datetime64("2020-01-01"),
    "Windows path": pathlib.PureWindowsPath("a"),
    "path": pathlib.PurePosixPath("a"),
    "defaultdict": collections.defaultdict(list),
    "namespace": types.SimpleNamespace(a=1),
    "enum": Colour.RED,
    "object": Meter(),
    "function": a_function,
    "OmegaConf": OmegaConf.create({"a": {"b": [1, 2]}}),
    "decimal": decimal.Decimal(1),
    "uuid": uuid.UUID(int=1),
    "frozenset": frozenset([1]),
    "slice": slice(1, 2),
    "device": torch.device("cpu"),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_harmless_content_does_not_keep_the_weights_from_being_read(beside, tmp_path):
    torch.save({"model": STATE, "beside": BESIDE[beside]}, tmp_path / "x.pth")
    content = load_state_file(tmp_path / "x.pth")
    assert all(content["model"][k].equal(v) for k, v in STATE.items())


class Calls:
    def __init__(self, function, *args):
        self.function = function
        self.args = args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize(
    "function", [os.system, os.mkdir, subprocess.Popen, eval, exec, input, getattr, __import__, open]
)
def test_functions_of_the_standard_library_are_refused_and_not_run(function, tmp_path):
    made = tmp_path / "made"
    torch.save({"model": STATE, "beside": Calls(function, f"touch {made}")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: refused, it would run code") as e:
        load_state_file(tmp_path / "x.pth")
    assert "\n" not in str(e.value) and not made.exists()


ran = []


def run_code(value: int) -> int:
    ran.append(value)
    return value


def test_functions_of_other_packages_are_not_run(tmp_path):
    torch.save({"model": STATE, "beside": Calls(run_code, 1)}, tmp_path / "x.pth")
    assert load_state_file(tmp_path / "x.pth")["model"].keys() == STATE.keys() and not ran


def test_what_torch_cannot_read_is_one_line_with_its_reason(tmp_path):
    torch.save({"model": STATE, "beside": collections.deque([1])}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: not a readable checkpoint \(torch cannot") as e:
        load_state_file(tmp_path / "x.pth")
    assert "\n" not in str(e.value)

"""Programs answer --help and mistakes in a configuration without torch; signatures are read right."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from vidssl.config import declarations, keys_of
from vidssl.config.signatures import PartTable, meanings
from vidssl.data.schema import AUGMENT_PARTS
from vidssl.evaluation.dense.schema import TASKS, DenseConfig
from vidssl.evaluation.probe_config import PROTOCOLS, ProbeConfig
from vidssl.model.schema import MODEL_PARTS
from vidssl.objective import schema as objective_schema
from vidssl.training.finetune_schema import HEAD_PARTS, FinetuneConfig
from vidssl.training.schema import RunConfig, TrainConfig

ROOT = Path(__file__).parents[2]
TABLES = [
    *(AUGMENT_PARTS, TASKS, PROTOCOLS, MODEL_PARTS, HEAD_PARTS),
    *(value for value in vars(objective_schema).values() if isinstance(value, PartTable)),
]
HEAVY = ("torch", "torchvision", "timm", "av", "decord", "accelerate", "matplotlib", "transformers")
# Runs a file as a program, and writes which of the heavy modules it has imported when it ends.
PROBE = f"""
import runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = ""
code = 0
try:
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as e:
    code = e.code or 0
print("IMPORTED", code, *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)
"""
TRAIN = [
    "vidssl/train.py",
    "configs/method/vjepa_tiny.yaml",
    "configs/model/vit_micro.yaml",
    "configs/run/smoke.yaml",
]
PROBE_ARGS = ["vidssl/probe.py", "configs/probe/linear.yaml", "encoder=x", "out=x"]


def answer(*argv: str) -> tuple[int, list[str], str, str]:
    """Returns (exit status, heavy modules that were imported, stdout, stderr)."""
    run = subprocess.run([sys.executable, "-c", PROBE, *argv], cwd=ROOT, capture_output=True, text=True)
    lines = run.stderr.splitlines()
    status, *imported = lines[-1].split()[1:]
    return int(status), imported, run.stdout, "\n".join(lines[:-1])


@pytest.mark.parametrize("table", TABLES, ids=[t.name for t in TABLES])
def test_signatures_in_the_source_are_those_of_the_callables(table):
    parts = getattr(importlib.import_module(table.module), table.name)
    assert list(table.expressions()) == [kind for kind in table if kind in table.expressions()]
    for kind in table.expressions():
        read = table[kind].declarations()
        actual = declarations(parts[kind])
        assert set(read) == set(actual)
        for name, declared in actual.items():
            assert str(read[name].default) == str(declared.default)
            # modules are objects of the program, not of the user
            assert str(read[name].hint) == str(declared.hint) or name in ("encoder", "teacher")


def test_an_entry_added_to_a_table_at_run_time_can_be_selected(monkeypatch):
    masks = importlib.import_module("vidssl.objective.masks").MASKS
    monkeypatch.setitem(masks, "mine", lambda ratio=0.5: ratio)
    assert "mine" in objective_schema.MASK_PARTS
    assert objective_schema.MASK_PARTS["mine"](ratio=0.25) == 0.25


def test_meanings_are_the_comments_of_the_source():
    found = meanings(RunConfig)
    assert found["steps"] == "optimizer steps" and found["seed"] == ""
    assert found["loss_spike_std"].startswith("skip a step whose loss")


@pytest.mark.parametrize("program", ["train", "probe", "finetune", "dense"])
def test_help_lists_every_key_and_the_shipped_files_without_torch(program):
    cls = {"train": TrainConfig, "probe": ProbeConfig, "finetune": FinetuneConfig, "dense": DenseConfig}[
        program
    ]
    status, imported, out, _ = answer(f"vidssl/{program}.py", "--help")
    assert (status, imported) == (0, [])
    assert not [key for key in keys_of(cls) if key not in out]
    folder = "method" if program == "train" else program
    assert not [path.name for path in (ROOT / f"configs/{folder}").glob("*.yaml") if path.name not in out]


@pytest.mark.parametrize(
    "argv, words",
    [
        ([*TRAIN, "run.step=3"], "did you mean run.steps?"),
        ([*TRAIN, "steps=3"], "did you mean run.steps?"),
        ([*TRAIN, "method.mask.kind=multiblock_4d"], "multiblock_3d"),
        ([*TRAIN, "optim.lr=high"], "optim.lr"),
        ([*TRAIN, "configs/method/mae.yaml"], "give one of the two files"),
        ([*TRAIN, "configs/method/vjep.yaml"], "did you mean configs/method/vjepa.yaml?"),
        ([*PROBE_ARGS, "data.train=x"], "'data.test' is missing"),
        ([*PROBE_ARGS, "data.trane=x"], "did you mean data.train?"),
        (["vidssl/finetune.py", "configs/finetune/folder.yaml", "tune.epoch=3"], "did you mean tune.epochs?"),
        (["vidssl/dense.py", "configs/dense/depth.yaml", "task.kind=dept"], "depth"),
    ],
)
def test_a_mistake_is_answered_in_one_line_without_torch(argv, words):
    status, imported, _, err = answer(*argv)
    assert (status, imported) == (2, [])
    assert words in err and err.startswith("error: ") and "\n" not in err

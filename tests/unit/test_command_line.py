"""Programs answer --help and mistakes in a configuration without torch; signatures are read right."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vidssl.config import declarations, keys_of
from vidssl.config.command_line import print_help
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
OWN = ("data_prep", "vidssl", "zoo", "compare")  # imported anew by each program
# Runs programs one after the other, and writes what each has answered and which of the modules it imported.
RUN = f"""
import contextlib, io, json, runpy, sys
answers = []
for argv in json.load(sys.stdin):
    sys.argv, sys.path[0], status = list(argv), "", 0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if argv[0].endswith(".py"):
                sys.path[0] = argv[0].rpartition("/")[0]
                runpy.run_path(argv[0], run_name="__main__")
            else:
                runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as e:
            status = e.code or 0
    imported = [m for m in {HEAVY!r} if m in sys.modules]
    for name in [m for m in sys.modules if m.partition(".")[0] in {OWN!r}]:
        del sys.modules[name]
    answers.append((status, imported, out.getvalue(), err.getvalue().strip()))
print(json.dumps(answers))
"""
TINY = "configs/method/vjepa_tiny.yaml configs/model/vit_micro.yaml configs/run/smoke.yaml"
PROBE_ARGS = ["vidssl/probe.py", "configs/probe/linear.yaml", "encoder=x", "out=x"]


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


CONFIGURED = {"train": TrainConfig, "probe": ProbeConfig, "finetune": FinetuneConfig, "dense": DenseConfig}
PROGRAMS = [
    *(f"vidssl/{name}.py" for name in CONFIGURED),
    *(f"data_prep.{name}" for name in ("pack", "scan", "verify", "leaks", "synthetic")),
    *(f"vidssl.commands.{name}" for name in ("embed", "search", "quickstart")),
    *(f"tools/{name}.py" for name in ("convert", "compare", "show_masks", "zoo_run")),
    *(f"vidssl.commands.{name}" for name in ("show", "decode", "report")),
]
MISTAKES = [  # beside those of docs/mistakes.md
    ([*PROBE_ARGS, "data.trane=x"], "did you mean data.train?"),
    (["data_prep.verify", "docs"], "docs: no index.json"),
    (["data_prep.leaks", "docs", "docs"], "docs: "),
    (["data_prep.leaks", "a", "b", "--workers", "0"], "must be positive"),
    (["data_prep.synthetic", "OUT", "--test", "-1"], "must be positive"),
    (["vidssl.commands.embed", "nowhere", "--encoder", "docs", "--out", "OUT"], "nowhere: no such file or"),
    (["vidssl.commands.embed", "docs", "--encoder", "docs", "--out", "OUT", "--hop", "1"], "--window, too"),
    (["vidssl.commands.search", "docs", "a.mp4"], "docs: no embedding.json: no finished output of"),
    (["tools/convert.py", "nowhere", "OUT"], "nowhere: no such file"),
    (["tools/compare.py", "docs", "docs"], "different --names"),
    (["tools/show_masks.py", "--method", "vjep", "OUT.png"], "did you mean vjepa?"),
    (["vidssl.commands.show", "clip", "nowhere.mp4", "OUT.png"], "nowhere.mp4: no such file"),
    (["vidssl.commands.show", "features", "docs", "README.md", "OUT.jpg"], "OUT.jpg: give a file name"),
    (["vidssl.commands.decode", "docs", "--out", "OUT"], "docs: no run folder"),
    (["vidssl.commands.quickstart", "nowhere"], "nowhere: no such folder"),
    (["vidssl.commands.quickstart", "--out", "OUT", "--set", "run.stepz=1"], "--set: "),
    (["vidssl.commands.quickstart", "--out", "OUT", "--probe", "probe.epoch=1"], "--probe: "),
    (["vidssl.commands.quickstart", "docs", "--out", "docs/OUT"], "lies inside"),
    (["tools/zoo_run.py", "configs/zoo/quickstart.yaml", "out=OUT"], "runs.videomae_tiny: data.train: runs/"),
]


def listed_mistakes() -> list[tuple[list[str], str]]:
    """The first table of docs/mistakes.md: arguments and the line."""
    table = (ROOT / "docs/mistakes.md").read_text().split("These are known once")[0]
    rows = re.findall(r"^\| [^|]+ \| `vidssl (.*)` \| (.*) \|$", table, re.M)
    return [
        (["vidssl.cli", *command.replace("TINY", TINY).replace("runs/x", "OUT").split()], line)
        for command, line in rows
    ]


LISTED = listed_mistakes()


# Programs are named as a wheel has them; module headers may say how the files are run.
OTHER_FORM = re.compile(r"python3? (-m )?(data_prep|vidssl|tools)[./]|(run|need|with) data_prep\.")


@pytest.mark.parametrize("folder", ["vidssl", "data_prep", "configs"])
def test_hints_name_commands_of_the_package(folder):
    for path in sorted((ROOT / folder).rglob("*.py" if folder != "configs" else "*.yaml")):
        lines = [line for line in path.read_text().splitlines() if OTHER_FORM.search(line)]
        assert not lines or path == ROOT / "vidssl/cli.py", f"{path.name}: {lines}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(program, arguments) -> (exit status, heavy modules that were imported, stdout, stderr)."""
    out = tmp_path_factory.mktemp("command_line")
    commands = [[program, "--help"] for program in PROGRAMS] + [argv for argv, _ in (*MISTAKES, *LISTED)]
    filled = [[a.replace("OUT", str(out / "OUT")) for a in argv] for argv in commands]
    run = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(filled), cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not list(out.iterdir())
    return dict(zip(map(tuple, commands), json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("program", CONFIGURED)
def test_help_lists_every_key_and_the_shipped_files(program, answers, capsys):
    folder = "method" if program == "train" else program
    print_help(["--help", "all"], CONFIGURED[program], "", (folder,))
    listed = capsys.readouterr().out
    assert not [key for key in keys_of(CONFIGURED[program]) if key not in listed]
    for out in (listed, answers[f"vidssl/{program}.py", "--help"][2]):
        assert not [path.stem for path in (ROOT / f"configs/{folder}").glob("*.yaml") if path.stem not in out]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_answered_without_torch_and_decoders(program, answers):
    status, imported, out, _ = answers[program, "--help"]
    assert (status, imported) == (0, [])
    name = program.removesuffix(".py").rpartition("/")[2].rpartition(".")[2]
    assert any(name.replace("_", sign) in out for sign in "_- ")


@pytest.mark.parametrize("argv, words", MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_answered_in_one_line_without_torch(argv, words, answers):
    status, imported, _, err = answers[tuple(argv)]
    assert (status, imported) == (2, [])
    assert words in err.splitlines()[-1] and "Traceback" not in err
    # argparse writes the usage before its line
    assert (err.startswith("error: ") and "\n" not in err) or err.startswith("usage: ")


@pytest.mark.parametrize("argv, line", LISTED, ids=[" ".join(argv[1:]) for argv, _ in LISTED])
def test_the_listed_mistakes_print_their_lines(argv, line, answers):
    status, imported, _, err = answers[tuple(argv)]
    assert (status, imported) == (2, []) and "Traceback" not in err
    pattern = re.escape(line).replace(re.escape("..."), ".*")
    assert re.fullmatch(f"(vidssl convert: )?error: {pattern}", err.splitlines()[-1])


def test_forty_mistakes_are_listed():
    text = (ROOT / "docs/mistakes.md").read_text()
    assert len(re.findall(r"^\| [^|]+ \| `.*` \| .* \|$", text, re.M)) >= 40 and len(LISTED) >= 35

"""Every example runs at toy size, as a script in an empty folder; the notebook cell by cell."""

import json
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest

from vidssl.objective.masks import MASKS

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDSSL_TOY", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    before = dict(MASKS)
    yield tmp_path
    for name in set(MASKS) - set(before):
        del MASKS[name]


def run_example(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_embed_and_search(empty_folder, capsys):
    run_example("embed_and_search.py")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(line.count("train_") == 3 for line in lines)


def test_probe_public_checkpoint(empty_folder, capsys):
    run_example("probe_public_checkpoint.py")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("trained   motion") and lines[1].startswith("untrained motion")


def test_pretrain_on_your_videos(empty_folder, capsys):
    run_example("pretrain_on_your_videos.py")
    assert (empty_folder / "run" / "encoder.safetensors").exists()
    assert (empty_folder / "features" / "features.npy").exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith("encoder: run/encoder.safetensors")


def test_new_mask(empty_folder, capsys):
    run_example("new_mask.py")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        *("step 1", "step 2", "step 3"),
    ]
    assert (empty_folder / "chessboard_encoder" / "encoder.safetensors").exists()


def test_first_look(empty_folder):
    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "first_look.ipynb").read_text())
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"cell {number}: commit the notebook without its outputs"
            exec(compile("".join(cell["source"]), f"first_look.ipynb, cell {number}", "exec"), names)
    assert len(names["curve"]) == 2 and names["features"].shape == (8, 128)


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} <= tested

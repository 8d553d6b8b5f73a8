"""The package as it is installed from a wheel, into an empty folder outside of the repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [f"configs/{name}.yaml" for name in ("method/videomae_tiny", "model/vit_micro", "data/quickstart")]
CODE = f"""
import contextlib, io, json, pathlib, sys
import vidssl
from vidssl.cli import main

def said(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(list(words))
    return out.getvalue()

site, shards, video = sys.argv[1:]
assert all(pathlib.Path(m.__file__).is_relative_to(site) for m in (vidssl, sys.modules["vidssl.cli"]))
answers = {{
    "help": said("--help"),
    "methods": said("list", "methods"),
    "config": said("train", *{FILES}, "configs/run/smoke.yaml", "--print-config"),
    "torch": "torch" in sys.modules,
}}
objective = vidssl.make_objective(*{FILES}, "model.depth=1", "augment.size=16")
objective.save_encoder("own")
dataset = vidssl.open_dataset(shards, batch=2, frames=8, size=16, steps=1, workers=0)
answers["loss"] = objective(next(iter(dataset)).video)["loss"].item()
answers["features"] = list(vidssl.load_encoder("own").embed(video).shape)
answers["public"] = [name for name in vidssl.__all__ if not hasattr(vidssl, name)]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of an installation from a copy of the sources, without the dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vidssl", "data_prep"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    target = folder / "site"
    subprocess.run([*pip, *offline, "--target", target, source], check=True, cwd=folder)
    return target


def test_an_installed_wheel_works_outside_of_the_repository(site, tiny_corpus, tiny_shards, tmp_path):
    """Commands, configurations, public names and an encoder."""
    video = min(tiny_corpus.rglob("*.mp4"))
    done = subprocess.run(
        [sys.executable, "-c", CODE, site, tiny_shards, video],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert "vidssl COMMAND" in answers["help"] and "vjepa2_1" in answers["methods"]
    assert "videomae_tiny.yaml" in answers["config"] and not answers["torch"]
    assert answers["loss"] > 0 and answers["features"] == [128] and answers["public"] == []


def test_a_wheel_has_the_console_script(site):
    script = (site / "bin" / "vidssl").read_text()
    assert "from vidssl.cli import console" in script

"""Every run of configs/ablation merges with a model and data and builds; no two of a file are the same."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from vidssl.config import load_config, to_tree
from vidssl.core.rng import KeyedRNG
from vidssl.training.schema import TrainConfig

sys.path.append(str(Path(__file__).parents[1] / "integration"))
from test_methods import PREDICTOR, ROOT, RUN, SMALL

FILES = sorted((ROOT / "configs/ablation").glob("*.yaml"))
RUNS = {
    f"{file.stem}: {name}": arguments
    for file in FILES
    for name, arguments in yaml.safe_load(file.read_text())["runs"].items()
}


def configure(arguments: list[str]) -> TrainConfig:
    given = [str(ROOT / item) if item.endswith(".yaml") else item for item in arguments]
    base = yaml.safe_load(Path(given[0]).read_text())
    frames = 1 if base.get("model", {}).get("tubelet") == 1 else 8
    sizes = [f"method.predictor.{key}={value}" for key, value in PREDICTOR.items()]
    return load_config([*given, *RUN, *SMALL, *sizes, f"data.frames={frames}"], TrainConfig)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_builds_and_gives_a_loss(name):
    cfg = configure(RUNS[name])
    video = torch.randn(4, 3, cfg.data.frames, 32, 32)
    assert cfg.build_objective()(video, KeyedRNG(0, 0, torch.arange(4)))["loss"].isfinite()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_runs_of_a_file_differ_in_the_method_alone(file):
    trees = [
        to_tree(configure(arguments)) for name, arguments in RUNS.items() if name.startswith(f"{file.stem}:")
    ]
    methods = [tree.pop("method") for tree in trees]
    assert all(tree == trees[0] for tree in trees) and len(trees) > 1
    assert all(a != b for i, a in enumerate(methods) for b in methods[:i])


def test_the_page_of_methods_lists_all_files():
    page = (ROOT / "docs/methods.md").read_text()
    assert all(f"(../configs/ablation/{file.name})" in page for file in FILES)

"""The worked examples of docs/architecture.md and docs/adding_a_method.md run, the files that they name
exist, and the spine is short."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.sources import SOURCES
from vidssl.config import load_config
from vidssl.core.rng import KeyedRNG
from vidssl.model.predictor import PREDICTORS
from vidssl.objective.masks import MASKS
from vidssl.objective.targets import TARGETS
from vidssl.training.optim import build_optimizer
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()
EXAMPLES = dict(re.findall(r"^### \.\.\. (.+?)\n.*?^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def restored_tables():
    """Takes back the lines that an example adds to the tables of parts."""
    tables = (MASKS, TARGETS, PREDICTORS, SOURCES)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name):
    exec(compile(EXAMPLES[name], f"docs/architecture.md: {name}", "exec"), {"__name__": "example"})


def test_each_kind_of_part_has_an_example():
    assert set(EXAMPLES) == {"a source format", "a decoding backend"}


def test_a_method_is_added_as_the_page_says(tmp_path):
    """Its mask, target and predictor work, and its method trains: the loss falls."""
    names = {"__name__": "page"}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(code, "docs/adding_a_method.md", "exec"), names)
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    file = tmp_path / "moving_colour.yaml"
    file.write_text(text)
    small = [
        "model.kind=vit",
        "model.dim=24",
        "model.depth=1",
        "model.heads=2",
        "model.patch=8",
        "optim.warmup=0",
    ]
    small += ["method.predictor.width=24", "method.predictor.depth=1", "method.predictor.heads=2"]
    small += ["augment.kind=center_crop", "augment.size=32", "data.frames=4", "data.stride=1", "data.train=x"]
    cfg = load_config([str(file), *small, "run.out=x", "run.steps=20", "run.batch=2"], TrainConfig)
    objective = cfg.build_objective()
    optimizer = build_optimizer(objective, replace(cfg.optim, lr=2e-3))
    video = torch.randn(2, 3, 4, 32, 32)
    losses = []
    for _ in range(20):
        loss = objective(video, KeyedRNG(0, 0, torch.arange(2)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_named_files_exist():
    roots = (ROOT, ROOT / "vidssl")
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|sh))`", TEXT + PAGE))
    named -= {"configs/method/moving_colour.yaml", "tests/tiny_methods/moving_colour.yaml"}  # of the example
    assert len(named) > 20
    missing = [
        n for n in sorted(named) if not any((r / n).exists() for r in roots) and not list(ROOT.rglob(n))
    ]
    assert not missing


def test_spine_is_under_3000_lines():
    section = TEXT[TEXT.index("## Reading order") : TEXT.index("Read when it is needed")]
    spine = re.findall(r"`([\w/]+\.py)`", section)
    assert len(spine) >= 14
    assert sum(len((ROOT / "vidssl" / name).read_text().splitlines()) for name in spine) < 3000


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_the_front_page_is_short_and_leads_to_every_other():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert all(f"](docs/{page.name}" in text for page in PAGES[2:] if page.stem != "index")


def test_the_methods_of_the_front_page_exist():
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Methods") : text.index("## Beside others")]
    rows = [line for line in section.splitlines() if line.startswith("|") and "configs/method" not in line]
    named = re.findall(r"`([\w*]+)`", "".join(rows))
    assert len(named) > 20
    assert all(list((ROOT / "configs/method").glob(f"{name}.yaml")) for name in named)


def test_every_page_is_in_the_site():
    """docs/index.md names each page once."""
    listed = re.findall(r"^([a-z_]+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index"
    )


def test_the_site_is_built_without_a_warning(tmp_path):
    build = pytest.importorskip("sphinx.cmd.build", reason="needs the extra docs")
    pytest.importorskip("furo", reason="needs the extra docs")
    assert build.main(["-q", "-W", "-b", "html", str(ROOT / "docs"), str(tmp_path)]) == 0
    assert (tmp_path / "methods.html").exists()

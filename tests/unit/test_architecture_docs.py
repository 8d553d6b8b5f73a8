"""The worked examples of docs/architecture.md run, the files that it names exist, and its spine is short."""

import re
from pathlib import Path

import pytest

from data_prep.sources import SOURCES
from vidssl.model.predictor import PREDICTORS
from vidssl.objective.masks import MASKS
from vidssl.objective.targets import TARGETS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
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
    assert set(EXAMPLES) == {"a mask", "a target", "a predictor", "a source format", "a decoding backend"}


def test_named_files_exist():
    roots = (ROOT, ROOT / "vidssl")
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|sh))`", TEXT))
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

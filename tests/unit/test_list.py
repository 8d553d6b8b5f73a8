"""`vidssl list` names what the tables and files of the project have."""

import json
from pathlib import Path

import pytest

from data_prep.sources import SOURCES
from vidssl.commands import list as list_command
from vidssl.commands.catalogue import CATALOGUES, PACK_SOURCES
from vidssl.core.errors import UserError
from vidssl.objective.schema import MASK_PARTS, TARGET_PARTS

CONFIGS = Path(__file__).parents[2] / "configs"


def listed(capsys, *argv):
    list_command.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_every_list_has_names_and_texts(capsys):
    counts = listed(capsys)
    assert set(counts) == set(CATALOGUES) and all(counts.values())
    for name, catalogue in CATALOGUES.items():
        entries = list(catalogue.entries())
        assert len({entry.name for entry in entries}) == counts[name]
        assert not [entry.name for entry in entries if not entry.about], name


def test_lists_are_those_of_tables_and_folders(capsys):
    assert [e["name"] for e in listed(capsys, "masks")] == list(MASK_PARTS)
    assert [e["name"] for e in listed(capsys, "targets")] == list(TARGET_PARTS)
    methods = [e["name"] for e in listed(capsys, "methods")]
    assert methods == sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
    assert list(PACK_SOURCES) == list(SOURCES)


def test_a_filter_keeps_the_names_that_match(capsys):
    assert [e["name"] for e in listed(capsys, "models", "*small*")] == ["vit_small"]
    (vjepa,) = listed(capsys, "methods", "vjepa")
    assert vjepa["papers"] == ["2404.08471"] and vjepa["about"].startswith("V-JEPA (Bardes et al. 2024): ")
    list_command.main(["methods", "vjepa2*", "mae"])
    out = capsys.readouterr().out
    assert "vjepa2_cooldown" in out and "use: vidssl train configs/method/NAME.yaml" in out
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize(
    "argv, words",
    [
        (["mask"], "did you mean masks?"),
        (["masks", "tub"], "did you mean tube?"),
        (["xyz"], "lists: methods, models"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(argv, words):
    with pytest.raises(UserError, match=r"list ") as error:
        list_command.main(argv)
    assert words in str(error.value)

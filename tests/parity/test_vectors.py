"""The compact vectors hold in every clone, and each of them pins something: with one error injected, its case
fails."""

from pathlib import Path

import check_parity
import pytest
from case import Case
from check_parity import NOT_IMPLEMENTED, case_paths, check
from compact import uniform
from mutations import MUTATIONS

from vidssl.core.errors import UserError
from vidssl.model import positions
from vidssl.pretrained import public

VECTORS = Path(__file__).parent / "vectors"
CASES = [p.stem for p in case_paths(VECTORS) if p.stem != "vjepa_mask_statistics"]  # see test_masks


def test_recreated_values():
    """The check values of vectors/README.md."""
    assert uniform("clips", [3]).tolist() == [0.15037977695465088, -0.18979096412658691, -0.7736337184906006]


@pytest.mark.parametrize("name", CASES)
def test_case_passes(name, capsys):
    assert check(VECTORS / f"{name}.json"), capsys.readouterr().out


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_fails(name, monkeypatch, capsys):
    case, mutate = MUTATIONS[name]
    mutate(monkeypatch)
    assert not check(VECTORS / f"{case}.json")
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["videomae_pretrain", "vjepa_sincos", "vjepa2_rope", "ijepa"])
def test_eps_is_visible_in_gradients(name, monkeypatch):
    """eps 1e-5 in place of 1e-6 moves a gradient by far more than our error."""
    right = gradient_error(name)
    original = Case.overrides
    monkeypatch.setattr(Case, "overrides", lambda case: {**original(case), "eps": 1e-5})
    assert gradient_error(name) > 20 * right


def gradient_error(name: str) -> float:
    cases = []

    class Recorded(Case):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            cases.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_parity, "Case", Recorded)
        check(VECTORS / f"{name}.json")
    return cases[0].largest_error["gradient"][0]


def test_all_vectors_are_accounted_for():
    stems = {p.stem for p in VECTORS.glob("*.safetensors")}
    assert stems == set(CASES) | NOT_IMPLEMENTED
    assert sum(p.stat().st_size for p in VECTORS.iterdir()) < 1e6


def test_folder_without_cases(tmp_path):
    with pytest.raises(UserError, match="no case in it"):
        check_parity.main([str(tmp_path)])


# Fixed tables in a file: a wrong table of ours would be read as a learned one, with the same outputs.

TABLE_KINDS = {
    "vjepa_sincos": "sincos",
    "vjepa_sincos_uniform": "sincos_uniform",
    "vjepa2_sincos_uniform": "sincos_uniform",
    "ijepa": "sincos_2d",
    "mae": "sincos_2d",
    "mae_st_plain": "learned",
    "mae_st_sep_cls": "learned_separable",
}


def position_kinds(name: str) -> tuple[str, str]:
    """Inferred positions of encoder and predictor."""
    case = Case(VECTORS / f"{name}.json")
    checkpoint = public.checkpoint_from_state(case.state, name, case.overrides())
    assert checkpoint.predictor is not None
    return checkpoint.model["positions"], checkpoint.predictor["positions"]


@pytest.mark.parametrize("name, kind", TABLE_KINDS.items())
def test_table_is_recognised(name, kind):
    assert position_kinds(name) == (kind, kind)


@pytest.mark.parametrize("name, kind", [item for item in TABLE_KINDS.items() if item[1].startswith("sincos")])
def test_other_table_is_not_recognised(name, kind, monkeypatch):
    right = positions.FIXED_TABLES[kind]
    for wrong in (lambda t: t.roll(t.shape[1] // 2, 1), lambda t: t.flip(1), lambda t: t.roll(1, 0)):
        monkeypatch.setitem(
            positions.FIXED_TABLES, kind, lambda grid, dim, wrong=wrong: wrong(right(grid, dim))
        )
        assert position_kinds(name) == ("learned", "learned")

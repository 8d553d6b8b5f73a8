"""Scores of a spectrum against closed forms."""

import pytest
import torch

from vidssl.core.spectrum import MAX_TOKENS, alpha_req, rankme, singular_values


def test_singular_values_of_an_orthogonal_matrix():
    q, _ = torch.linalg.qr(torch.randn(64, 16))
    scale = torch.linspace(4, 1, 16)
    assert torch.allclose(singular_values(q * scale), scale, atol=1e-5)
    assert torch.allclose(singular_values((q * scale).reshape(8, 8, 16)), scale, atol=1e-5)


def test_singular_values_of_many_rows_use_a_sample():
    values = singular_values(torch.ones(3 * MAX_TOKENS, 2))
    assert values[0] == pytest.approx((2 * MAX_TOKENS) ** 0.5, rel=1e-5)


def test_singular_values_of_non_finite_features():
    values = singular_values(torch.full((8, 3), torch.inf))
    assert values.shape == (3,) and values.isnan().all()


def test_rankme():
    assert rankme(torch.ones(8)) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1, rel=1e-4)


def test_alpha_req_is_the_exponent_of_a_power_law():
    eigenvalues = torch.arange(1, 101).float() ** -1.5
    assert alpha_req(eigenvalues.sqrt()) == pytest.approx(1.5, rel=1e-4)


def test_singular_values_are_exact_and_never_raise(monkeypatch):
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(0, -5, 40)
    )
    exact = torch.linalg.svdvals(x.double()).float()
    assert torch.allclose(singular_values(x), exact, atol=1e-7 * float(exact[0]))
    assert torch.allclose(singular_values(x.T), exact, atol=1e-7 * float(exact[0]))

    def fails(_: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("it did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    assert singular_values(x).isnan().all()

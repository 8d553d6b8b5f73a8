"""Schedules: ends, middle, and constant after the end."""

import pytest

from vidssl.core.schedules import DECAYS, cosine, exponential, linear


@pytest.mark.parametrize("name", DECAYS)
def test_ends(name):
    decay = DECAYS[name]
    assert decay(2.0, 0.5, 0.0) == pytest.approx(2.0)
    assert decay(2.0, 0.5, 1.0) == pytest.approx(0.5)
    assert decay(2.0, 0.5, 3.0) == pytest.approx(0.5)


def test_shapes():
    assert cosine(2.0, 0.0, 0.5) == pytest.approx(1.0)
    assert cosine(2.0, 0.0, 0.25) == pytest.approx(1 + 0.5**0.5)
    assert linear(2.0, 0.0, 0.25) == pytest.approx(1.5)
    assert exponential(4.0, 1.0, 0.5) == pytest.approx(2.0)

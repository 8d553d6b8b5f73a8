"""Checkpoints and failures: the interval is the best one, and the goodput that of a simulated run."""

import random

import pytest

from vidssl.planning.failures import best_interval_s, goodput

SAVE_S, RESTART_S, MTBF_S = 30.0, 300.0, 20_000.0


def test_no_other_interval_loses_less():
    best = best_interval_s(SAVE_S, MTBF_S)
    reached = goodput(best, SAVE_S, RESTART_S, MTBF_S)
    others = [goodput(best * factor, SAVE_S, RESTART_S, MTBF_S) for factor in (0.5, 0.8, 1.25, 2)]
    assert max(others) < reached < 1
    assert best == pytest.approx((2 * SAVE_S * MTBF_S) ** 0.5, rel=0.05)  # Young's


def test_goodput_is_that_of_a_run_with_failures():
    """Failures at random times; each costs what was done since the last checkpoint, and a restart."""
    rng = random.Random(0)
    interval, saved, clock = 1_500.0, 0, 0.0
    while saved < 20_000:
        needed = interval + SAVE_S
        fails_after = rng.expovariate(1 / MTBF_S)
        while fails_after < needed:
            clock += fails_after
            # a restart may fail, too
            while (restart_fails := rng.expovariate(1 / MTBF_S)) < RESTART_S:
                clock += restart_fails
            clock += RESTART_S
            fails_after = rng.expovariate(1 / MTBF_S)
        clock += needed
        saved += 1
    assert goodput(interval, SAVE_S, RESTART_S, MTBF_S) == pytest.approx(saved * interval / clock, abs=0.002)

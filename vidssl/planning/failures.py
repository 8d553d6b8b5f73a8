"""What failures cost: how often to save, and the share of the time in which a run makes progress.

Sources: Young 1974, A first order approximation to the optimum checkpoint interval; Daly 2006, A higher order
estimate of the optimum checkpoint interval for restart dumps.
"""

import math


def best_interval_s(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between two checkpoints with which the least time is lost: Daly's second estimate.

    save_s: that work stops for a checkpoint; mtbf_s: between failures of the run.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(save_s / (2 * mtbf_s))
    return math.sqrt(2 * save_s * mtbf_s) * (1 + ratio / 3 + ratio**2 / 9) - save_s


def goodput(interval_s: float, save_s: float, restart_s: float, mtbf_s: float) -> float:
    """The share of the time that work is done which is not lost again (Daly's complete model: failures are a
    Poisson process, and may also hit checkpoints and restarts).

    restart_s: from a failure to the first step after it.
    """
    expected_s = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + save_s) / mtbf_s)
    return interval_s / expected_s

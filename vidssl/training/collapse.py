"""Signs of a collapse in the feature statistics of a run.

Each kind of collapse has signs of its own, because none shows in all: features that shrink to a point keep
their rank, features of few directions keep their deviation, and tubelets that become alike keep both.
"""

import math
from typing import Any, NamedTuple

MEASUREMENTS = 2  # in a row that show a collapse before it is reported


class Sign(NamedTuple):
    """A statistic that is below `bound` and below `fraction` of its best value of the run."""

    statistic: str
    bound: float = math.inf
    fraction: float = math.inf


# What is seen, and the signs that show it together. In healthy runs of ours std_clips fell from 0.9 to 0.12
# (pixel targets, whose features encode position more than content) at a constant rank; in collapsing ones it
# fell to 0.06 of 0.59 with a cosine of 0.998, and to 0.03 of 0.90.
COLLAPSES: tuple[tuple[str, tuple[Sign, ...]], ...] = (
    ("all clips are alike", (Sign("std_clips", 0.1, 0.2), Sign("spread", 0.02, 0.2))),
    ("all clips are alike", (Sign("std_clips", 0.1, 0.05),)),
    ("all clips are alike", (Sign("std_clips", 0.001),)),
    ("few directions vary", (Sign("participation", 6, 0.5), Sign("rank", math.inf, 0.3))),
    ("few directions vary", (Sign("rank", 2, 0.6),)),
    ("few channels vary", (Sign("channel_evenness", 0.05, 0.2),)),
    ("the time slices of a clip are alike", (Sign("std_time_share", 0.05, 0.2),)),
    ("the tokens of a clip are alike", (Sign("std_tokens", 0.1, 0.1),)),
)


class CollapseDetector:
    """Compares each measurement with fixed bounds and with the best of the run, which slow collapses cannot
    move. The best is a value that two measurements in a row reached; the first counts alone."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self.previous: dict[str, float] = {}
        self.in_a_row: dict[str, int] = {}  # what was seen -> measurements in a row

    def add(self, stats: dict[str, float]) -> None:
        """stats: of feature_stats.feature_statistics."""
        values = signs_of(stats)
        # the loss guard reports what is not finite
        if not all(map(math.isfinite, values.values())):
            return
        for name, value in values.items():
            reached = min(value, self.previous.get(name, value))
            self.best[name] = max(reached, self.best.get(name, reached))
        self.previous = values
        seen = {text for text, signs in COLLAPSES if all(self._shows(sign, values) for sign in signs)}
        self.in_a_row = {text: self.in_a_row.get(text, 0) + 1 for text, _ in COLLAPSES if text in seen}

    def _shows(self, sign: Sign, values: dict[str, float]) -> bool:
        value = values[sign.statistic]
        limit = self.best[sign.statistic] * sign.fraction if sign.fraction < math.inf else math.inf
        return value < min(sign.bound, limit)

    @property
    def collapsed(self) -> bool:
        return max(self.in_a_row.values(), default=0) >= MEASUREMENTS

    def warning(self) -> str | None:
        """What is seen for the last of MEASUREMENTS in a row, and by which values; None if nothing is new."""
        if MEASUREMENTS not in self.in_a_row.values():
            return None
        seen = [text for text, count in self.in_a_row.items() if count >= MEASUREMENTS]
        names = dict.fromkeys(sign.statistic for text, signs in COLLAPSES if text in seen for sign in signs)
        values = ", ".join(f"{name} {self.previous[name]:.3g} (best {self.best[name]:.3g})" for name in names)
        return f"the features have collapsed: {' and '.join(seen)}: {values}"

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as plain data."""
        return {"best": self.best, "previous": self.previous, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned. A checkpoint without it starts the comparison anew."""
        self.best = state.get("best", {})
        self.previous = state.get("previous", {})
        self.in_a_row = state.get("in_a_row", {})


def signs_of(stats: dict[str, float]) -> dict[str, float]:
    """The statistics that fall in a collapse. spread: 1 - cosine; std_time_share: std_time / std_clips."""
    names = ("std_clips", "participation", "rank", "channel_evenness", "std_tokens")
    values = {name: stats[name] for name in names}
    values["spread"] = 1 - stats["cosine"]
    values["std_time_share"] = stats["std_time"] / stats["std_clips"] if stats["std_clips"] else 0.0
    return values

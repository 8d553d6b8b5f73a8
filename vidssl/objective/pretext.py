"""The third formula: a transformation of the clip is named."""

from collections.abc import Callable

from vidssl.objective.objective import Objective

PRETEXTS: dict[str, Callable[..., Objective]] = {}

"""The second formula: views of a clip agree."""

from collections.abc import Callable

from vidssl.objective.objective import Objective

AGREEMENTS: dict[str, Callable[..., Objective]] = {}

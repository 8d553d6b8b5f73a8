"""The `method` section, without torch."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from vidssl.config import Choice, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from vidssl.config.signatures import PartTable
from vidssl.core.errors import UserError

MASK_PARTS = PartTable("vidssl.objective.masks", "MASKS")
TARGET_PARTS = PartTable("vidssl.objective.targets", "TARGETS")
QUERY_PARTS = PartTable("vidssl.model.predictor", "QUERIES")
PREDICTOR_PARTS = PartTable("vidssl.model.predictor", "PREDICTORS")
ERROR_PARTS = PartTable("vidssl.objective.objective", "ERRORS")


class BlockGroup(NamedTuple):
    """`blocks` boxes, each of `scale` times the frame's area; their union is hidden."""

    blocks: PositiveInt
    scale: PositiveFloat


@dataclass(frozen=True)
class ContextLoss:
    """The error at the context tokens, added to the loss. Source: V-JEPA 2.1 (app/vjepa_2_1)."""

    weight: NonNegativeFloat = 0.0  # 0: none; V-JEPA 2.1: 0.5
    by_distance: bool = True  # multiplies each error by 1 / sqrt(distance in tokens to the nearest target)
    warmup: tuple[NonNegativeInt, NonNegativeInt] = (
        0,
        0,
    )  # the weight rises linearly from 0 between these steps

    def weight_at(self, step: int) -> float:
        first, last = self.warmup
        if last <= first:
            return self.weight
        return self.weight * min(1.0, max(0.0, (step - first) / (last - first)))

    def __post_init__(self) -> None:
        if self.warmup[0] > self.warmup[1]:
            raise UserError(
                f"method.context.warmup {list(self.warmup)}: the first step must not be the later one"
            )


@dataclass(frozen=True)
class MethodConfig:
    """The `method` section: the parts of the formula (objective.py)."""

    mask: Annotated[Spec, Choice(MASK_PARTS)]
    target: Annotated[Spec, Choice(TARGET_PARTS, supplied=("encoder", "teacher"))]
    query: Annotated[Spec, Choice(QUERY_PARTS, supplied=("width",))]
    predictor: Annotated[Spec, Choice(PREDICTOR_PARTS, supplied=("encoder", "out"))]
    error: Annotated[Spec, Choice(ERROR_PARTS)]
    context: ContextLoss

"""The `method` section, without torch."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

from vidssl.config import Choice, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec
from vidssl.config.signatures import PartTable
from vidssl.core.errors import UserError
from vidssl.objective.pretext_frames import paced_length, piece_length
from vidssl.objective.view_schema import AGREE_PARTS

MASK_PARTS = PartTable("vidssl.objective.masks", "MASKS")
TARGET_PARTS = PartTable("vidssl.objective.targets", "TARGETS")
QUERY_PARTS = PartTable("vidssl.model.predictor", "QUERIES")
PREDICTOR_PARTS = PartTable("vidssl.model.predictor", "PREDICTORS")
ERROR_PARTS = PartTable("vidssl.objective.errors", "ERRORS")
CORRUPTION_PARTS = PartTable("vidssl.objective.corruptions", "CORRUPTIONS")
SCORE_PARTS = PartTable("vidssl.objective.scores", "SCORES")
AUX_PARTS = PartTable("vidssl.objective.auxiliary", "AUX")
PRETEXT_PARTS = PartTable("vidssl.objective.pretext", "PRETEXTS")


PositiveFraction = Annotated[float, Field(gt=0, le=1)]


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
    mean: bool = False  # of both errors, not their sum: (error + weight * context error) / (1 + weight) (UMD)

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
    """The `method` section: the parts of a masked prediction (masked_prediction.py), or another formula in
    its place or beside it."""

    # which tokens the encoder sees, and which are predicted
    mask: Annotated[Spec, Choice(MASK_PARTS, is_optional=True)]
    # what is predicted
    target: Annotated[
        Spec, Choice(TARGET_PARTS, supplied=("encoder", "teacher", "teachers"), is_optional=True)
    ]
    # where the predictor starts from at a hidden token
    query: Annotated[Spec, Choice(QUERY_PARTS, supplied=("width", "encoder"), is_optional=True)]
    # the network that predicts
    predictor: Annotated[Spec, Choice(PREDICTOR_PARTS, supplied=("encoder", "out"), is_optional=True)]
    # how a prediction is compared with its target
    error: Annotated[Spec, Choice(ERROR_PARTS, supplied=("width",), is_optional=True)]
    context: ContextLoss
    # what the encoder sees in place of the clean video
    corrupt: Annotated[Spec, Choice(CORRUPTION_PARTS, supplied=("encoder",), is_optional=True)]
    # a number for each token, of which mask.kind=scored makes the mask
    score: Annotated[Spec, Choice(SCORE_PARTS, supplied=("encoder",), is_optional=True)]
    # losses that are added
    aux: Annotated[tuple[Spec, ...], Choice(AUX_PARTS, supplied=("encoder", "target_width"), is_list=True)]
    # views of a clip that agree
    agree: Annotated[Spec, Choice(AGREE_PARTS, supplied=("encoder",), is_optional=True)]
    # which transformation of the clip is named
    pretext: Annotated[Spec, Choice(PRETEXT_PARTS, supplied=("encoder",), is_optional=True)]
    target_fraction: PositiveFraction = 1.0  # part of a mask's targets that is predicted, at random
    masks_per_clip: PositiveInt = 1  # draws of the mask for each clip, which share one pass of the target
    weight: PositiveFloat = 1.0  # of the masked prediction, beside another formula

    def __post_init__(self) -> None:
        given = [name for name in NEEDED_PARTS if not getattr(self, name).is_absent]
        others = not (self.agree.is_absent and self.pretext.is_absent)
        missing = [name for name in NEEDED_PARTS if name not in given]
        if missing and (given or not others):
            table = NEEDED_PARTS[missing[0]]
            raise UserError(f"method.{missing[0]}: 'kind' is missing; allowed: {', '.join(table)}")

    def encoder_frames(self, frames: int, tubelet: int) -> int:
        """Frames of the clips that the encoder is made for, where those of the data have `frames`."""
        options = self.pretext.arguments
        if self.pretext.kind == "pace":
            return paced_length(frames, options["paces"], tubelet)
        if self.pretext.kind == "order":
            return options["pieces"] * piece_length(frames, options["pieces"], tubelet)
        return frames

    @property
    def momenta(self) -> dict[str, tuple[float, float]]:
        """Dotted key -> momentum of an EMA, at the first and the last step; for each part that has one."""
        parts = {"target": self.target, "score": self.score, "agree": self.agree}
        found = {name: spec.arguments.get("momentum") for name, spec in parts.items()}
        return {f"method.{name}.momentum": momentum for name, momentum in found.items() if momentum}

    @property
    def predicts(self) -> bool:
        """Whether there is a masked prediction."""
        return not self.mask.is_absent


NEEDED_PARTS = {  # of a masked prediction
    "mask": MASK_PARTS,
    "target": TARGET_PARTS,
    "predictor": PREDICTOR_PARTS,
    "error": ERROR_PARTS,
}

"""The `method.agree` section: its tables, views and heads, without torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from vidssl.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from vidssl.config.signatures import PartTable
from vidssl.core.errors import UserError

AGREE_PARTS = PartTable("vidssl.objective.agreement", "AGREEMENTS")
PAIR_PARTS = PartTable("vidssl.objective.pair_losses", "PAIR_LOSSES")
EMBEDDING_AUX_PARTS = PartTable("vidssl.objective.embedding_aux", "EMBEDDING_AUX")


@dataclass(frozen=True)
class ColorChange:
    """Colour jitter: largest changes, and the probability that a view is changed."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    brightness: NonNegativeFloat = 0.4
    contrast: NonNegativeFloat = 0.4
    saturation: NonNegativeFloat = 0.2
    hue: NonNegativeFloat = 0.1
    p: Fraction = 0.8


@dataclass(frozen=True)
class ViewGroup:
    """Views that are made alike: a random crop of each clip, the same in all frames, scaled to size x size
    pixels."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    count: PositiveInt = 1
    size: PositiveInt | None = None  # pixels; null: that of the clip
    scale: Range = (0.2, 1.0)  # area of the crop, as a part of the clip's
    aspect: Range = (0.75, 4 / 3)  # width / height of the crop
    # all: those of the clip; one: a frame drawn for each clip, as an image (of as many frames as a token has)
    frames: Literal["all", "one"] = "all"
    flip: Fraction = 0.5  # probability; leave 0 where left and right mean something
    color: ColorChange | None = None
    grey: Fraction = 0.0  # probability
    blur: Fraction = 0.0  # probability
    blur_sigma: Range = (0.1, 2.0)  # of the Gaussian, in pixels
    solarise: Fraction = 0.0  # probability
    # online: the trained branch sees it; target: the other branch does, others agree with it
    role: Literal["both", "online", "target"] = "both"
    # whether the online encoder sees only the context of method.agree.mask, or with method.agree.patches a
    # learned vector in place of the others
    masked: bool = True

    def __post_init__(self) -> None:
        if self.scale[1] > 1:
            raise UserError(f"method.agree.views.scale {list(self.scale)}: an area is at most 1, the clip's")


@dataclass(frozen=True)
class HeadConfig:
    """A projector or predictor; without widths there is none."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    widths: tuple[PositiveInt, ...] = ()
    norm: Literal["batch", "layer", "none"] = "batch"
    activation: Literal["relu", "gelu"] = "relu"
    last_norm: bool = False  # a norm without weights follows the last layer, too
    last_bias: bool = True  # the last layer has a bias
    join_views: bool = False  # batch norm takes the statistics of all views together, not of each apart


@dataclass(frozen=True)
class PatchConfig:
    """The loss of hidden patches: its weight, and what a cross_entropy of views has, too."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    weight: PositiveFloat = 1.0
    temperature: PositiveFloat = 0.1
    target_temperature: PositiveFloat = 0.04
    final_target_temperature: PositiveFloat | None = None  # reached linearly; null: it stays
    temperature_warmup: NonNegativeInt = 0  # steps
    centre_momentum: Fraction = 0.9

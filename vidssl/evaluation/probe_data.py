"""The `data` section of a probe, and the view of a sample that follows from it and the encoder."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field

from vidssl.config import Count, Names, Positive, Size
from vidssl.core.errors import UserError
from vidssl.evaluation.protocol import ProbeProtocol
from vidssl.evaluation.views import Control, FrameOrder, View
from vidssl.pretrained.load import LoadedEncoder

Fraction = Annotated[float, Field(gt=0, lt=1)]


Fractions = Annotated[
    tuple[Fraction, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list | tuple) else (v,))
]


@dataclass(frozen=True)
class ProbeData:
    """The `data` section of a probe."""

    train: Names  # packed folders with labels
    test: Names
    labels: Names | None = None  # label sets to probe; None: all that the data have
    tags: tuple[str, ...] = ()  # of these, label sets whose classes are several, joined by "|" (multi-label)
    numbers: tuple[str, ...] = ()  # of these, label sets whose classes are numbers (regression)
    frames: Count | None = None  # of a clip; None: the encoder's own (an image model has none)
    size: Count | None = None  # pixels; None: the encoder's own
    stride: Count | None = None  # frames; None (and fps None): as the encoder was trained
    fps: Positive | None = None  # frames a second
    train_fractions: Fractions = ()  # low-shot: parts of train, each drawn anew with each of `seeds`; (): all of train
    seeds: Annotated[tuple[Size, ...], Field(min_length=1)] = (0, 1, 2)
    cache_dir: str | None = None  # where remote shards are kept; None: the user's cache folder
    cache_gb: Positive = 100  # how much of them

    def __post_init__(self) -> None:
        if self.stride is not None and self.fps is not None:
            raise UserError("data: give stride (in frames) or fps (frames a second), not both")


def make_view(data: ProbeData, protocol: ProbeProtocol, loaded: LoadedEncoder, control: Control) -> View:
    """The view of a probe under a control."""
    return encoder_view(
        loaded,
        protocol.segments,
        protocol.crops,
        frames=data.frames,
        size=data.size,
        stride=data.stride,
        fps=data.fps,
        control=control,
    )


def encoder_view(
    loaded: LoadedEncoder,
    segments: int,
    crops: int,
    *,
    frames: int | None = None,
    size: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    control: Control = "none",
) -> View:
    """Clips with the frames, size (pixels) and rate (stride in frames, or fps) that the encoder was trained
    on, where these are None."""
    model, trained = loaded.metadata["model"], loaded.metadata.get("config")
    if model["height"] != model["width"]:
        raise UserError(
            f"encoder: its clips are {model['height']} x {model['width']} px; a probe's are square"
        )
    frames = frames or model["frames"]
    if stride is None and fps is None:
        if frames == 1:
            stride = 1
        elif trained is None:
            raise UserError(
                "a public checkpoint does not say how far apart its frames are: give data.stride or data.fps"
            )
        else:
            stride, fps = trained["data"]["stride"], trained["data"]["fps"]
    order: FrameOrder = "none" if control in ("random_init", "pixels") else control  # type: ignore[assignment]
    seen = None
    if control == "single":  # by the model's own embedding of images, or repeated to fill one patch
        if model.get("fixed"):
            raise UserError(f"{model['name']} sees clips of {frames} frames only: use the control 'still'")
        order, seen = "still", 1 if model.get("image_tokenizer") else model["tubelet"]
    return View(frames, stride, fps, segments, crops, size or model["height"], order, seen)

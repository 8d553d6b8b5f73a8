"""The `data` section, and other configuration of this package, without torch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from vidssl.config import Fraction, IntRange, Names, NonNegativeFloat, PositiveFloat, PositiveInt, Range, Text
from vidssl.config.signatures import PartTable
from vidssl.core.errors import UserError

# Keys of the section that do not decide the clips. Data may move, since their hash is compared
MUTABLE_KEYS = (
    "train",
    "val",
    "cache",
    "augment_on",
    "cache_dir",
    "cache_gb",
    "decode_timeout_s",
    "memory_mb",
)
AUGMENT_PARTS = PartTable("vidssl.data.augment", "AUGMENTS")
Rule = Literal["exact", "vjepa"]  # how stride and fps select frames (data/sampling.py)
Decoder = Literal["auto", "decord", "pyav", "torchcodec"]
Weights = tuple[PositiveFloat, ...]
Stride = PositiveInt | IntRange  # a range: each clip draws its own, uniform in what fits in the video
Rate = PositiveFloat | Range


@dataclass(frozen=True)
class ExtraStream:
    """A further stream of clips in every step, for example of another length, or of images."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    train: Names  # as in DataConfig, up to `windows`
    frames: PositiveInt
    # clips of this stream per step, counted in run.batch; a multiple of run.lanes x data.repeat
    clips: PositiveInt
    stride: Stride | None = None
    fps: Rate | None = None
    weights: Weights | None = None
    rule: Rule = "exact"
    windows: PositiveInt = 1  # the same in streams of as many frames a clip

    def __post_init__(self) -> None:
        check_rate("data.extra_streams", self.stride, self.fps, self.rule)


@dataclass(frozen=True)
class DataConfig:
    """The `data` section: which shards are read, and which frames make a clip."""

    train: Names  # packed folders or their URLs (http, https, s3, ...); reader stream: see data/stream.py
    frames: PositiveInt  # per clip
    # packed folders that are not trained on: the loss on the middle clips of their videos is the held-out
    # error (run.validate_every, run.patience); None: it is not measured
    val: Names | None = None
    # between the frames of a clip, in frames of the video; [4, 48]: each clip draws its own, uniform in the
    # part of the range with which it fits in its video
    stride: Stride | None = None
    fps: Rate | None = None  # frames per second of a clip, or a range; give either stride or fps
    rule: Rule = "exact"  # how stride and fps select frames; 'vjepa' reproduces V-JEPA's frame selection
    # parts of `frames` frames each, at independent places of one video, that are joined in time to a clip of
    # windows x frames frames with one crop: for methods that compare them. The encoder's clip has `frames`
    windows: PositiveInt = 1
    reader: Literal["indexed", "stream"] = "indexed"  # stream: for shards without an index (data/stream.py)
    # reader stream: samples, not yet decoded, that each loader process shuffles
    shuffle_buffer: PositiveInt = 256
    weights: Weights | None = None  # share of the clips from each of `train`; None: in proportion to size
    extra_streams: tuple[ExtraStream, ...] = ()
    repeat: PositiveInt = 1  # clips per decoded video (repeated augmentation), all in the same batch
    short_side: PositiveInt | None = None  # pixels; larger frames are scaled down to it; None: as stored
    # host, device: every video is decoded once, before the first step, and kept there at short_side; a device
    # cuts and augments the clips, too
    cache: Literal["none", "host", "device"] = "none"
    decoder: Decoder = "auto"  # see decoding.select_decoder
    # clips carry the motion vectors that their files store (H.264, MPEG-4, ...), for methods that use them
    motion_vectors: bool = False
    # where clips are cropped, resized, converted to RGB and augmented: device leaves only the decoding to the
    # CPU; auto: device on GPUs, host on CPUs. Equal to within rounding; RandAugment runs on the host
    augment_on: Literal["auto", "host", "device"] = "auto"
    max_decode_error_rate: Fraction = 0.05  # fraction of samples that may fail to decode before the run stops
    # missing or changed shard; skip: its samples fail to decode
    on_missing: Literal["error", "skip"] = "error"
    cache_dir: Text | None = None  # folder for remote shards; None: the user's cache folder
    cache_gb: PositiveFloat = 100  # size limit of cache_dir, 10**9 bytes
    decode_timeout_s: PositiveFloat = 60  # seconds per sample (only with efficiency.decode_in_subprocess)
    # 2**20 bytes by which a sample may grow the decoding process (only with efficiency.decode_in_subprocess),
    # beside the frames of a video that is cached
    memory_mb: PositiveInt = 4096

    def __post_init__(self) -> None:
        check_rate("data", self.stride, self.fps, self.rule)
        if self.motion_vectors and self.decoder not in ("auto", "pyav"):
            raise UserError(f"data.decoder {self.decoder}: PyAV alone reads data.motion_vectors; give pyav")
        if self.motion_vectors and self.cache != "none":
            raise UserError(f"data.cache {self.cache} keeps no data.motion_vectors: give data.cache=none")
        if self.reader == "stream":
            unusable = (
                ("weights", self.weights),
                ("repeat", self.repeat > 1),
                ("extra_streams", self.extra_streams),
                ("cache", self.cache != "none"),
            )
            if names := [f"data.{name}" for name, used in unusable if used]:
                raise UserError(
                    f"data.reader stream cannot serve {', '.join(names)}: it needs an index; "
                    "run vidssl scan on the shards and use data.reader indexed"
                )

    @property
    def clip_decoder(self) -> Decoder:
        """What opens the files of training clips."""
        return "pyav" if self.motion_vectors else self.decoder

    @property
    def clip_frames(self) -> int:
        """Frames of a clip as it is loaded, over all windows."""
        return self.windows * self.frames

    def streams(self) -> list["DataConfig"]:
        """The configuration of each stream as if it were the only one."""
        shared_fields = [f.name for f in dataclasses.fields(ExtraStream) if f.name != "clips"]
        extra = [{name: getattr(s, name) for name in shared_fields} for s in self.extra_streams]
        return [self, *(dataclasses.replace(self, **fields, extra_streams=()) for fields in extra)]

    @property
    def windows_of_clips(self) -> dict[int, int]:
        """Frames of the clips of each stream -> the number of their windows."""
        found: dict[int, int] = {}
        for stream in self.streams():
            if found.setdefault(stream.clip_frames, stream.windows) != stream.windows:
                raise UserError(
                    f"data.extra_streams: clips of {stream.clip_frames} frames are {stream.windows} windows, "
                    f"in another stream {found[stream.clip_frames]}: give one number of data.windows"
                )
        return found

    def clips(self, batch: int) -> list[int]:
        """Clips of each stream in a global batch."""
        extra = [s.clips for s in self.extra_streams]
        return [batch - sum(extra), *extra]


def check_local_folders(key: str, paths: Sequence[str]) -> None:
    """Raises UserError if a local path of a data set does not exist."""
    for path in paths:
        if "://" not in path and not Path(path).exists():
            raise UserError(f"{key}: {path}: no such folder")


def check_rate(
    where: str, stride: int | tuple[int, int] | None, fps: float | tuple[float, float] | None, rule: Rule
) -> None:
    if (stride is None) == (fps is None):
        raise UserError(f"{where}: give either stride (in frames) or fps (frames a second)")
    if rule == "vjepa" and (isinstance(stride, tuple) or isinstance(fps, tuple)):
        raise UserError(f"{where}.rule vjepa: its clips have one stride or fps, not a range; use rule exact")


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter with probability p, then RandomGrayscale: the same factors and order for all
    frames.

    A factor is drawn from 1 - amount .. 1 + amount (not below 0), the shift of the hue from -hue .. hue of
    the circle. Contrast is relative to the mean of each frame.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    p: Fraction = 1.0  # probability of these four
    grayscale_p: Fraction = 0.0  # probability of removing all colour, after them

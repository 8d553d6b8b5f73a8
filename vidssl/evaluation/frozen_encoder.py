"""A frozen encoder for one's own Python: `vidssl.load_encoder`, and features of videos by `embed`.

The features are those that a probe sees: the same decoding, frames, crops and normalisation. Decoders are
imported when the first video comes, so that weights alone load quickly.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.core.precision import Precision, resolve_precision
from vidssl.pretrained.load import LoadedEncoder, load_encoder
from vidssl.pretrained.sources import LIBRARIES, check_source

if TYPE_CHECKING:
    from vidssl.evaluation.views import View

# What is kept of the tokens of a clip: their mean, the class token, the mean of each time slice, or all
Output = Literal["pooled", "class", "slices", "dense"]
OUTPUTS: tuple[Output, ...] = ("pooled", "class", "slices", "dense")
VideoInput = str | Path | np.ndarray | Tensor  # a file, or frames u8 [T, H, W, 3]
DECODE_TIMEOUT_S = 60.0  # seconds in which a file must be decoded
DECODE_MEMORY = 4 << 30  # bytes by which a file may grow the decoding process


def encode_tokens(
    encoder: nn.Module, video: Tensor, pixels: Sequence[Sequence[float]], tokens: str = "patches"
) -> Tensor:
    """Tokens f32 [B, N, D] of clips u8 [B, 3, T, S, S]. pixels: (mean, std) of the encoder's input; tokens:
    those of the patches, the class token alone, or it and then the patches' ("both")."""
    video = normalise(video, pixels)
    if tokens == "patches":
        return encoder(video).float()
    features = encoder(video, with_class=True).float()
    return features[:, :1] if tokens == "class" else features


def reduce_tokens(features: Tensor, output: Output, slices: int) -> Tensor:
    """Patch tokens f32 [B, N, D] of clips of so many time slices -> [B, 1, D], [B, slices, D] or all; the
    class token [B, 1, D] stays."""
    if output == "pooled":
        return features.mean(1, keepdim=True)
    return reduce(features, "b (t n) d -> b t d", "mean", t=slices) if output == "slices" else features


def join_clips(features: Tensor, output: Output, segments: int) -> Tensor:
    """What `reduce_tokens` makes of the clips of a video, f32 [crops * segments, n, D] (see EvalClips) ->
    [n, D] (pooled, class: the mean over all clips) or [segments * n, D] (slices, dense: the mean over the
    crops)."""
    if output in ("pooled", "class"):
        return features.mean(0)
    return reduce(features, "(crops s) n d -> (s n) d", "mean", s=segments)


class FrozenEncoder(nn.Module):
    """An encoder in eval mode, without gradients, and what its input must be.

    net: the network; metadata: model (arguments of Encoder), pixels (mean, std); of own runs also config,
    data, step. A module as any other: `to` moves it to a device."""

    def __init__(
        self,
        loaded: LoadedEncoder,
        frames: int | None = None,
        size: int | None = None,
        precision: Precision = "auto",
    ):
        """frames, size (pixels): of a clip in `embed`, where they are not those of the model."""
        super().__init__()
        self.net: nn.Module = loaded.encoder
        self.metadata = loaded.metadata
        self.frames = frames
        self.size = size
        self.precision = precision

    @property
    def loaded(self) -> LoadedEncoder:
        """The network and its metadata, as programs of this project take them."""
        return LoadedEncoder(self.net, self.metadata)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def forward(self, video: Tensor, **options: Any) -> Tensor:
        """Video f32 [B, 3, T, H, W], normalised with metadata["pixels"] -> features f32 [B, N, D]. options:
        of the network, for an Encoder with_class, layers, ..."""
        return self.net(video, **options)

    @torch.no_grad()
    def encode(self, clips: Tensor, output: Output = "dense") -> Tensor:
        """Clips u8 [B, 3, T, S, S] -> f32 [B, n, D], see `reduce_tokens`."""
        check_embedding_output(self.loaded, output)
        pixels = self.metadata["pixels"]
        statistics = (pixels["mean"], pixels["std"])
        tokens = "class" if output == "class" else "patches"
        slices = clips.shape[2] // self.metadata["model"]["tubelet"]
        with self._autocast():
            features = encode_tokens(self.net, clips.to(self.device), statistics, tokens)
        return reduce_tokens(features, output, slices)

    @property
    def resolved_precision(self) -> str:
        """The precision of matrix products on the device of the encoder."""
        return resolve_precision(self.precision) if self.device.type == "cuda" else "fp32"

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.resolved_precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def embed(
        self,
        video: VideoInput | Sequence[VideoInput],
        tokens: Output = "pooled",
        *,
        array_fps: float | None = None,
        segments: int = 1,
        crops: int = 1,
        stride: int | None = None,
        fps: float | None = None,
    ) -> Tensor:
        """Features of a video, f32 on the CPU: "pooled" or "class" [D], "slices" [S, D] (a mean for each time
        slice), "dense" [S, H', W', D]. A list of videos gives one more dimension in front.

        video: a file, frames u8 [T, H, W, 3], or a list of these. array_fps: frames per second of such
        frames. segments: clips, evenly spread over the video (1: the middle one), whose slices follow each
        other; crops: squares along the longer side. stride (frames) or fps (frames per second): between the
        frames of a clip; None: as the encoder was trained. Raises UserError for a video that cannot be
        decoded."""
        from vidssl.evaluation.features import videos_per_batch
        from vidssl.evaluation.probe_data import encoder_view

        view = encoder_view(
            self.loaded, segments, crops, frames=self.frames, size=self.size, stride=stride, fps=fps
        )
        check_embedding_output(self.loaded, tokens, crops)
        several = isinstance(video, Sequence) and not isinstance(video, str)
        videos: list[VideoInput] = list(video) if several else [video]  # type: ignore[arg-type, list-item]
        batch = videos_per_batch(view, self.device)
        rows: list[Tensor] = []
        clips: list[Tensor] = []
        for number, decoded in enumerate(_decode(videos, view, array_fps), 1):
            clips.append(decoded)
            if len(clips) == batch or number == len(videos):
                features = self.encode(torch.cat(clips), tokens).cpu()
                features = rearrange(features, "(v c) n d -> v c n d", v=len(clips))
                rows += [self._shaped(join_clips(row, tokens, segments), tokens, view) for row in features]
                clips = []
        if not rows:
            raise UserError("embed: an empty list of videos")
        return torch.stack(rows) if several else rows[0]

    def _shaped(self, row: Tensor, output: Output, view: "View") -> Tensor:
        return row.reshape(*row_shape(self.metadata["model"], view, output), row.shape[-1])


def row_shape(model: dict[str, Any], view: "View", output: Output) -> tuple[int, ...]:
    """Shape of the features of a video without their width. model: of the encoder's metadata."""
    if output in ("pooled", "class"):
        return ()
    slices = view.segments * view.frames // model["tubelet"]
    side = view.size // model["patch"]
    return (slices,) if output == "slices" else (slices, side, side)


def check_embedding_output(loaded: LoadedEncoder, output: Output, crops: int = 1) -> None:
    """Raises UserError if the encoder has no such tokens, or several crops would be mixed."""
    if output not in OUTPUTS:
        raise UserError(f"tokens={output}: expected one of {', '.join(OUTPUTS)}")
    if output == "class" and getattr(loaded.encoder, "class_token", None) is None:
        name = loaded.metadata["model"].get("name", "this encoder")
        raise UserError(f"tokens=class: {name} has no class token that is read: give pooled")
    if output == "dense" and crops > 1:
        raise UserError("tokens=dense: the tokens of several crops show different places: give crops=1")


def _decode(videos: list[VideoInput], view: "View", array_fps: float | None) -> Iterator[Tensor]:
    """Yields the clips of each video, u8 [clips, 3, T, S, S]; files are decoded in a child process."""
    from vidssl.evaluation.isolated_clips import IsolatedEvalClips
    from vidssl.evaluation.media_files import MediaFiles
    from vidssl.evaluation.views import EvalClips, clips_of_video

    paths = [str(video) for video in videos if isinstance(video, str | Path)]
    files = MediaFiles(paths)
    clips = EvalClips(files, files.samples, view, view.clips)
    next_file = iter(range(len(paths)))
    with closing(IsolatedEvalClips(clips, DECODE_TIMEOUT_S, DECODE_MEMORY)) as isolated:
        for video in videos:
            if not isinstance(video, str | Path):
                yield clips_of_video(_frames(video, view, array_fps), view)
                continue
            _, decoded = isolated[next(next_file)]
            if isinstance(decoded, str):
                raise UserError(f"{video}: cannot be decoded ({decoded})")
            yield decoded


def _frames(video: Any, view: "View", array_fps: float | None) -> Any:
    """Frames in memory as an open video."""
    from vidssl.data.decoding.in_memory import FramesInMemory

    frames = video.cpu().numpy() if isinstance(video, Tensor) else video
    if not isinstance(frames, np.ndarray):
        raise UserError(f"embed: a video is a path or frames u8 [T, H, W, 3], not {type(video).__name__}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise UserError(f"embed: frames are u8 [T, H, W, 3]; these are {frames.dtype} {list(frames.shape)}")
    if view.fps is not None and array_fps is None:
        raise UserError("embed: this encoder's clips have a rate: give array_fps, the frames per second")
    return FramesInMemory(frames, array_fps or 1.0)


def load_frozen_encoder(
    source: str | Path,
    *,
    random_init: int | None = None,
    file: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    precision: Precision = "auto",
) -> FrozenEncoder:
    """Loads an encoder: in eval mode, without gradients, on the CPU.

    source: a run folder, a step checkpoint or .safetensors file of ours, a published checkpoint (V-JEPA,
    VideoMAE, MAE-ST, MAE, I-JEPA, a Hugging Face folder, a ViT of timm), timm:NAME or hf:FOLDER_OR_NAME.
    random_init: a seed; the same architecture is returned untrained. file: weights of a timm model. frames,
    size (pixels): of a clip, in place of the model's own. precision: of matrix products in `embed`; auto:
    bf16 on GPUs that have it, else f32. Raises UserError if it cannot be read."""
    name = str(source)
    check_source(name, "load_encoder", libraries=True)
    if name.partition(":")[0] not in LIBRARIES:
        if file is not None:
            raise UserError("load_encoder: file is for timm:NAME")
        return FrozenEncoder(load_encoder(name, random_init), frames, size, precision)
    # Libraries of others take seconds to import
    from vidssl.pretrained.external import open_encoder

    loaded = open_encoder(name, random_init, file, frames, size)
    return FrozenEncoder(loaded, frames, size, precision)

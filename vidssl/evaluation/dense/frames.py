"""Features of single frames from an encoder of clips.

A sequence is cut into consecutive windows of as many frames as the encoder's clip has, at stride 1 whatever
the stride of training; the last window is padded with the last frame, so a single image becomes a still clip.
A frame has the tokens of its tubelet: the frames of a tubelet share them, and they depend on later frames of
the window, too. Image encoders see each frame alone; encoders with an image tokenizer get a single image as
one frame."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor

from vidssl.config import NonNegativeInt, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.core.suggestions import multiples_near
from vidssl.evaluation.controls import EncoderControl
from vidssl.evaluation.report import weights_hash
from vidssl.evaluation.views import PatchMeans
from vidssl.model.vit import Encoder
from vidssl.pretrained.load import LoadedEncoder


@dataclass(frozen=True, kw_only=True)
class DenseProtocol:
    """Options that dense tasks share."""

    size: PositiveInt | None = (
        None  # pixels of the shorter side, a multiple of the patch; None: the encoder's own height
    )
    frames: PositiveInt | None = (
        None  # per clip; None: the encoder's own (image models of other libraries: 1)
    )
    layers: tuple[
        NonNegativeInt, ...
    ] = ()  # 0-based blocks whose normalised outputs are concatenated; (): the output
    encode_batch: PositiveInt = 4  # clips
    controls: Annotated[tuple[EncoderControl, ...], Field(min_length=1)] = ("none", "random_init", "pixels")
    seed: NonNegativeInt = 0

    def check_train(self, groups: list[str]) -> None:
        """Raises UserError if nothing can be selected on train sequences of these groups."""


class FrameEncoder(NamedTuple):
    """Images u8 [T, H, W, 3] -> tokens of each frame f32 [T, h, w, D]. The images are resized: the shorter
    side to `size`, both to multiples of the patch (models of other libraries: to squares)."""

    encode: Callable[[Tensor], Tensor]  # u8 [B, 3, T, H, W] -> f32 [B, N, D]
    clip: int  # frames
    tubelet: int  # frames
    patch: int  # pixels
    size: int  # pixels
    batch: int  # clips
    image_tokenizer: bool  # a single image is one frame, not a clip
    square: bool
    device: torch.device

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the encoder's input."""
        if self.square:
            return self.size, self.size
        short = min(height, width)
        rows, columns = (self.size * side // short // self.patch for side in (height, width))
        return rows * self.patch, columns * self.patch

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Tensor:
        count = len(images)
        height, width = self.resized(*images.shape[1:3])
        x = rearrange(torch.from_numpy(images.copy()), "t h w c -> t c h w").float()
        x = F.interpolate(x, (height, width), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        clip, tubelet = (1, 1) if self.image_tokenizer and count == 1 else (self.clip, self.tubelet)
        padded = torch.arange(-(-count // clip) * clip).clamp(max=count - 1)
        windows = rearrange(x[padded], "(b t) c h w -> b c t h w", t=clip)
        tokens = torch.cat([self.encode(batch.to(self.device)) for batch in windows.split(self.batch)])
        grid = {"t": clip // tubelet, "h": height // self.patch, "w": width // self.patch}
        return repeat(tokens, "b (t h w) d -> (b t tubelet) h w d", tubelet=tubelet, **grid)[:count]


def encode_layers(encoder: Encoder, video: Tensor, layers: tuple[int, ...]) -> Tensor:
    """f32 [B, 3, T, H, W] -> [B, N, D], or [B, N, layers * D]: outputs of blocks, each through the encoder's
    last norm (as in DINOv2's dense evaluations, arXiv 2304.07193, section 7.4)."""
    if not layers:
        return encoder(video)
    outputs: list[Tensor] = []
    hooks = [
        encoder.blocks[i].register_forward_hook(lambda _, __, output: outputs.append(output)) for i in layers
    ]
    try:
        encoder(video)
    finally:
        for hook in hooks:
            hook.remove()
    first = int(encoder.class_token is not None)
    return torch.cat([encoder.norm(x)[:, first:] for x in outputs], -1)


def check_fits(loaded: LoadedEncoder, options: DenseProtocol) -> None:
    """Raises UserError unless the options fit the encoder."""
    model = loaded.metadata["model"]
    depth = len(loaded.encoder.blocks) if isinstance(loaded.encoder, Encoder) else 0
    layers = options.layers
    size = options.size or model["height"]
    frames = options.frames or model["frames"]
    for name, value, unit in (("size", size, "patch"), ("frames", frames, "tubelet")):
        if value % model[unit]:
            raise UserError(
                f"task.{name}: {value} is not a multiple of the encoder's {unit}: "
                f"give {multiples_near(value, model[unit])}"
            )
    if list(layers) != sorted(set(layers)) or (layers and layers[-1] >= depth):
        raise UserError(
            f"task.layers {list(layers)}: give blocks of an encoder of ours in ascending order, "
            f"from 0 and below {depth}"
        )


def make_frame_encoder(
    open_untrained: Callable[[int], LoadedEncoder],
    loaded: LoadedEncoder,
    control: EncoderControl,
    options: DenseProtocol,
    device: torch.device,
) -> tuple[FrameEncoder, str]:
    """Returns the frame encoder under a control, and the hash of its weights (or "patch means").

    open_untrained: opens the encoder with untrained weights of a seed.
    """
    model = loaded.metadata["model"]
    pixels = loaded.metadata["pixels"]
    statistics = (pixels["mean"], pixels["std"])
    size = options.size or model["height"]
    clip = options.frames or model["frames"]
    layers = options.layers
    native = isinstance(loaded.encoder, Encoder)
    check_fits(loaded, options)
    encode: Callable[[Tensor], Tensor]
    if control == "pixels":
        encode = PatchMeans(model["tubelet"], model["patch"])
        name = "patch means"
    else:
        encoder = (loaded if control == "none" else open_untrained(options.seed)).encoder.to(device)
        encode = lambda video: encode_layers(encoder, video, layers).float()  # noqa: E731
        name = weights_hash(encoder)
    frame_encoder = FrameEncoder(
        lambda video: encode(normalise(video, statistics)),
        clip,
        model["tubelet"],
        model["patch"],
        size,
        options.encode_batch,
        bool(model.get("image_tokenizer")) and control != "pixels",
        not native,
        device,
    )
    return frame_encoder, name

"""Encoders of other libraries with our data and heads: image models of timm, image and video models of
transformers.

    encoder=timm:vit_small_patch14_dinov2.lvd142m [encoder_file=FILE]        encoder=hf:FOLDER_OR_HUB_NAME

An image model sees each frame alone. Features are the patch tokens of the last layer as the library returns
them (timm: forward_features, transformers: last_hidden_state), time first; tokens without a position (class
token, registers) are dropped. Normalisation and input size follow the model's own settings; frames are
resized and cropped as for every other encoder, not with the model's own filter and crop ratio.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from einops import rearrange
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.pretrained.load import LoadedEncoder, load_encoder
from vidssl.pretrained.public import load_json
from vidssl.pretrained.sources import LIBRARIES

VIDEO_MODELS = ("videomae", "vjepa2", "timesformer", "vivit", "videoprism_vision_model")
ANY_LENGTH = ("vjepa2", "timesformer")  # video models that take other numbers of frames than the config's
PREPROCESSOR_FILES = (
    "video_preprocessor_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
MAX_PREFIX_TOKENS = 64  # tokens without a position
LIBRARY_ERRORS = (  # what timm and transformers raise for a model that they cannot load or run
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SafetensorError,
)


class ExternalEncoder(nn.Module):
    """Maps video f32 [B, 3, T, S, S], normalised, to features f32 [B, N, D], time first, then rows and
    columns."""

    def __init__(
        self, net: nn.Module, tokens: Callable[[Tensor], Tensor], tubelet: int | None, space_first: bool
    ):
        """tokens: maps [B, T, 3, S, S], or for an image model (tubelet None) [B, 3, S, S], to [B, prefix + N,
        D]; space_first: its N tokens are ordered by position first, then by time."""
        super().__init__()
        self.net = net
        self.tokens = tokens
        self.tubelet = tubelet
        self.space_first = space_first
        self.prefix = 0  # number of tokens without a position, set by `measure_grid`

    def forward(self, video: Tensor) -> Tensor:
        batch, _, frames = video.shape[:3]
        if self.tubelet is None:
            x = self.tokens(rearrange(video, "b c t h w -> (b t) c h w"))[:, self.prefix :]
            return rearrange(x, "(b t) n d -> b (t n) d", b=batch)
        x = self.tokens(rearrange(video, "b c t h w -> b t c h w"))[:, self.prefix :]
        if self.space_first:
            x = rearrange(x, "b (n t) d -> b (t n) d", t=frames // self.tubelet)
        return x


class ExternalModel(NamedTuple):
    """A model of another library and the requirements of its input."""

    encoder: ExternalEncoder
    size: int  # pixels
    patch: int | None  # pixels; None: every token has a position
    frames: int | None  # of a clip; None: each frame alone
    fixed: bool  # no other number of frames is possible
    pixels: dict[str, Any]  # mean and std
    library: str  # with its version


def open_encoder(
    source: str,
    random_init: int | None = None,
    file: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    default_frames: int | None = None,
) -> LoadedEncoder:
    """Opens an encoder of ours, a published checkpoint, or a model of another library.

    random_init: a seed for untrained weights. file: weights of a timm model. frames: of a clip. size: pixels,
    in place of the model's own. default_frames: of a clip of an image model, if `frames` is None.
    """
    library, _, name = source.partition(":")
    if library not in LIBRARIES:
        if file is not None:
            raise UserError("encoder_file is for encoder=timm:NAME")
        return load_encoder(source, random_init)
    if library == "hf" and file is not None:
        raise UserError("encoder_file is for encoder=timm:NAME; a folder for hf: contains its weights")
    # A seed also without random_init: weights that a file lacks and no token depends on (a pooler) are
    # reproducible.
    torch.manual_seed(random_init or 0)
    trained = random_init is None
    try:
        if library == "timm":
            external = from_timm(name, trained, file, size)
        else:
            external = from_transformers(name, trained, size)
        length = frames or external.frames or default_frames
        if length is None:
            raise UserError(f"encoder={source} sees each frame alone: give frames (data.frames of a probe)")
        if external.fixed and length != external.frames:
            raise UserError(
                f"encoder={source} sees clips of {external.frames} frames, not data.frames={frames}"
            )
        rows = measure_grid(external, length, source)
    except LIBRARY_ERRORS as e:
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(f"encoder={source}: {reason}") from None
    model = {
        "name": source,
        "library": external.library,
        "frames": length,
        "height": external.size,
        "width": external.size,
        "tubelet": external.encoder.tubelet or 1,
        "patch": external.size // rows,
        "fixed": external.fixed,
    }
    encoder: Any = external.encoder.eval().requires_grad_(False)
    return LoadedEncoder(encoder, {"source": external.library, "model": model, "pixels": external.pixels})


@torch.no_grad()
def measure_grid(external: ExternalModel, frames: int, source: str) -> int:
    """Runs one black clip. Returns the number of rows of tokens (equal to the columns), and sets
    encoder.prefix."""
    encoder = external.encoder.eval()
    tubelet = encoder.tubelet or 1
    if frames % tubelet:
        raise UserError(f"encoder={source}: {frames} frames are not a multiple of the tubelet of {tubelet}")
    black = torch.zeros(1, frames, 3, external.size, external.size)
    slices = frames // tubelet
    if encoder.tubelet is None:
        slices = 1
        black = black[:, 0]
    num_tokens = encoder.tokens(black).shape[1]
    if external.patch:
        rows = external.size // external.patch
    else:
        rows = round((num_tokens / slices) ** 0.5)
    encoder.prefix = num_tokens - slices * rows**2
    if not 0 <= encoder.prefix <= (MAX_PREFIX_TOKENS if external.patch else 0):
        raise UserError(
            f"encoder={source}: {num_tokens} tokens of {slices} x {external.size} px are no square of patches"
        )
    return rows


def from_timm(name: str, trained: bool, file: str | None, size: int | None) -> ExternalModel:
    """An image model of timm; its weights are read from `file`, or downloaded by timm."""
    if not timm.is_model(name):
        raise UserError(f"timm {timm.__version__} has no model '{name}' (timm.list_models() names them)")
    if file is not None and not Path(file).is_file():
        raise UserError(f"encoder_file={file}: no such file")
    pretrained = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {}
    if size is not None and pretrained and pretrained.fixed_input_size:
        options["img_size"] = size
    if trained and file is not None:
        options["pretrained_cfg_overlay"] = {"file": file, "custom_load": file.endswith(".npz")}
    net: Any = timm.create_model(name, pretrained=trained, **options)
    net.reset_classifier(0)  # num_classes=0 above would make timm ignore missing weights
    data_config = resolve_model_data_config(net)

    def tokens(x: Tensor) -> Tensor:
        x = net.forward_features(x)
        if x.ndim == 3:
            return x[:, getattr(net, "num_prefix_tokens", 0) :]
        channels_first = x.shape[1] == net.num_features
        return rearrange(x, "b c h w -> b (h w) c" if channels_first else "b h w c -> b (h w) c")

    return ExternalModel(
        encoder=ExternalEncoder(net, tokens, None, False),
        size=size or data_config["input_size"][-1],
        patch=None,
        frames=None,
        fixed=False,
        pixels={"mean": list(data_config["mean"]), "std": list(data_config["std"])},
        library=f"timm {timm.__version__}",
    )


def from_transformers(name: str, trained: bool, size: int | None) -> ExternalModel:
    """A model in a folder or on the hub; the image tower of models of image and text."""
    try:
        import transformers
    except ImportError:
        raise UserError("encoder=hf:... needs transformers: pip install vidssl[hf]") from None
    net = load_transformers(name, trained)
    c: Any = net.config
    is_video = c.model_type in VIDEO_MODELS
    is_vjepa2 = c.model_type == "vjepa2"
    tubelet, *spatial = as_list(getattr(c, "tubelet_size", 1))
    patch = (spatial or as_list(getattr(c, "patch_size", None)))[-1]
    if patch is None or getattr(c, "attention_type", None) == "space_only":
        raise UserError(
            f"encoder=hf:{name}: a {c.model_type} has no known patch tokens; video models: "
            f"{', '.join(VIDEO_MODELS)}"
        )
    pixels, preprocessor_size = read_preprocessor(name)
    native = as_list(c.crop_size if is_vjepa2 else c.image_size)[0]
    size = size or preprocessor_size or native
    options: dict[str, Any] = {"skip_predictor": True} if is_vjepa2 else {}
    if size != native and "interpolate_pos_encoding" in inspect.signature(net.forward).parameters:
        options["interpolate_pos_encoding"] = True

    def tokens(x: Tensor) -> Tensor:
        return net(x, **options).last_hidden_state

    frames = None
    if is_video:
        frames = c.frames_per_clip if is_vjepa2 else c.num_frames
    return ExternalModel(
        encoder=ExternalEncoder(net, tokens, tubelet if is_video else None, c.model_type == "timesformer"),
        size=size,
        patch=patch,
        frames=frames,
        fixed=is_video and c.model_type not in ANY_LENGTH,
        pixels=pixels,
        library=f"transformers {transformers.__version__}",
    )


def load_transformers(name: str, trained: bool) -> Any:
    """The f32 model; raises UserError if its files lack weights on which the tokens depend."""
    import transformers

    missing: set[str] = set()
    if trained:
        net, info = transformers.AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        missing = {k.removeprefix("vision_model.") for k in info["missing_keys"]}
    else:
        net = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name)).float()
    net = getattr(net, "vision_model", net)
    needed = {k for k in net.state_dict() if not k.startswith(("pooler.", "predictor.", "head."))}
    if lacking := missing & needed:
        raise UserError(f"encoder=hf:{name}: {len(lacking)} weights are not in its files, {min(lacking)}")
    return net


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def read_preprocessor(name: str) -> tuple[dict[str, Any], int | None]:
    """Reads the image or video processor of a transformers model.

    Returns mean and std of pixels in [0, 1], and the size of the input in pixels (None: not in the file).
    """
    from transformers.utils import cached_file

    paths = (cached_file(name, f, _raise_exceptions_for_missing_entries=False) for f in PREPROCESSOR_FILES)
    path = next((p for p in paths if p), None)
    if path is None:
        raise UserError(
            f"encoder=hf:{name}: {PREPROCESSOR_FILES[1]} is missing: it says how pixels are normalised"
        )
    settings = load_json(Path(path))
    settings = settings.get("video_processor") or settings.get("image_processor") or settings
    scale = settings.get("rescale_factor", 1 / 255)
    offset = settings.get("offset", scale > 1.5 / 255)  # ViViT scales to [-1, 1] before it normalises
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get("do_normalize", True):
        mean, std = settings["image_mean"], settings["image_std"]
    pixels = {"mean": [(m + offset) / (255 * scale) for m in mean], "std": [s / (255 * scale) for s in std]}
    size = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    size = size or settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return pixels, size

"""Encoders of other libraries, under our data and heads: image models of timm, image and video models of transformers.

    encoder=timm:vit_small_patch14_dinov2.lvd142m [encoder_file=FILE]        encoder=hf:FOLDER_OR_HUB_NAME

An image model sees each frame alone. What is read is the patch tokens of the last layer as the library gives them (in
timm forward_features, in transformers last_hidden_state), time first; tokens without a place (class token, registers)
are dropped. Pixels are normalised, and the size of the input is chosen, by the model's own settings; frames are resized
and cropped as for every other encoder, not with the model's own filter and crop ratio.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.pretrained.load import LoadedEncoder, load_encoder
from vidssl.pretrained.public import read_json

VIDEO = ("videomae", "vjepa2", "timesformer", "vivit", "videoprism_vision_model")
ANY_LENGTH = ("vjepa2", "timesformer")  # of these: clips of other lengths than the config's
SETTINGS = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
PREFIX = 64  # tokens without a place, at most
FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    SafetensorError,
)  # of others


class ExternalEncoder(nn.Module):
    """video f32 [B, 3, T, S, S], normalised -> f32 [B, N, D], time first, then rows and columns."""

    def __init__(
        self, net: nn.Module, tokens: Callable[[Tensor], Tensor], tubelet: int | None, space_first: bool
    ):
        """tokens: [B, T, 3, S, S], or of an image model (tubelet None) [B, 3, S, S] -> [B, prefix + N, D];
        space_first: of these N the places count first, then the times."""
        super().__init__()
        self.net, self.tokens, self.tubelet, self.space_first = net, tokens, tubelet, space_first
        self.prefix = 0  # tokens without a place, see `measure`

    def forward(self, video: Tensor) -> Tensor:
        x = video.transpose(1, 2)
        x = self.tokens(x.flatten(0, 1) if self.tubelet is None else x)[:, self.prefix :]
        if self.space_first and self.tubelet is not None:
            x = x.unflatten(1, (-1, video.shape[2] // self.tubelet)).transpose(1, 2)
        return x.reshape(len(video), -1, x.shape[-1])


class ExternalModel(NamedTuple):
    """What a library gives: a model, and what its input must be."""

    encoder: ExternalEncoder
    size: int  # pixels
    patch: int | None  # pixels; None: all tokens have a place
    frames: int | None  # in a clip; None: each frame alone
    fixed: bool  # no other number of frames
    pixels: dict[str, Any]
    library: str


def open_encoder(
    where: str,
    random_init: int | None = None,
    file: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    alone: int | None = None,
) -> LoadedEncoder:
    """An encoder of ours, a public checkpoint, or a model of another library; random_init: untrained, with that seed.

    file: weights of a timm model; frames: in a clip; size: pixels, instead of the model's; alone: frames in a clip of
    an image model, where `frames` does not say.
    """
    library, _, name = where.partition(":")
    if library not in ("timm", "hf"):
        if file is not None:
            raise UserError("encoder_file is for encoder=timm:NAME")
        return load_encoder(where, random_init)
    if library == "hf" and file is not None:
        raise UserError("encoder_file is for encoder=timm:NAME; a folder for hf: holds its weights")
    torch.manual_seed(
        random_init or 0
    )  # what a file lacks and no token needs (a pooler) is the same every time, too
    trained = random_init is None
    try:
        made = (
            from_timm(name, trained, file, size)
            if library == "timm"
            else from_transformers(name, trained, size)
        )
        length = frames or made.frames or alone
        if length is None:
            raise UserError(f"encoder={where} sees each frame alone: say with data.frames how many of a clip")
        if made.fixed and length != made.frames:
            raise UserError(f"encoder={where} sees clips of {made.frames} frames, not data.frames={frames}")
        grid = measure(made, length, where)
    except FAILURES as e:
        raise UserError(f"encoder={where}: {' '.join(str(e).split())[:300] or type(e).__name__}") from None
    model = {
        "name": where,
        "library": made.library,
        "frames": length,
        "height": made.size,
        "width": made.size,
    }
    model |= {"tubelet": made.encoder.tubelet or 1, "patch": made.size // grid, "fixed": made.fixed}
    encoder: Any = made.encoder.eval().requires_grad_(False)
    return LoadedEncoder(encoder, {"source": made.library, "model": model, "pixels": made.pixels})


@torch.no_grad()
def measure(made: ExternalModel, frames: int, where: str) -> int:
    """Rows (as many as columns) of tokens, from one black clip; finds how many tokens stand before them."""
    encoder, step = made.encoder.eval(), made.encoder.tubelet or 1
    if frames % step:
        raise UserError(f"encoder={where}: {frames} frames are not a multiple of the {step} of one patch")
    slices, black = frames // step, torch.zeros(1, frames, 3, made.size, made.size)
    if encoder.tubelet is None:
        slices, black = 1, black[:, 0]
    found = encoder.tokens(black).shape[1]
    side = made.size // made.patch if made.patch else round((found / slices) ** 0.5)
    encoder.prefix = found - slices * side**2
    if not 0 <= encoder.prefix <= (PREFIX if made.patch else 0):
        raise UserError(
            f"encoder={where}: {found} tokens of {slices} x {made.size} px are no square of patches"
        )
    return side


def from_timm(name: str, trained: bool, file: str | None, size: int | None) -> ExternalModel:
    """An image model of timm; its weights from `file`, or downloaded by timm."""
    if not timm.is_model(name):
        raise UserError(f"timm {timm.__version__} has no model '{name}' (timm.list_models() names them)")
    if file is not None and not Path(file).is_file():
        raise UserError(f"encoder_file={file}: no such file")
    config = timm.get_pretrained_cfg(name)
    more: dict[str, Any] = (
        {"img_size": size} if size is not None and config and config.fixed_input_size else {}
    )
    if trained and file is not None:
        more["pretrained_cfg_overlay"] = {"file": file, "custom_load": file.endswith(".npz")}
    net: Any = timm.create_model(name, pretrained=trained, **more)
    net.reset_classifier(0)  # not num_classes=0 above: timm would then not mind missing weights
    said = resolve_model_data_config(net)

    def tokens(x: Tensor) -> Tensor:
        x = net.forward_features(x)
        if x.ndim == 3:
            return x[:, getattr(net, "num_prefix_tokens", 0) :]
        return x.flatten(2).mT if x.shape[1] == net.num_features else x.flatten(1, 2)

    pixels = {"mean": list(said["mean"]), "std": list(said["std"])}
    size = size or said["input_size"][-1]
    return ExternalModel(
        ExternalEncoder(net, tokens, None, False), size, None, None, False, pixels, f"timm {timm.__version__}"
    )


def from_transformers(name: str, trained: bool, size: int | None) -> ExternalModel:
    """A folder or a name on the hub; of models of image and text the image tower."""
    try:
        import transformers
    except ImportError:
        raise UserError("encoder=hf:... needs transformers: pip install vidssl[hf]") from None
    lost: set[str] = set()
    if trained:
        net, said = transformers.AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        lost = {k.removeprefix("vision_model.") for k in said["missing_keys"]}
    else:
        net = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name)).float()
    net = getattr(net, "vision_model", net)
    needed = {k for k in net.state_dict() if not k.startswith(("pooler.", "predictor.", "head."))}
    if lost & needed:
        raise UserError(
            f"encoder=hf:{name}: {len(lost & needed)} weights are not in its files, {min(lost & needed)}"
        )
    c: Any = net.config
    video, jepa = c.model_type in VIDEO, c.model_type == "vjepa2"
    tubelet, *space = listed(getattr(c, "tubelet_size", 1))
    patch = (space or listed(getattr(c, "patch_size", None)))[-1]
    if patch is None or getattr(c, "attention_type", None) == "space_only":
        raise UserError(
            f"encoder=hf:{name}: no patch tokens known of a {c.model_type}; of video: {', '.join(VIDEO)}"
        )
    pixels, own = input_of(name)
    native = listed(c.crop_size if jepa else c.image_size)[0]
    size = size or own or native
    options: dict[str, Any] = {"skip_predictor": True} if jepa else {}
    if size != native and "interpolate_pos_encoding" in inspect.signature(net.forward).parameters:
        options["interpolate_pos_encoding"] = True
    frames = (c.frames_per_clip if jepa else c.num_frames) if video else None
    last = lambda x: net(x, **options).last_hidden_state  # noqa: E731
    encoder = ExternalEncoder(net, last, tubelet if video else None, c.model_type == "timesformer")
    fixed = video and c.model_type not in ANY_LENGTH
    return ExternalModel(
        encoder, size, patch, frames, fixed, pixels, f"transformers {transformers.__version__}"
    )


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def input_of(name: str) -> tuple[dict[str, Any], int | None]:
    """Of a transformers model's image or video processor: mean and deviation of pixels in [0, 1], pixels across (None:
    not said)."""
    from transformers.utils import cached_file

    paths = (cached_file(name, f, _raise_exceptions_for_missing_entries=False) for f in SETTINGS)
    path = next((p for p in paths if p), None)
    if path is None:
        raise UserError(f"encoder=hf:{name}: {SETTINGS[1]} is missing: it says how pixels are normalised")
    said = read_json(Path(path))
    said = said.get("video_processor") or said.get("image_processor") or said
    scale = said.get("rescale_factor", 1 / 255)
    down = said.get("offset", scale > 1.5 / 255)  # ViViT: to [-1, 1] first, then normalised
    mean, std = (
        (said["image_mean"], said["image_std"]) if said.get("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
    )
    pixels = {"mean": [(m + down) / (255 * scale) for m in mean], "std": [s / (255 * scale) for s in std]}
    across = said.get("crop_size") if said.get("do_center_crop", True) else None
    across = across or said.get("size")
    if isinstance(across, dict):
        across = across.get("height") or across.get("shortest_edge")
    return pixels, across

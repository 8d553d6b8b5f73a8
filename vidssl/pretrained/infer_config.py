"""Infers the arguments of our modules from the tensors of a checkpoint: from shapes and published sizes.

Facts that a file does not contain (heads, mostly) come from the published sizes or from the caller's
`overrides`; nothing is guessed.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from vidssl.config import PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD
from vidssl.model.grid import Grid
from vidssl.model.heads import HEAD_EPS, AttentiveHead, MeanHead
from vidssl.model.positions import FIXED_TABLES
from vidssl.model.predictor import JointPredictor, MaskToken
from vidssl.model.vit import Encoder, swiglu_dim
from vidssl.pretrained.key_maps import RenamedTensors

# Heads by width; wider models differ between projects.
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
GIANT_HEADS = {
    "V-JEPA 2": {1408: 22},
    "V-JEPA 2.1": {1408: 22, 1664: 26},
    "I-JEPA": {1408: 16},
    "VideoMAE": {1408: 16},
}
DECODER_HEADS = {"VideoMAE": {192: 3, 384: 6, 512: 8, 640: 8}, "MAE-ST": {512: 16}, "MAE": {512: 16}}
SWIGLU_RATIOS = (4.0, 48 / 11, 64 / 13)  # published ratios of MLP width to width
TABLE_TOLERANCE = 1e-5  # largest difference between a file's table of positions and a fixed one


def imagenet_pixels() -> dict[str, list[float]]:
    return {"mean": list(MEAN), "std": list(STD)}


@dataclass
class Checkpoint:
    """A checkpoint in our terms: keyword arguments and weights of each network that it contains."""

    format: str
    model: dict[str, Any]  # arguments of Encoder, with frames, height and width
    encoder: dict[str, Tensor]  # weights of the evaluated encoder
    pixels: dict[str, list[float]] = field(default_factory=imagenet_pixels)  # mean and std of its input
    online: dict[str, Tensor] | None = None  # weights of the trained encoder, where it is another
    predictor: dict[str, Any] | None = None  # arguments of JointPredictor, with out
    predictor_weights: dict[str, Tensor] = field(default_factory=dict)
    query: Tensor | None = None  # mask tokens [groups, width]
    head: dict[str, Tensor] = field(default_factory=dict)  # weights of a classifier or a probe's head
    head_heads: int = 0  # attention heads of an attentive head
    head_eps: float = (
        HEAD_EPS  # of the head's LayerNorms: transformers has another value than the official code
    )
    unused: list[str] = field(default_factory=list)  # keys of the file that are not needed

    def build_encoder(self, weights: dict[str, Tensor] | None = None) -> Encoder:
        encoder = Encoder(**self.model)
        encoder.load_state_dict(weights or self.encoder)
        return encoder

    def build_predictor(self, encoder: Encoder) -> tuple[JointPredictor, MaskToken]:
        """The predictor and its query; raises UserError if the checkpoint has none."""
        if self.predictor is None or self.query is None:
            raise UserError(f"this {self.format} checkpoint contains no predictor")
        predictor = JointPredictor(encoder, **self.predictor)
        predictor.load_state_dict(self.predictor_weights)
        query = MaskToken(predictor.width, groups=len(self.query))
        query.load_state_dict({"tokens": self.query})
        return predictor, query

    def build_head(self) -> AttentiveHead | MeanHead:
        """The classifier; raises UserError if the checkpoint has none."""
        if not self.head:
            raise UserError(f"this {self.format} checkpoint contains no classifier")
        head = build_head(self.head, self.head_heads, self.head_eps)
        head.load_state_dict(self.head)
        return head


def build_head(weights: dict[str, Tensor], heads: int, eps: float) -> AttentiveHead | MeanHead:
    """The classifier that the names and shapes of `weights` describe, with fresh weights."""
    classes, dim = weights["linear.weight"].shape
    if not any(k.startswith(("query_tokens", "xattn", "blocks")) for k in weights):
        return MeanHead(dim, classes, eps)
    depth = 1 + len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    head = AttentiveHead(dim, heads, classes, depth)
    for module in head.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return head


def infer_checkpoint(
    renamed: RenamedTensors, name: str, source: str, overrides: dict[str, Any]
) -> Checkpoint:
    """The modules that fit the tensors; raises UserError if a tensor has no place in them, or a place no
    tensor.

    name: the format; source: the file, for error messages; overrides: see public.read_public.
    """
    overrides = check_overrides(overrides, source)
    check_ranks(renamed, source)
    pixels = {k: list(overrides.pop(k, default)) for k, default in imagenet_pixels().items()}
    predictor_heads = overrides.pop("predictor_heads", None)
    head_eps = overrides.pop("head_eps", None)
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in renamed.tensors.items()}
    encoder, predictor, head = (
        {k[len(part) :]: v for k, v in tensors.items() if k.startswith(part)} for part in PARTS
    )
    if name == "ViT":
        fold_layer_scale(encoder, source)
    model = infer_encoder(encoder, name, source, overrides)
    checkpoint = Checkpoint(name, model, encoder, pixels, unused=renamed.unused)
    net = check_shapes(lambda: Encoder(**model), encoder, "encoder.", renamed, source)
    checkpoint.head_heads = model["heads"]
    if head:
        if "linear.weight" not in head:
            raise UserError(f"{source}: a classifier without its last layer")
        eps = head_eps or (HEAD_EPS if "query_tokens" in head else model["eps"])
        check_shapes(lambda: build_head(head, model["heads"], eps), head, "head.", renamed, source)
        checkpoint.head = head
        checkpoint.head_eps = eps
    if "proj.weight" in predictor:
        options = infer_predictor(predictor, net, name, source, predictor_heads, model)
        check_shapes(lambda: JointPredictor(net, **options), predictor, "predictor.", renamed, source)
        checkpoint.predictor = options
        checkpoint.predictor_weights = predictor
        checkpoint.query = check_mask_tokens(tensors, options["width"], renamed, source)
    elif predictor or "query.tokens" in tensors:
        raise UserError(f"{source}: an incomplete predictor (no last layer)")
    return checkpoint


def check_mask_tokens(tensors: dict[str, Tensor], width: int, renamed: RenamedTensors, source: str) -> Tensor:
    """Returns the mask tokens, [groups, width]."""
    if "query.tokens" not in tensors:
        raise UserError(f"{source}: a predictor without its mask tokens")
    query = tensors["query.tokens"].flatten(0, -2)
    if query.shape[1] != width:
        origin = renamed.origin["query.tokens"]
        raise UserError(
            f"{source}: '{origin}' is {tuple(query.shape)}, the rest of the file asks for width {width}"
        )
    return query


PARTS = ("encoder.", "predictor.", "head.")
RANKS = (  # pattern of our name: allowed numbers of dimensions; the first match counts
    (r"encoder\.patch_embed(_img)?\.proj\.weight", (4, 5)),
    (r".*(norm\w*|level_norms\.\d+)\.weight|.*\.bias", (1,)),
    (r".*\.weight", (2,)),
    (r".*\.(table|space|time|tokens)", (2, 3, 4)),
)


def check_ranks(renamed: RenamedTensors, source: str) -> None:
    """Raises UserError if a tensor has a number of dimensions that its name does not allow."""
    for key, value in renamed.tensors.items():
        ranks = next((ranks for pattern, ranks in RANKS if re.fullmatch(pattern, key)), None)
        if ranks and value.ndim not in ranks:
            origin = renamed.origin.get(key, key)
            raise UserError(
                f"{source}: '{origin}' is {tuple(value.shape)}, it must have {ranks[0]} dimensions"
            )


def check_overrides(overrides: dict[str, Any], source: str) -> dict[str, Any]:
    """The caller's facts about a file, validated by the annotations of Encoder."""
    hints = get_type_hints(Encoder.__init__, include_extras=True)
    hints |= {"predictor_heads": PositiveInt, "mean": list[float], "std": list[float], "head_eps": float}
    checked = {}
    for key, value in overrides.items():
        if key not in hints:
            known = "heads, predictor_heads, frames, height, width, positions, eps, mean, std"
            raise UserError(f"{source}: {key}= is no property of a model; known are {known}")
        try:
            checked[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as e:
            raise UserError(f"{source}: {key}={value}: {e.errors()[0]['msg'].lower()}") from None
    return checked


def check_shapes(
    make: Callable[[], nn.Module],
    weights: dict[str, Tensor],
    part: str,
    renamed: RenamedTensors,
    source: str,
) -> Any:
    """Builds the module on the meta device and reshapes `weights` in place to its parameters.

    Raises UserError unless names and shapes agree, apart from dimensions of one. part: prefix of the names in
    `renamed`.
    """
    try:
        with torch.device("meta"):
            module = make()
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    expected = module.state_dict()
    origins = renamed.origin

    def origin(key: str) -> str:
        return origins.get(part + key) or origins.get(part + key.removeprefix("positions."), part + key)

    for key in weights.keys() - expected.keys():
        raise UserError(f"{source}: '{origin(key)}' has no place in the model that the rest describes")
    for key, parameter in expected.items():
        shape = tuple(parameter.shape)
        if key not in weights:
            raise UserError(f"{source}: no weight for {part}{key} {shape}: the file is incomplete")
        found = tuple(weights[key].shape)
        if [n for n in found if n > 1] != [n for n in shape if n > 1]:
            raise UserError(f"{source}: '{origin(key)}' is {found}, the rest of the file asks for {shape}")
        weights[key] = weights[key].reshape(shape)
    return module


def fold_layer_scale(encoder: dict[str, Tensor], source: str) -> None:
    """Multiplies each LayerScale gamma into the last layer before it, row by row, which computes the same."""
    for key in [k for k in encoder if k.endswith(".gamma")]:
        gamma = encoder.pop(key)
        block = key.rsplit(".", 2)[0]
        layer = f"{block}.attn.proj" if ".ls1." in key else f"{block}.mlp.fc2"
        if not all(len(encoder.get(f"{layer}.{kind}", ())) == len(gamma) for kind in ("weight", "bias")):
            raise UserError(f"{source}: '{key}' has no layer '{layer}' of its width")
        encoder[f"{layer}.weight"] = encoder[f"{layer}.weight"] * gamma[:, None]
        encoder[f"{layer}.bias"] = encoder[f"{layer}.bias"] * gamma


def infer_blocks(weights: dict[str, Tensor], dim: int, source: str) -> dict[str, Any]:
    """depth, mlp and mlp_ratio of the transformer blocks among the weights."""
    depth = 1 + _last_index(weights, "blocks.")
    if not depth:
        raise UserError(f"{source}: no transformer blocks among the weights")
    if not {"blocks.0.mlp.fc1_g.weight", "blocks.0.mlp.fc1.weight"} & weights.keys():
        raise UserError(f"{source}: no weight for blocks.0.mlp.fc1.weight: the file is incomplete")
    if "blocks.0.mlp.fc1_g.weight" not in weights:
        return {"depth": depth, "mlp": "gelu", "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / dim}
    hidden_dim = len(weights["blocks.0.mlp.fc1_g.weight"])
    for ratio in SWIGLU_RATIOS:
        if swiglu_dim(round(dim * ratio)) == hidden_dim:
            return {"depth": depth, "mlp": "swiglu", "mlp_ratio": ratio}
    raise UserError(f"{source}: no published model has a SwiGLU of {hidden_dim} for width {dim}")


def _last_index(weights: dict[str, Tensor], prefix: str) -> int:
    """The largest N among the names `prefix`N.*, -1 if there is none."""
    return max((int(k.split(".")[1]) for k in weights if k.startswith(prefix)), default=-1)


def infer_encoder(
    weights: dict[str, Tensor], name: str, source: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of Encoder from the shapes of its weights. Changes `weights`: the position of a class token
    is added to the token, a fixed table of positions is removed."""
    if "patch_embed.proj.weight" not in weights:
        raise UserError(f"{source}: no patch embedding among the weights")
    kernel = weights["patch_embed.proj.weight"].shape
    dim = kernel[0]
    model: dict[str, Any] = {"dim": dim, "patch": kernel[-1], "tubelet": kernel[2] if len(kernel) == 5 else 1}
    model |= infer_blocks(weights, dim, source)
    model["heads"] = GIANT_HEADS.get(name, {}).get(dim) or ENCODER_HEADS.get(dim)
    model["class_token"] = "class_token" in weights
    model["image_tokenizer"] = any("_img." in k for k in weights)
    lower_levels = 1 + _last_index(weights, "level_norms.")
    model["levels"] = level_layers(model["depth"], lower_levels + 1) if lower_levels else ()
    model["final_norm"] = any(k.startswith("norm.") for k in weights)
    model["eps"] = 1e-6
    if name == "V-JEPA 2.1":
        model |= {"positions": "rope_interleaved", "rope_grid": {16: 16, 14: 18}.get(model["patch"], 16)}
    elif name == "V-JEPA 2":
        model["positions"] = "rope"
    elif name == "VideoMAE":
        model["positions"] = "sincos_flat"
    num_positions = None
    if "table" in weights:
        num_positions = len(weights["table"].flatten(0, -2)) - model["class_token"]
    model |= infer_native_size(model, num_positions, weights, source, overrides)
    model |= overrides
    if not model["heads"]:
        raise UserError(
            f"{source}: the file does not say how many heads a model of width {dim} has: give heads="
        )
    token = merge_class_token(weights, num_positions, source)
    if "table" in weights:
        model["positions"] = match_table(weights, token_grid(model), dim)
        if overrides.get("positions", model["positions"]) != model["positions"]:
            raise UserError(
                f"{source}: its table of positions is {model['positions']}, not {overrides['positions']}"
            )
    elif "positions.space" in weights:
        model["positions"] = "learned_separable"
    if token is not None:
        weights["class_token"] = token
    if "positions" not in model:
        raise UserError(f"{source}: no positions in the file: give positions=")
    return model


def token_grid(model: dict[str, Any]) -> Grid:
    """The grid of a native clip. model: arguments of Encoder."""
    patch = model["patch"]
    return Grid(model["frames"] // model["tubelet"], model["height"] // patch, model["width"] // patch)


def infer_native_size(
    model: dict[str, Any],
    num_positions: int | None,
    weights: dict[str, Tensor],
    source: str,
    overrides: dict[str, Any],
) -> dict[str, int]:
    """frames, height and width from the table of positions, if there is one, else from the published
    sizes."""
    tubelet, patch = model["tubelet"], model["patch"]
    frames = overrides.get("frames", 1 if tubelet == 1 else 16)
    if frames < tubelet:
        raise UserError(f"{source}: frames={frames} are fewer than the tubelet of {tubelet}")
    if "positions.time" in weights and "positions.space" in weights:
        frames = weights["positions.time"].shape[-2] * tubelet
        side = math.isqrt(weights["positions.space"].shape[-2])
    elif num_positions is not None:
        slices = frames // tubelet
        side = math.isqrt(num_positions // slices)
        if "height" not in overrides and side * side * slices != num_positions:
            raise UserError(
                f"{source}: {num_positions} positions are no square for {frames} frames: "
                f"give frames=, height=, width="
            )
    else:
        side = (256 if str(model.get("positions")).startswith("rope") else 224) // patch
    return {"frames": frames, "height": side * patch, "width": side * patch}


def level_layers(depth: int, levels: int) -> tuple[int, ...]:
    """The layers of V-JEPA 2.1's levels, evenly spread; of 48 layers, the third level is layer 37."""
    if (depth, levels) == (48, 4):
        return (11, 23, 37, 47)
    return tuple(depth * (i + 1) // levels - 1 for i in range(levels))


def merge_class_token(weights: dict[str, Tensor], num_positions: int | None, source: str) -> Tensor | None:
    """Returns the class token [dim] with its position added, and removes both from `weights`.

    num_positions: rows of the table for the other tokens; the row before them is the class token's. None: no
    table.
    """
    token = weights.pop("class_token", None)
    position = weights.pop("class_position", None)
    if (position is None) == (token is not None and "positions.space" in weights):
        raise UserError(f"{source}: a class token without its position, or the other way round")
    if token is None:
        return None
    token = token.flatten()
    if num_positions is not None:
        position, weights["table"] = weights["table"].flatten(0, -2).split([1, num_positions])
    if position is None:
        return token
    if position.numel() != len(token):
        raise UserError(
            f"{source}: the class token has {len(token)} entries, its position {position.numel()}"
        )
    return token + position.flatten()


def match_table(weights: dict[str, Tensor], grid: Grid, dim: int) -> str:
    """Returns the kind of fixed positions that the file's table has, and removes it from `weights`; "learned"
    if it is none of them, and then it is kept as positions.table."""
    table = weights.pop("table").flatten(0, -2)
    for kind, make in FIXED_TABLES.items():
        fits = (kind == "sincos_2d") == (grid.t == 1) and table.shape == (grid.n, dim)
        if fits and (make(grid, dim) - table).abs().max() < TABLE_TOLERANCE:
            return kind
    weights["positions.table"] = table
    return "learned"


def infer_predictor(
    weights: dict[str, Tensor],
    net: Encoder,
    name: str,
    source: str,
    heads: int | None,
    model: dict[str, Any],
) -> dict[str, Any]:
    """Arguments of JointPredictor from the shapes of its weights. Changes `weights` as infer_encoder does."""
    out, width = weights["proj.weight"].shape
    heads = heads or published_predictor_heads(name, width, model["heads"])
    if not heads:
        raise UserError(
            f"{source}: the file does not say how many heads a predictor of width {width} has: "
            "give predictor_heads="
        )
    options: dict[str, Any] = {"out": out, "width": width, "heads": heads, "eps": model["eps"]}
    options |= infer_blocks(weights, width, source)
    options["embed_bias"] = name != "VideoMAE"
    options["modality"] = "modality" in weights
    options["context_head"] = any(k.startswith("proj_context.") for k in weights)
    options["rope_grid"] = model.get("rope_grid")
    if "class_token" in weights:
        options["class_token"] = "own"
    else:
        options["class_token"] = "encoder" if name == "MAE" and model["class_token"] else "none"
    num_positions = None
    if "table" in weights:
        num_positions = len(weights["table"].flatten(0, -2)) - (options["class_token"] != "none")
    if options["class_token"] == "encoder" and "table" in weights:
        table = weights["table"].flatten(0, -2)
        if table[0].abs().max() > 0:
            raise UserError(f"{source}: the decoder's class token has a position; only zero is supported")
        weights["table"] = table[1:]
    own_positions = num_positions if options["class_token"] == "own" else None
    token = merge_class_token(weights, own_positions, source)
    if token is not None:
        weights["class_token"] = token
    if "table" in weights:
        options["positions"] = match_table(weights, net.grid, width)
    else:
        options["positions"] = "learned_separable" if "positions.space" in weights else model["positions"]
    return options


def published_predictor_heads(name: str, width: int, encoder_heads: int) -> int | None:
    if name in ("V-JEPA", "I-JEPA"):
        return encoder_heads
    if name.startswith("V-JEPA 2") and width == 384:
        return 12
    return DECODER_HEADS.get(name, {}).get(width)

"""What model the tensors of a checkpoint describe: the arguments of our modules, from shapes and published sizes.

What a file does not say (heads, mostly) comes from the published sizes or from `given`; nothing is guessed.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from vidssl.config import Count
from vidssl.core.errors import UserError
from vidssl.model.grid import Grid
from vidssl.model.heads import HEAD_EPS, AttentiveHead, MeanHead
from vidssl.model.positions import FIXED_TABLES
from vidssl.model.predictor import JointPredictor, MaskToken
from vidssl.model.vit import Encoder
from vidssl.pretrained.key_maps import RenamedTensors

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width; wider models differ between projects
DECODER_HEADS = {"VideoMAE": {192: 3, 384: 6, 512: 8, 640: 8}, "MAE-ST": {512: 16}, "MAE": {512: 16}}
GIANT_HEADS = {
    "V-JEPA 2": {1408: 22},
    "V-JEPA 2.1": {1408: 22, 1664: 26},
    "I-JEPA": {1408: 16},
    "VideoMAE": {1408: 16},
}


@dataclass
class Checkpoint:
    """A public checkpoint in our terms: keyword arguments and weights of each part that it holds."""

    format: str
    model: dict[str, Any]  # of Encoder, with frames, height and width
    encoder: dict[str, Tensor]  # the evaluated one
    pixels: dict[str, list[float]] = field(default_factory=lambda: IMAGENET)  # mean and std of its input
    online: dict[str, Tensor] | None = None  # the trained encoder, where that is another
    predictor: dict[str, Any] | None = None  # of Joint, with out
    predictor_weights: dict[str, Tensor] = field(default_factory=dict)
    query: Tensor | None = None  # [groups, width]
    head: dict[str, Tensor] = field(default_factory=dict)  # of a fine-tuned model or a probe
    head_heads: int = 0  # attention heads of an attentive head
    head_eps: float = HEAD_EPS  # of its LayerNorms: transformers has another than the official code
    unused: list[str] = field(default_factory=list)  # keys of the file that nothing needs

    def build_encoder(self, weights: dict[str, Tensor] | None = None) -> Encoder:
        encoder = Encoder(**self.model)
        encoder.load_state_dict(weights or self.encoder)
        return encoder

    def build_predictor(self, encoder: Encoder) -> tuple[JointPredictor, MaskToken]:
        """The predictor and its query; an error if the file holds none."""
        if self.predictor is None or self.query is None:
            raise UserError(f"this {self.format} checkpoint holds no predictor")
        predictor = JointPredictor(encoder, **self.predictor)
        predictor.load_state_dict(self.predictor_weights)
        query = MaskToken(predictor.width, groups=len(self.query))
        query.load_state_dict({"tokens": self.query})
        return predictor, query

    def build_head(self) -> AttentiveHead | MeanHead:
        """The classifier; an error if the file holds none."""
        if not self.head:
            raise UserError(f"this {self.format} checkpoint holds no classifier")
        head = make_head(self.head, self.head_heads, self.head_eps)
        head.load_state_dict(self.head)
        return head


def make_head(weights: dict[str, Tensor], heads: int, eps: float) -> AttentiveHead | MeanHead:
    """The classifier that the names and shapes describe, untrained."""
    classes, dim = weights["linear.weight"].shape
    if not any(k.startswith(("query_tokens", "xattn", "blocks")) for k in weights):
        return MeanHead(dim, classes, eps)
    depth = 1 + len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    head = AttentiveHead(dim, heads, classes, depth)
    for module in head.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return head


def describe(r: RenamedTensors, name: str, where: str, given: dict[str, Any]) -> Checkpoint:
    """The modules that fit the tensors; every tensor must have its place in them, and every place its tensor."""
    given = check_given(given, where)
    check_ranks(r, where)
    pixels = {k: list(given.pop(k, IMAGENET[k])) for k in ("mean", "std")}
    predictor_heads, head_eps = given.pop("predictor_heads", None), given.pop("head_eps", None)
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in r.tensors.items()}
    encoder, predictor, head = (
        {k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in PARTS
    )
    if name == "ViT":
        fold_layer_scale(encoder, where)
    model = describe_encoder(encoder, name, where, given)
    checkpoint = Checkpoint(
        name, model, encoder, pixels, head=head, unused=r.unused, head_heads=model["heads"]
    )
    net = check_shapes(lambda: Encoder(**model), encoder, "encoder.", r, where)
    if head:
        if "linear.weight" not in head:
            raise UserError(f"{where}: a classifier without its last layer")
        checkpoint.head_eps = head_eps or (HEAD_EPS if "query_tokens" in head else model["eps"])
        check_shapes(lambda: make_head(head, model["heads"], checkpoint.head_eps), head, "head.", r, where)
    if "proj.weight" in predictor:
        options = describe_predictor(predictor, net, name, where, predictor_heads, model)
        check_shapes(lambda: JointPredictor(net, **options), predictor, "predictor.", r, where)
        checkpoint.predictor, checkpoint.predictor_weights = options, predictor
        if "query.tokens" not in tensors:
            raise UserError(f"{where}: a predictor without its mask tokens")
        checkpoint.query = tensors["query.tokens"].flatten(0, -2)
        if checkpoint.query.shape[1] != options["width"]:
            origin, shape = r.origin["query.tokens"], tuple(checkpoint.query.shape)
            raise UserError(
                f"{where}: '{origin}' is {shape}, the rest of the file asks for width {options['width']}"
            )
    elif predictor or "query.tokens" in tensors:
        raise UserError(f"{where}: an incomplete predictor (no last layer)")
    return checkpoint


PARTS = ("encoder.", "predictor.", "head.")
RANKS = (  # of our names; the first that matches
    (r"encoder\.patch_embed(_img)?\.proj\.weight", (4, 5)),
    (r".*(norm\w*|level_norms\.\d+)\.weight|.*\.bias", (1,)),
    (r".*\.weight", (2,)),
    (r".*\.(table|space|time|tokens)", (2, 3, 4)),
)


def check_ranks(r: RenamedTensors, where: str) -> None:
    for key, value in r.tensors.items():
        ranks = next((ranks for pattern, ranks in RANKS if re.fullmatch(pattern, key)), None)
        if ranks and value.ndim not in ranks:
            shape = tuple(value.shape)
            raise UserError(
                f"{where}: '{r.origin.get(key, key)}' is {shape}, it must have {ranks[0]} dimensions"
            )


def check_given(given: dict[str, Any], where: str) -> dict[str, Any]:
    """What a user says of a file, checked against the arguments of Encoder."""
    hints = get_type_hints(Encoder.__init__, include_extras=True)
    hints |= {"predictor_heads": Count, "mean": list[float], "std": list[float], "head_eps": float}
    out = {}
    for key, value in given.items():
        if key not in hints:
            known = "heads, predictor_heads, frames, height, width, positions, eps, mean, std"
            raise UserError(f"{where}: {key}= says nothing of a model; known are {known}")
        try:
            out[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as e:
            raise UserError(f"{where}: {key}={value}: {e.errors()[0]['msg'].lower()}") from None
    return out


def check_shapes(
    make: Callable[[], nn.Module], weights: dict[str, Tensor], part: str, r: RenamedTensors, where: str
) -> Any:
    """The module without storage; its parameters and `weights` must be of the same names and shapes, but for ones."""
    try:
        with torch.device("meta"):
            module = make()
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    want = module.state_dict()

    def origin(key: str) -> str:
        return r.origin.get(part + key) or r.origin.get(part + key.removeprefix("positions."), part + key)

    for key in weights.keys() - want.keys():
        raise UserError(f"{where}: '{origin(key)}' has no place in the model that the rest describes")
    for key, place in want.items():
        if key not in weights:
            raise UserError(
                f"{where}: no weight for {part}{key} {tuple(place.shape)}: the file is incomplete"
            )
        if [n for n in weights[key].shape if n > 1] != [n for n in place.shape if n > 1]:
            shape = tuple(weights[key].shape)
            raise UserError(
                f"{where}: '{origin(key)}' is {shape}, the rest of the file asks for {tuple(place.shape)}"
            )
        weights[key] = weights[key].reshape(place.shape)
    return module


def fold_layer_scale(encoder: dict[str, Tensor], where: str) -> None:
    """A block's output times gamma is the same as its last layer times gamma, row by row."""
    for key in [k for k in encoder if k.endswith(".gamma")]:
        gamma, block = encoder.pop(key), key.rsplit(".", 2)[0]
        layer = f"{block}.attn.proj" if ".ls1." in key else f"{block}.mlp.fc2"
        if not all(len(encoder.get(f"{layer}.{end}", ())) == len(gamma) for end in ("weight", "bias")):
            raise UserError(f"{where}: '{key}' has no layer '{layer}' of its width")
        encoder[f"{layer}.weight"] = encoder[f"{layer}.weight"] * gamma[:, None]
        encoder[f"{layer}.bias"] = encoder[f"{layer}.bias"] * gamma


def infer_blocks(weights: dict[str, Tensor], dim: int, where: str) -> dict[str, Any]:
    """depth, mlp and mlp_ratio of the blocks among the weights."""
    depth = 1 + max((int(k.split(".")[1]) for k in weights if k.startswith("blocks.")), default=-1)
    if not depth:
        raise UserError(f"{where}: no transformer blocks among the weights")
    if not {"blocks.0.mlp.fc1_g.weight", "blocks.0.mlp.fc1.weight"} & weights.keys():
        raise UserError(f"{where}: no weight for blocks.0.mlp.fc1.weight: the file is incomplete")
    if "blocks.0.mlp.fc1_g.weight" not in weights:
        return {"depth": depth, "mlp": "gelu", "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / dim}
    hidden = len(weights["blocks.0.mlp.fc1_g.weight"])
    for ratio in (4.0, 48 / 11, 64 / 13):
        if -(-(2 * round(dim * ratio) // 3) // 8) * 8 == hidden:
            return {"depth": depth, "mlp": "swiglu", "mlp_ratio": ratio}
    raise UserError(f"{where}: a SwiGLU of {hidden} for width {dim} is of no published ratio")


def describe_encoder(w: dict[str, Tensor], name: str, where: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Encoder from the shapes of its weights. Folds the place of a class token into the token."""
    if "patch_embed.proj.weight" not in w:
        raise UserError(f"{where}: no patch embedding among the weights")
    kernel = w["patch_embed.proj.weight"].shape
    dim, patch, tubelet = kernel[0], kernel[-1], kernel[2] if len(kernel) == 5 else 1
    model: dict[str, Any] = {"dim": dim, "patch": patch, "tubelet": tubelet, **infer_blocks(w, dim, where)}
    model["heads"] = GIANT_HEADS.get(name, {}).get(dim) or HEADS.get(dim)
    model |= {"class_token": "class_token" in w, "image_tokenizer": any("_img." in k for k in w)}
    levels = 1 + max((int(k.split(".")[1]) for k in w if k.startswith("level_norms.")), default=-1)
    model["levels"] = level_layers(model["depth"], levels + 1) if levels else ()
    model |= {"final_norm": any(k.startswith("norm.") for k in w), "eps": 1e-6}
    if name == "V-JEPA 2.1":
        model |= {"positions": "rope_interleaved", "rope_grid": {16: 16, 14: 18}.get(patch, 16)}
    elif name == "V-JEPA 2":
        model["positions"] = "rope"
    elif name == "VideoMAE":
        model["positions"] = "sincos_flat"
    places = len(w["table"].flatten(0, -2)) - model["class_token"] if "table" in w else None
    model |= native_size(model, places, w, where, given)
    model |= given
    if not model["heads"]:
        raise UserError(
            f"{where}: the file does not say how many heads a model of width {dim} has: give heads="
        )
    token, grid = settle_class_token(w, places, where), token_grid(model)
    if "table" in w:
        model["positions"] = match_table(w, "table", "positions.table", grid, dim)
        if given.get("positions", model["positions"]) != model["positions"]:
            raise UserError(
                f"{where}: its table of positions is {model['positions']}, not {given['positions']}"
            )
    elif "positions.space" in w:
        model["positions"] = "learned_separable"
    if token is not None:
        w["class_token"] = token
    if "positions" not in model:
        raise UserError(f"{where}: no positions in the file: give positions=")
    return model


def token_grid(model: dict[str, Any]) -> Grid:
    t, patch = model["tubelet"], model["patch"]
    return Grid(model["frames"] // t, model["height"] // patch, model["width"] // patch)


def native_size(
    model: dict[str, Any], places: int | None, w: dict[str, Tensor], where: str, given: dict[str, Any]
) -> dict[str, int]:
    """frames, height and width: of the table of positions, if there is one; published sizes otherwise."""
    frames = given.get("frames", 1 if model["tubelet"] == 1 else 16)
    if frames < model["tubelet"]:
        raise UserError(f"{where}: frames={frames} are fewer than the {model['tubelet']} of one patch")
    if "positions.time" in w and "positions.space" in w:
        frames, places = w["positions.time"].shape[-2] * model["tubelet"], None
        side = math.isqrt(w["positions.space"].shape[-2])
    elif places is not None:
        side = math.isqrt(places // (frames // model["tubelet"]))
        if "height" not in given and side * side * (frames // model["tubelet"]) != places:
            raise UserError(
                f"{where}: {places} positions are no square for {frames} frames: give frames=, height=, width="
            )
    else:
        side = (256 if str(model.get("positions")).startswith("rope") else 224) // model["patch"]
    return {"frames": frames, "height": side * model["patch"], "width": side * model["patch"]}


def level_layers(depth: int, levels: int) -> tuple[int, ...]:
    """The layers of V-JEPA 2.1's levels, evenly spread; of 48, the third is 37."""
    if (depth, levels) == (48, 4):
        return (11, 23, 37, 47)
    return tuple(depth * (i + 1) // levels - 1 for i in range(levels))


def settle_class_token(w: dict[str, Tensor], places: int | None, where: str) -> Tensor | None:
    """[dim]: the class token with its position added, which is taken out of the table."""
    token = w.pop("class_token", None)
    position = w.pop("class_position", None)
    if (position is None) == (token is not None and "positions.space" in w):
        raise UserError(f"{where}: a class token without its position, or the other way round")
    if token is None:
        return None
    token = token.flatten()
    if places is not None:
        position, w["table"] = w["table"].flatten(0, -2).split([1, places])
    if position is not None and position.numel() != len(token):
        raise UserError(f"{where}: the class token has {len(token)} entries, its position {position.numel()}")
    return token if position is None else token + position.flatten()


def match_table(w: dict[str, Tensor], table: str, learned: str, grid: Grid, dim: int) -> str:
    """The fixed table that a file's table is, which is then left out; "learned" if it is none, and then it stays."""
    values = w.pop(table).flatten(0, -2)
    for kind, make in FIXED_TABLES.items():
        fits = (kind == "sincos_2d") == (grid.t == 1) and values.shape == (grid.n, dim)
        if fits and (make(grid, dim) - values).abs().max() < 1e-5:
            return kind
    w[learned] = values
    return "learned"


def describe_predictor(
    w: dict[str, Tensor],
    net: Encoder,
    name: str,
    where: str,
    heads: int | None,
    model: dict[str, Any],
) -> dict[str, Any]:
    """Arguments of Joint from the shapes of its weights."""
    out, width = w["proj.weight"].shape
    if heads is None:
        heads = {"V-JEPA": model["heads"], "I-JEPA": model["heads"]}.get(name)
        heads = heads or (
            12 if name.startswith("V-JEPA 2") and width == 384 else DECODER_HEADS.get(name, {}).get(width)
        )
    if not heads:
        raise UserError(
            f"{where}: the file does not say how many heads a predictor of width {width} has: give predictor_heads="
        )
    p: dict[str, Any] = {
        "out": out,
        "width": width,
        "heads": heads,
        "eps": model["eps"],
        **infer_blocks(w, width, where),
    }
    p |= {"embed_bias": name != "VideoMAE", "modality": "modality" in w}
    p |= {"context_head": any(k.startswith("proj_context.") for k in w), "rope_grid": model.get("rope_grid")}
    p["class_token"] = (
        "own" if "class_token" in w else "encoder" if name == "MAE" and model["class_token"] else "none"
    )
    places = len(w["table"].flatten(0, -2)) - (p["class_token"] != "none") if "table" in w else None
    if p["class_token"] == "encoder" and places is not None:
        first = w["table"].flatten(0, -2)[0]
        if first.abs().max() > 0:
            raise UserError(f"{where}: the decoder's class token has a position; only zero is known here")
        w["table"] = w["table"].flatten(0, -2)[1:]
    token = settle_class_token(w, places if p["class_token"] == "own" else None, where)
    if token is not None:
        w["class_token"] = token
    if "table" in w:
        p["positions"] = match_table(w, "table", "positions.table", net.grid, width)
    else:
        p["positions"] = "learned_separable" if "positions.space" in w else model["positions"]
    return p

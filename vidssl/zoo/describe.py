"""What model the tensors of a checkpoint describe: the arguments of our modules, from shapes and published sizes.

What a file does not say (heads, mostly) comes from the published sizes or from `given`; nothing is guessed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vidssl.errors import UserError
from vidssl.model.attentive import AttentiveHead, MeanHead
from vidssl.model.grid import Grid
from vidssl.model.positions import TABLES
from vidssl.model.vit import Encoder
from vidssl.objective.predictors import Joint, Token
from vidssl.zoo.formats import Renamed

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by width; wider models differ between projects
DECODER_HEADS = {"VideoMAE": {192: 3, 384: 6, 512: 8, 640: 8}, "MAE-ST": {512: 16}, "MAE": {512: 16}}
GIANT_HEADS = {"V-JEPA 2": {1408: 22}, "V-JEPA 2.1": {1408: 22, 1664: 26}, "I-JEPA": {1408: 16}, "VideoMAE": {1408: 16}}


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
    unused: list[str] = field(default_factory=list)  # keys of the file that nothing needs

    def build_encoder(self, weights: dict[str, Tensor] | None = None) -> Encoder:
        encoder = Encoder(**self.model)
        encoder.load_state_dict(weights or self.encoder)
        return encoder

    def build_predictor(self, encoder: Encoder) -> tuple[Joint, Token]:
        """The predictor and its query; an error if the file holds none."""
        if self.predictor is None or self.query is None:
            raise UserError(f"this {self.format} checkpoint holds no predictor")
        predictor = Joint(encoder, **self.predictor)
        predictor.load_state_dict(self.predictor_weights)
        query = Token(predictor.width, groups=len(self.query))
        query.load_state_dict({"tokens": self.query})
        return predictor, query

    def build_head(self) -> AttentiveHead | MeanHead:
        """The classifier; an error if the file holds none."""
        if not self.head:
            raise UserError(f"this {self.format} checkpoint holds no classifier")
        classes, dim = self.head["linear.weight"].shape
        if "query_tokens" in self.head:
            blocks = {k.split(".")[1] for k in self.head if k.startswith("blocks.")}
            head: AttentiveHead | MeanHead = AttentiveHead(dim, self.head_heads, classes, len(blocks) + 1)
        else:
            head = MeanHead(dim, classes, self.model["eps"])
        head.load_state_dict(self.head)
        return head


def describe(r: Renamed, name: str, where: str, given: dict[str, Any]) -> Checkpoint:
    """The modules that fit the tensors; every tensor must have its place in them, and every place its tensor."""
    given = dict(given)
    pixels = {k: list(given.pop(k, None) or IMAGENET[k]) for k in ("mean", "std")}
    predictor_heads = given.pop("predictor_heads", None)
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in r.tensors.items()}
    encoder, predictor, head = ({k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in PARTS)
    if name == "ViT":
        fold_layer_scale(encoder)
    model = describe_encoder(encoder, name, where, given)
    checkpoint = Checkpoint(name, model, encoder, pixels, head=head, unused=r.unused)
    net = fit(lambda: Encoder(**model), encoder, "encoder.", r, where)
    checkpoint.head_heads = model["heads"]
    if "proj.weight" in predictor:
        options = describe_predictor(predictor, net, name, where, predictor_heads, model)
        fit(lambda: Joint(net, **options), predictor, "predictor.", r, where)
        checkpoint.predictor, checkpoint.predictor_weights = options, predictor
        if "query.tokens" not in tensors:
            raise UserError(f"{where}: a predictor without its mask tokens")
        checkpoint.query = tensors["query.tokens"].reshape(-1, options["width"])
    elif predictor or "query.tokens" in tensors:
        raise UserError(f"{where}: an incomplete predictor (no last layer)")
    return checkpoint


PARTS = ("encoder.", "predictor.", "head.")


def fit(make: Callable[[], nn.Module], weights: dict[str, Tensor], part: str, r: Renamed, where: str) -> Any:
    """The module without storage; its parameters and `weights` must be the same names and, reshaped, the same sizes."""
    with torch.device("meta"):
        module = make()
    want = module.state_dict()
    for key in weights.keys() - want.keys():
        raise UserError(f"{where}: '{r.origin.get(part + key, key)}' has no place in the model that the rest describes")
    for key, place in want.items():
        if key not in weights:
            raise UserError(f"{where}: no weight for {part}{key} {tuple(place.shape)}: the file is incomplete")
        if weights[key].numel() != place.numel():
            origin, shape = r.origin.get(part + key, key), tuple(weights[key].shape)
            raise UserError(f"{where}: '{origin}' is {shape}, the rest of the file asks for {tuple(place.shape)}")
        weights[key] = weights[key].reshape(place.shape)
    return module


def fold_layer_scale(encoder: dict[str, Tensor]) -> None:
    """A block's output times gamma is the same as its last layer times gamma, row by row."""
    for key in [k for k in encoder if k.endswith(".gamma")]:
        gamma, block = encoder.pop(key), key.rsplit(".", 2)[0]
        layer = f"{block}.attn.proj" if ".ls1." in key else f"{block}.mlp.fc2"
        encoder[f"{layer}.weight"] = encoder[f"{layer}.weight"] * gamma[:, None]
        encoder[f"{layer}.bias"] = encoder[f"{layer}.bias"] * gamma


def stack(weights: dict[str, Tensor], dim: int) -> dict[str, Any]:
    """depth, mlp and mlp_ratio of the blocks among the weights."""
    depth = 1 + max((int(k.split(".")[1]) for k in weights if k.startswith("blocks.")), default=-1)
    if not depth:
        raise UserError("no transformer blocks among the weights")
    if "blocks.0.mlp.fc1_g.weight" not in weights:
        return {"depth": depth, "mlp": "gelu", "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / dim}
    hidden = len(weights["blocks.0.mlp.fc1_g.weight"])
    for ratio in (4.0, 48 / 11, 64 / 13):
        if -(-(2 * round(dim * ratio) // 3) // 8) * 8 == hidden:
            return {"depth": depth, "mlp": "swiglu", "mlp_ratio": ratio}
    raise UserError(f"a SwiGLU of {hidden} for width {dim} is of no published ratio")


def describe_encoder(w: dict[str, Tensor], name: str, where: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Encoder from the shapes of its weights. Folds the place of a class token into the token."""
    if "patch_embed.proj.weight" not in w:
        raise UserError(f"{where}: no patch embedding among the weights")
    kernel = w["patch_embed.proj.weight"].shape
    dim, patch, tubelet = kernel[0], kernel[-1], kernel[2] if len(kernel) == 5 else 1
    model: dict[str, Any] = {"dim": dim, "patch": patch, "tubelet": tubelet, **stack(w, dim)}
    model["heads"] = GIANT_HEADS.get(name, {}).get(dim) or HEADS.get(dim)
    model |= {"class_token": "class_token" in w, "image_tokenizer": "patch_embed_img.proj.weight" in w}
    levels = 1 + max((int(k.split(".")[1]) for k in w if k.startswith("level_norms.")), default=-1)
    model["levels"] = level_layers(model["depth"], levels + 1) if levels else ()
    model |= {"final_norm": "norm.weight" in w, "eps": 1e-6}
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
        raise UserError(f"{where}: the file does not say how many heads a model of width {dim} has: give heads=")
    token, grid = settle_class_token(w, places), grid_of(model)
    if "table" in w:
        model["positions"] = given.get("positions") or match_table(w, "table", "positions.table", grid, dim)
    elif "positions.space" in w:
        model["positions"] = "learned_separable"
    if token is not None:
        w["class_token"] = token
    if "positions" not in model:
        raise UserError(f"{where}: no positions in the file: give positions=")
    return model


def grid_of(model: dict[str, Any]) -> Grid:
    t, patch = model["tubelet"], model["patch"]
    return Grid(model["frames"] // t, model["height"] // patch, model["width"] // patch)


def native_size(
    model: dict[str, Any], places: int | None, w: dict[str, Tensor], where: str, given: dict[str, Any]
) -> dict[str, int]:
    """frames, height and width: of the table of positions, if there is one; published sizes otherwise."""
    frames = given.get("frames", 1 if model["tubelet"] == 1 else 16)
    if "positions.time" in w:
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


def settle_class_token(w: dict[str, Tensor], places: int | None) -> Tensor | None:
    """[dim]: the class token with its position added, which is taken out of the table."""
    token = w.pop("class_token", None)
    position = w.pop("class_position", None)
    if token is None:
        return None
    token = token.flatten()
    if places is not None:
        table = w["table"].flatten(0, -2)
        token, w["table"] = token + table[0], table[1:]
    return token + position.flatten() if position is not None else token


def match_table(w: dict[str, Tensor], table: str, learned: str, grid: Grid, dim: int) -> str:
    """The fixed table that a file's table is, which is then left out; "learned" if it is none, and then it stays."""
    values = w.pop(table).flatten(0, -2)
    for kind, make in TABLES.items():
        fits = (kind == "sincos_2d") == (grid.t == 1) and len(values) == grid.n
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
    p: dict[str, Any] = {"out": out, "width": width, "heads": heads, "eps": model["eps"], **stack(w, width)}
    p |= {"embed_bias": "embed.bias" in w or "embed.2.bias" in w, "modality": "modality" in w}
    p |= {"context_head": "proj_context.weight" in w, "rope_grid": model.get("rope_grid")}
    p["class_token"] = "own" if "class_token" in w else "encoder" if name == "MAE" and model["class_token"] else "none"
    places = len(w["table"].flatten(0, -2)) - (p["class_token"] != "none") if "table" in w else None
    if p["class_token"] == "encoder" and places is not None:
        first = w["table"].flatten(0, -2)[0]
        if first.abs().max() > 0:
            raise UserError(f"{where}: the decoder's class token has a position; only zero is known here")
        w["table"] = w["table"].flatten(0, -2)[1:]
    token = settle_class_token(w, places if p["class_token"] == "own" else None)
    if token is not None:
        w["class_token"] = token
    if "table" in w:
        p["positions"] = match_table(w, "table", "positions.table", net.grid, width)
    else:
        p["positions"] = "learned_separable" if "positions.space" in w else model["positions"]
    return p

"""Predictors with cross-attention, and methods made of them, compared with the references."""

import re
from collections.abc import Callable

import torch
from case import Case
from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.cross_predictor import CrossPredictor
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.predictor import MaskToken
from vidssl.model.vit import Encoder
from vidssl.objective.errors import ERRORS
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.targets import Pixels
from vidssl.pretrained.key_maps import Rules, rename, with_prefix

NORMED = r"\.(weight|bias)"
VIT: Rules = [
    (r"(patch_embed\.proj|norm)" + NORMED, r"\1.\2"),
    (r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc\d)" + NORMED, r"blocks.\1.\2.\3"),
    (r"cls_token", "class_token"),
    (r"pos_embed", None),
]
CROSSMAE: Rules = [
    *with_prefix("", "encoder.", VIT),
    (r"decoder_blocks\.(\d+)\.cross_attn\.(q|kv|proj)" + NORMED, r"predictor.blocks.\1.cross.\2.\3"),
    (r"decoder_blocks\.(\d+)\.norm1" + NORMED, r"predictor.blocks.\1.norms.cross.\2"),
    (r"decoder_blocks\.(\d+)\.norm2" + NORMED, r"predictor.blocks.\1.norms.mlp.\2"),
    (r"decoder_blocks\.(\d+)\.mlp\.(fc\d)" + NORMED, r"predictor.blocks.\1.mlp.\2.\3"),
    (r"dec_norms\.(\d+)" + NORMED, r"predictor.memory_norms.\1.\2"),
    (r"decoder_norm" + NORMED, r"predictor.norm.\1"),
    (r"decoder_pred" + NORMED, r"predictor.proj.\1"),
    (r"wfm\.linear\.weight", "predictor.mix.weight"),
    (r"mask_token", "query.tokens.0"),
    (r"decoder_pos_embed", None),
]
CROPMAE: Rules = [
    *with_prefix("", "encoder.", VIT),
    (r"decoder_blocks\.(\d+)\.norm1" + NORMED, r"predictor.blocks.\1.norms.self.\2"),
    (r"decoder_blocks\.(\d+)\.norm2" + NORMED, r"predictor.blocks.\1.norms.cross.\2"),
    (r"decoder_blocks\.(\d+)\.norm3" + NORMED, r"predictor.blocks.\1.norms.mlp.\2"),
    (r"decoder_blocks\.(\d+)\.linear(\d)" + NORMED, r"predictor.blocks.\1.mlp.fc\2.\3"),
    (r"decoder_blocks\.(\d+)\.self_attn\.(q|kv|proj)" + NORMED, r"predictor.blocks.\1.own.\2.\3"),
    (r"decoder_blocks\.(\d+)\.multihead_attn\.(q|kv|proj)" + NORMED, r"predictor.blocks.\1.cross.\2.\3"),
    (r"decoder_(embed|norm)" + NORMED, r"predictor.\1.\2"),
    (r"decoder_pred" + NORMED, r"predictor.proj.\1"),
    (r"mask_token", "query.tokens.0"),
    (r"decoder_pos_embed", None),
]


class FixedMask:
    """A masker that returns a given mask."""

    def __init__(self, mask: Mask):
        self.given = mask

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return [self.given]


def load(case: Case, rules: Rules, **modules: nn.Module) -> None:
    """Loads the reference's weights into our modules, by the first word of their names in `rules`."""
    tensors = rename(parted_attention(case.state), rules, case.name).tensors
    for name, module in modules.items():
        own = dict(module.named_parameters())
        found = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        assert own.keys() == found.keys(), sorted(own.keys() ^ found.keys())
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(found[key].reshape(parameter.shape))
        case.place(module)


def compare_gradients(case: Case, rules: Rules, loss: Tensor, **modules: nn.Module) -> None:
    loss.backward()
    ours = {f"{name}.{k}": p.grad for name, module in modules.items() for k, p in module.named_parameters()}
    case.compare_gradients(lambda state: rename(parted_attention(state), rules, case.name), ours)


def image_encoder(case: Case, **options: object) -> Encoder:
    g = case.geometry
    sizes = {"dim": g["dim"], "depth": g["depth"], "heads": g["heads"], "patch": g["patch"], "tubelet": 1}
    side = g.get("img", g["patch"] * g.get("grid", 1))
    sizes |= {"frames": 1, "height": side, "width": side, "positions": "sincos_2d", "class_token": True}
    return Encoder(**{**sizes, **options})  # type: ignore[arg-type]


def small_predictor(case: Case, encoder: Encoder, out: int, **options: object) -> CrossPredictor:
    g = case.geometry
    sizes = {"width": g["ddim"], "depth": g["ddepth"], "heads": g["dheads"], "positions": "sincos_2d"}
    return CrossPredictor(encoder, out, **{**sizes, **options})  # type: ignore[arg-type]


def check_crossmae(case: Case) -> None:
    encoder = image_encoder(case, final_norm=False)
    target = Pixels(encoder, "patch", "normalised")
    predictor = small_predictor(case, encoder, target.width, memory="mix")
    query = MaskToken(predictor.width)
    modules = {"encoder": encoder, "predictor": predictor, "query": query}
    load(case, CROSSMAE, **modules)
    order = case["ids_restore"].argsort(1)
    context = order[:, : int(len(order[0]) * (1 - case.options["mask_ratio"]))]
    predicted = case["predicted"].nonzero()[:, 1].reshape(len(order), 1, -1)
    case.not_compared.discard("predicted")
    mask = Mask(context, predicted)
    z = encoder(case.video, context, all_layers=True)
    case.compare("memory", torch.stack(list(predictor.memories(z))))
    case.compare("prediction", predictor(z, mask, query.tokens[0], encoder.grid).target[:, 0])
    case.compare("target", gather_tokens(target(case.video), predicted[:, 0]))
    error = ERRORS["l2"]()
    objective = MaskedPrediction(encoder, FixedMask(mask), target, query, predictor, error)
    loss = objective(case.video, KeyedRNG(0, 0, torch.arange(len(order))))["loss"]
    case.compare("loss", loss)
    compare_gradients(case, CROSSMAE, loss, **modules)


def parted_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names the parts of torch's MultiheadAttention, whose queries, keys and values are in one tensor."""
    parted = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name):
            width = len(value) // 3
            parted[f"{match[1]}.q.{match[2]}"] = value[:width]
            parted[f"{match[1]}.kv.{match[2]}"] = value[width:]
        else:
            parted[name.replace("attn.out_proj", "attn.proj")] = value
    return parted


def check_cropmae(case: Case) -> None:
    """The reference gives each frame a class token of its own, and has one among the queries."""
    encoder = image_encoder(case)
    target = Pixels(encoder, "patch", "normalised")
    options = {"mlp_ratio": case.options["feed_forward"] / case.geometry["ddim"], "self_attention": "after"}
    predictor = small_predictor(case, encoder, target.width, embed=True, norm="post", **options)
    query = MaskToken(predictor.width)
    modules = {"encoder": encoder, "predictor": predictor, "query": query}
    load(case, CROPMAE, **modules)
    first, second = case["pairs"].unbind(1)
    hidden = case["mask"]
    shown = (~hidden).nonzero()[:, 1:]
    z_first = encoder(first[:, :, None], return_levels=True)
    z_second = encoder(second[:, :, None], shown, return_levels=True)
    case.compare("encoder_first", z_first)
    case.compare("encoder_visible", z_second)
    n = encoder.grid.n
    embedded = predictor.embed(z_second)
    queries = query.tokens.expand(len(hidden), n, -1).scatter(
        1, shown[:, :, None].expand(-1, -1, predictor.width), embedded[:, 1:]
    )
    queries = queries + predictor.positions.embedding(encoder.grid, None)
    queries = torch.cat([embedded[:, :1], queries], 1)
    tokens = predictor.decode(queries, predictor.memories(predictor.embed(z_first)))
    prediction = predictor.proj(tokens[:, 1:])
    case.compare("prediction", prediction)
    error = ERRORS["l2"]()(prediction, target(second[:, :, None]))
    loss = (error * hidden).sum() / hidden.sum()
    case.compare("loss", loss)
    compare_gradients(case, CROPMAE, loss, **modules)


CHECKS: dict[str, Callable[[Case], None]] = {"crossmae": check_crossmae, "cropmae": check_cropmae}

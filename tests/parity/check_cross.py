"""Predictors with cross-attention, and methods made of them, compared with the references."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from case import Case
from einops import rearrange
from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.conv_predictor import ConvPredictor
from vidssl.model.cross_predictor import CrossPredictor
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.positions import RotaryTable
from vidssl.model.prediction import Encoded
from vidssl.model.predictor import MaskToken
from vidssl.model.queries import ContextMean
from vidssl.model.vit import Encoder
from vidssl.objective.ema_target import Ema
from vidssl.objective.errors import ERRORS
from vidssl.objective.feature_losses import ClassMean, Similarity, mean_pair_cosine
from vidssl.objective.feature_targets import Clusters
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.targets import Pixels
from vidssl.pretrained.key_maps import Rules, rename, with_prefix

ENCODER_PARTS = ("patch_embed", "encoder", "registers")
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

CAPI: Rules = [  # the encoder's weights keep their names
    (r".*rope\.freqs", None),
    (r"student\.backbone\.(patch_embed|encoder|registers)(.*)", r"backbone.\1\2"),
    (r"student\.backbone\.mask_token", "query.tokens.0"),
    *with_prefix(
        r"student\.backbone\.decoder\.blocks\.(\d+)\.",
        r"predictor.blocks.\1.",
        [
            (r"residual1\.fn\.(q|kv|proj)\.weight", r"cross.\2.weight"),
            (r"residual1\.norm\.weight", "norms.cross.weight"),
            (r"residual2\.norm\.weight", "norms.mlp.weight"),
            (r"residual2\.fn\.(fc\d)\.weight", r"mlp.\2.weight"),
        ],
    ),
    (r"student\.head\.last_layer\.weight_g", "predictor.proj.factors"),
    (r"student\.head\.last_layer\.weight_v", "predictor.proj.weight"),
    (r"teacher\.head\.layer" + NORMED, r"clusters.\1"),
    (r"teacher\.backbone.*", None),
]

LATENT_ENCODER: Rules = [
    (r"embed\.proj" + NORMED, r"patch_embed.proj.\1"),
    *VIT,
    (r"head\.linear0\.weight", "output_head.0.weight"),
    (r"head\.norm0" + NORMED, r"output_head.1.\1"),
    (r"head\.linear1\.weight", "output_head.3.weight"),
    (r"head\.norm1" + NORMED, r"output_head.4.\1"),
    (r"head\.linear2\.weight", "output_head.6.weight"),
    (r"head\.norm2" + NORMED, r"output_head.7.\1"),
    (r"pos_embed\.pos_embeds", None),
]
LATENT_MIM: Rules = [
    *with_prefix(r"encoder\.", "encoder.", LATENT_ENCODER),
    *with_prefix(r"target_encoder\.", "target.", LATENT_ENCODER),
    (r"decoder\.blocks\.(\d+)\.cross_attn\.(q|kv)_proj" + NORMED, r"predictor.blocks.\1.cross.\2.\3"),
    (r"decoder\.blocks\.(\d+)\.cross_attn\.proj" + NORMED, r"predictor.blocks.\1.cross.proj.\2"),
    (r"decoder\.blocks\.(\d+)\.self_attn\.(q|kv|proj)" + NORMED, r"predictor.blocks.\1.own.\2.\3"),
    (r"decoder\.blocks\.(\d+)\.norm1" + NORMED, r"predictor.blocks.\1.norms.self.\2"),
    (r"decoder\.blocks\.(\d+)\.norm2q" + NORMED, r"predictor.blocks.\1.norms.cross.\2"),
    (r"decoder\.blocks\.(\d+)\.norm3" + NORMED, r"predictor.blocks.\1.norms.mlp.\2"),
    (r"decoder\.blocks\.(\d+)\.norm2kv" + NORMED, r"predictor.memory_norms.\1.\2"),
    (r"decoder\.blocks\.(\d+)\.mlp\.(fc\d)" + NORMED, r"predictor.blocks.\1.mlp.\2.\3"),
    (r"decoder\.(embed|norm)" + NORMED, r"predictor.\1.\2"),
    (r"decoder\.head" + NORMED, r"predictor.proj.\1"),
    (r"decoder\.cls_token", "predictor.class_query"),
    (r"decoder\.mask_token", "query.token"),
    (r"decoder\.pos_embed\.pos_embeds", None),
]

PREFIX = r"modality_encoders\.IMAGE\."
D2V_ENCODER: Rules = [
    (PREFIX + r"local_encoder\.proj" + NORMED, r"patch_embed.proj.\1"),
    (PREFIX + r"extra_tokens", "class_token"),
    (PREFIX + r"context_encoder\.norm" + NORMED, r"input_norm.\1"),
    (PREFIX + r"fixed_positional_encoder\.positions", None),
    (r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc\d)" + NORMED, r"blocks.\1.\2.\3"),
]
DATA2VEC2: Rules = [
    *with_prefix("", "encoder.", D2V_ENCODER),
    *with_prefix(r"_ema\.", "target.", D2V_ENCODER),
    (PREFIX + r"decoder\.blocks\.(\d+)\.0" + NORMED, r"predictor.layers.\1.\2"),
    (PREFIX + r"decoder\.proj" + NORMED, r"predictor.proj.\1"),
]


class FixedMask:
    """A masker that returns given masks."""

    def __init__(self, *masks: Mask):
        self.given = masks

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return list(self.given)


Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def load(case: Case, rules: Rules, convert: Convert = dict, **modules: nn.Module) -> None:
    """Loads the reference's weights into our modules, by the first word of their names in `rules`. convert:
    of the reference's tensors, before they are renamed."""
    tensors = rename(convert(case.state), rules, case.name).tensors
    for name, module in modules.items():
        own = dict(module.named_parameters())
        found = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        assert own.keys() == found.keys(), sorted(own.keys() ^ found.keys())
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(found[key].reshape(parameter.shape))
        case.place(module)


def compare_gradients(
    case: Case, rules: Rules, loss: Tensor, convert: Convert = dict, **modules: nn.Module
) -> None:
    loss.backward()
    ours = {f"{name}.{k}": p.grad for name, module in modules.items() for k, p in module.named_parameters()}
    case.compare_gradients(lambda state: rename(convert(state), rules, case.name), ours)


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
    load(case, CROPMAE, parted_attention, **modules)
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
    compare_gradients(case, CROPMAE, loss, parted_attention, **modules)


def pairs_of_neighbours(heads: int, weight: Tensor) -> Tensor:
    """Rows [heads * width, ...] in another order: CAPI rotates entries i and i + width / 2 of a head
    together, we entries 2 i and 2 i + 1."""
    return rearrange(weight, "(h half pair) d -> (h pair half) d", h=heads, half=2)


def joint_keys(heads: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's attention with keys and values in one tensor, and our order of rotated entries."""
    joined = dict(state)
    for name in [n for n in state if "backbone.decoder" in n and ".k_proj." in n]:
        key = pairs_of_neighbours(heads, joined.pop(name))
        value = joined.pop(name.replace(".k_proj.", ".v_proj."))
        query = joined.pop(name.replace(".k_proj.", ".q_proj."))
        joined[name.replace(".k_proj.", ".kv.")] = torch.cat([key, value])
        joined[name.replace(".k_proj.", ".q.")] = pairs_of_neighbours(heads, query)
    return joined


class CapiEncoder(nn.Module):
    """CAPI's encoder, written out: RMSNorm, no biases, registers on the edge of the box of visible tokens."""

    def __init__(self, case: Case, network: str):
        super().__init__()
        state = {k: v.to(case.device) for k, v in case.subtree(f"state.{network}.backbone").items()}
        self.freqs = state["encoder.blocks.0.residual1.fn.rope.freqs"]
        self.weights = {k: nn.Parameter(v) for k, v in state.items() if k.split(".")[0] in ENCODER_PARTS}
        self.geometry = case.geometry

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.weights.items()

    def coordinates(self, ids: Tensor) -> Tensor:
        """Of tokens i64 [B, n], in [0, 1]: f32 [B, n, 2]."""
        side = self.geometry["img"] // self.geometry["patch"]
        return torch.stack([ids // side, ids % side], -1) / (side - 1)

    def with_registers(self, places: Tensor) -> Tensor:
        """places f32 [B, n, 2]: those of the registers before them."""
        c = torch.arange(self.geometry["registers"] // 4, device=places.device) * 4
        c = c / self.geometry["registers"]
        edges = [(c, 0 * c), (0 * c + 1, c), (1 - c, 0 * c + 1), (0 * c, 1 - c)]
        edge = torch.cat([torch.stack(edge, -1) for edge in edges])
        low = places.amin(1, keepdim=True)
        return torch.cat([low + edge * (places.amax(1, keepdim=True) - low), places], 1)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Normed registers and tokens [B, registers + n, D] of images at ids i64 [B, n]."""
        w = self.weights
        stride = self.geometry["patch"]
        x = F.conv2d(images, w["patch_embed.weight"], w["patch_embed.bias"], stride=stride)
        x = gather_tokens(x.flatten(2).transpose(1, 2), ids)
        x = torch.cat([w["registers"].expand(len(x), -1, -1), x], 1)
        angle = (self.with_registers(self.coordinates(ids)) @ self.freqs)[:, None]
        for i in range(self.geometry["depth"]):
            block = f"encoder.blocks.{i}."
            y = F.rms_norm(x, x.shape[-1:], w[block + "residual1.norm.weight"], 1e-5)
            parts = [y @ w[f"{block}residual1.fn.{part}_proj.weight"].T for part in "qkv"]
            q, k, v = (rearrange(part, "b n (h e) -> b h n e", h=self.geometry["heads"]) for part in parts)
            y = F.scaled_dot_product_attention(self.rotate(q, angle), self.rotate(k, angle), v)
            x = x + rearrange(y, "b h n e -> b n (h e)") @ w[f"{block}residual1.fn.proj.weight"].T
            y = F.rms_norm(x, x.shape[-1:], w[block + "residual2.norm.weight"], 1e-5)
            y = F.gelu(y @ w[block + "residual2.fn.fc1.weight"].T)
            x = x + y @ w[block + "residual2.fn.fc2.weight"].T
        return F.rms_norm(x, x.shape[-1:], eps=1e-5)

    @staticmethod
    def rotate(x: Tensor, angle: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    def rope(self, places: Tensor) -> RotaryTable:
        """Our table of places [B, n, 2], for entries in pairs of neighbours."""
        angle = rearrange(places @ self.freqs, "b n (half pair) -> b n 1 1 (pair half)", half=2)
        sign = 2 * (torch.arange(angle.shape[-1], device=angle.device) % 2) - 1
        return angle.cos(), angle.sin() * sign


def check_capi(case: Case) -> None:
    """The predictor, its head, the clusters and both losses. The encoders are written out above."""
    g, options = case.geometry, case.options
    student, teacher = CapiEncoder(case, "student"), CapiEncoder(case, "teacher")
    ours = image_encoder(case, class_token=False)
    sizes = {"width": g["dim"], "depth": g["ddepth"], "heads": g["heads"], "eps": 1e-5, "final_norm": False}
    kinds = {"positions": "rope", "norm_kind": "rms", "bias": False, "head": "cosine"}
    predictor = CrossPredictor(ours, options["num_clusters"], **sizes, **kinds)  # type: ignore[arg-type]
    query = MaskToken(predictor.width)
    temperatures = options["target_temp"], options["pred_temp"]
    target = Clusters(ours, options["num_clusters"], *temperatures, positionwise=options["positionwise_sk"])
    rules = partial(joint_keys, g["heads"])
    modules = {"predictor": predictor, "query": query, "clusters": target.clusters}
    load(case, CAPI, convert=rules, **modules)
    images = case["images"]
    everywhere = torch.arange(16, device=images.device).expand(len(images), -1)
    registers = g["registers"]
    features = teacher(images, everywhere)[:, registers:].detach()
    target.encoder = Given(features)  # type: ignore[assignment]
    assigned, parts = target.with_aux(images)
    z = student(images, case["context_ids"])
    ropes = [student.coordinates(case["target_ids"]), student.coordinates(case["context_ids"])]
    ropes = student.rope(ropes[0]), student.rope(student.with_registers(ropes[1]))
    queries = query.tokens.expand(len(images), case["target_ids"].shape[1], -1)
    x = predictor.decode(queries, predictor.memories(z), ropes)
    logits = predictor.proj(x)
    chosen = gather_tokens(assigned, case["target_ids"])
    loss = ERRORS["cross_entropy"](options["student_temp"])(logits, chosen).mean()
    for name, value in {
        "target_features": features,
        "context": z[:, registers:],
        "prediction": F.rms_norm(x, x.shape[-1:], eps=1e-5),
        "logits": logits,
        "assignments": chosen,
        "loss": loss,
        "loss_clustering": parts["clustering"],
    }.items():
        if name in case:
            case.compare(name, value)
    compare_gradients(case, CAPI, loss + parts["clustering"], convert=rules, **modules, backbone=student)


def patches_by_colour(patch: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Patch embeddings with the colours of a patch before its pixels, and parted self-attention."""
    changed = {}
    for name, value in state.items():
        if name.endswith("embed.proj.weight"):
            changed[name] = rearrange(value, "d (p q c) -> d (c p q)", p=patch, q=patch)
        elif ".self_attn.qkv." in name:
            width = len(value) // 3
            changed[name.replace(".qkv.", ".q.")] = value[:width]
            changed[name.replace(".qkv.", ".kv.")] = value[width:]
        else:
            changed[name] = value
    return changed


def check_latentmim(case: Case) -> None:
    """The reference stretches its positions a little: its tables are given."""
    options = case.options
    encoder = image_encoder(case, head_depth=options["mlp_depth"], head_width=options["mlp_dim"])
    target = Ema(encoder, norm="none", sees="hidden")
    kinds = {"self_attention": "before", "embed": True, "memory_positions": True, "memory_norm": True}
    predictor = small_predictor(case, encoder, encoder.dim, class_query=True, **kinds)
    query = ContextMean(predictor.width)
    modules = {"encoder": encoder, "predictor": predictor, "query": query}
    convert = partial(patches_by_colour, case.geometry["patch"])
    load(case, LATENT_MIM, convert, **modules, target=target.encoder)
    for module, name in ((encoder, "encoder"), (target.encoder, "encoder"), (predictor, "decoder")):
        module.positions.table = case[f"state.{name}.pos_embed.pos_embeds"][1:]
    order = case["ids_shuffle"]
    mask = Mask(order[:, : options["num_vis"]], order[:, None, options["num_vis"] :])
    error = ERRORS["nce"](options["tau"], scale=2 * options["tau"])
    similarity = Similarity(options["avg_sim_coeff"], (options["sim_trg"], 0.0))
    similarity.kind = "similarity"
    objective = MaskedPrediction(encoder, FixedMask(mask), target, query, predictor, error, aux=[similarity])
    rng = KeyedRNG(0, 0, torch.arange(len(order), device=order.device))
    predicted = objective.predict(case.video, None, encoder.grid, 0, mask, rng, None)
    parts = objective(case.video, rng)
    case.compare("context", predicted.encoded.z)
    case.compare("target", predicted.target[:, 0])
    case.compare("prediction", predicted.prediction.target[:, 0])
    case.compare("loss_nce", parts["loss_0"])
    case.compare("similarity_prediction", mean_pair_cosine(predicted.prediction.target[:, 0]))
    case.compare("similarity_visible", mean_pair_cosine(predicted.encoded.z[:, 1:]))
    case.compare("loss", parts["loss"])
    compare_gradients(case, LATENT_MIM, parts["loss"], convert, **modules)


def in_one_stack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The block of the reference's image encoder before those that all modalities share."""
    renamed = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(_ema\.|)blocks\.(\d+)\.(.*)", name):
            name = f"{match[1]}blocks.{int(match[2]) + 1}.{match[3]}"
        renamed[name.replace("modality_encoders.IMAGE.context_encoder.blocks", "blocks")] = value
    return renamed


class GivenQueries(nn.Module):
    """Queries [masks, B, 1, Nt, width]."""

    def __init__(self, queries: Tensor):
        super().__init__()
        self.queries = queries

    def forward(self, encoded: Encoded, predictor: nn.Module) -> Tensor:
        return self.queries[encoded.mask_index]


def check_data2vec2(case: Case) -> None:
    """The reference's losses are sums; clones of a clip are masks of it here."""
    g, options = case.geometry, case.options
    clones = options["clone_batch"]
    encoder = image_encoder(case, depth=g["depth"] + options["prenet_depth"], block_norm="post")
    target = Ema(encoder, layers=options["average_top_k_layers"], which="mlp")
    sizes = {"kernel": options["decoder_kernel"], "conv_groups": options["decoder_groups"]}
    predictor = ConvPredictor(encoder, encoder.dim, g["ddepth"], time_kernel=1, **sizes)
    modules = {"encoder": encoder, "predictor": predictor}
    load(case, DATA2VEC2, in_one_stack, **modules, target=target.encoder)
    table = case["state.modality_encoders.IMAGE.fixed_positional_encoder.positions"][0]
    for network in (encoder, target.encoder):
        network.positions.table = table
    hidden = case["mask"]
    ids = hidden.int().argsort(dim=1, stable=True)
    shown = int((~hidden[0]).sum())
    masks = [Mask(ids[i::clones, :shown], ids[i::clones, None, shown:]) for i in range(clones)]
    noise = options["mask_noise_std"] * case["noise"][:, None]
    query = GivenQueries(torch.stack([noise[i::clones] for i in range(clones)]))
    root = g["dim"] ** 0.5
    aux = ClassMean(options["cls_loss"] * len(hidden) * root, encoder, encoder.dim)
    aux.kind = "class_mean"
    error = ERRORS["l2"](scale=root)
    objective = MaskedPrediction(encoder, FixedMask(*masks), target, query, predictor, error, aux=[aux])
    rng = KeyedRNG(0, 0, torch.arange(g["B"], device=hidden.device))
    features = target(case.video)
    case.compare("target", features)
    found = [
        objective.predict(case.video, features, encoder.grid, i, mask, rng, None)
        for i, mask in enumerate(masks)
    ]
    for name, parts in {
        "prediction": [p.prediction.target[:, 0] for p in found],
        "class_prediction": [p.encoded.z[:, 0] for p in found],
    }.items():
        case.compare(name, torch.stack(parts, 1).flatten(0, 1))
    parts = objective(case.video, rng)
    tokens = hidden.sum()
    for key, part in (("loss_regression", "loss"), ("loss_class", "aux_class_mean")):
        mean = torch.stack([parts[f"{part}_{i}"] for i in range(clones)]).mean()
        case.compare_relative(key, mean * tokens)
    case.compare("loss", parts["loss"])
    compare_gradients(case, DATA2VEC2, parts["loss"], in_one_stack, **modules)


class Given(nn.Module):
    """An encoder with given features."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = features

    def forward(self, video: Tensor) -> Tensor:
        return self.features


CHECKS: dict[str, Callable[[Case], None]] = {
    "crossmae": check_crossmae,
    "cropmae": check_cropmae,
    "capi": check_capi,
    "capi_batchwise": check_capi,
    "latentmim": check_latentmim,
    "data2vec2": check_data2vec2,
}

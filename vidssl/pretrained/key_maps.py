"""Translates the keys of published checkpoints to our names.

A format is a list of rules: pattern of a whole key, and our name for it (None: not needed). A key that
matches no rule is an error, so that a new variant is never half read. Our names: encoder.*, predictor.*,
query.*, head.*; `table` is a table of positions; `attn.q`, `attn.k` and `attn.v` are packed afterwards.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from vidssl.core.errors import UserError

Rules = list[tuple[str, str | None]]

_VIT: Rules = [  # patch embedding, blocks and last norm of every ViT of the official implementations
    (r"(patch_embed|patch_embed_img)\.proj\.(weight|bias)", r"\1.proj.\2"),
    (r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc\d)\.(weight|bias)", r"blocks.\1.\2.\3"),
    (r"norm\.(weight|bias)", r"norm.\1"),
]
_QV: Rules = [(r"blocks\.(\d+)\.attn\.(q|v)_bias", r"blocks.\1.attn.\2.bias")]


def with_prefix(prefix: str, ours: str, rules: Rules) -> Rules:
    """The same rules with the pattern `prefix` before every key and `ours` before every name."""
    return [(prefix + pattern, name if name is None else ours + name) for pattern, name in rules]


JEPA: Rules = [
    *with_prefix(r"encoder\.", "encoder.", _VIT),
    (r"encoder\.pos_embed", "encoder.table"),
    (r"encoder\.norms_block\.(\d+)\.(weight|bias)", r"encoder.level_norms.\1.\2"),
    (r"encoder\.(img_mod_embed|video_mod_embed)", r"encoder.\1"),
    *with_prefix(
        r"predictor\.predictor_", "predictor.", [rule for rule in _VIT if "patch_embed" not in rule[0]]
    ),
    (r"predictor\.predictor_(embed|embed\.0|embed\.2|proj|proj_context)\.(weight|bias)", r"predictor.\1.\2"),
    (r"predictor\.predictor_pos_embed", "predictor.table"),
    (r"predictor\.video_mod_embed", "predictor.modality.0"),
    (r"predictor\.img_mod_embed", "predictor.modality.1"),
    (r"predictor\.mask_tokens\.(\d+)", r"query.tokens.\1"),
    (r"predictor\.mask_token", "query.tokens.0"),
]
VIDEOMAE: Rules = [
    *with_prefix(r"encoder\.", "encoder.", _VIT + _QV),
    *with_prefix(r"decoder\.", "predictor.", _VIT + _QV),
    (r"encoder_to_decoder\.(weight|bias)", r"predictor.embed.\1"),
    (r"decoder\.head\.(weight|bias)", r"predictor.proj.\1"),
    (r"mask_token", "query.tokens.0"),
]
VIDEOMAE_FINETUNED: Rules = [
    *with_prefix("", "encoder.", _VIT + _QV),
    (r"fc_norm\.(weight|bias)", r"head.norm.\1"),
    (r"head\.(weight|bias)", r"head.linear.\1"),
]
# The attentive probe heads of V-JEPA and V-JEPA 2. V-JEPA's file contains an output projection that is never
# applied.
ATTENTIVE: Rules = [
    (r"pooler\.query_tokens", "head.query_tokens"),
    *with_prefix(r"pooler\.", "head.", [rule for rule in _VIT if "blocks" in rule[0]]),
    (
        r"pooler\.cross_attention_block\.(norm1|norm2|xattn\.q|xattn\.kv|mlp\.fc\d)\.(weight|bias)",
        r"head.\1.\2",
    ),
    (r"pooler\.cross_attention_block\.xattn\.proj\.(weight|bias)", None),
    (r"linear\.(weight|bias)", r"head.linear.\1"),
]
MAE: Rules = [  # MAE, MAE-ST, and the ViTs of timm
    *with_prefix("", "encoder.", _VIT),
    (r"blocks\.(\d+)\.attn\.([qkv])\.(weight|bias)", r"encoder.blocks.\1.attn.\2.\3"),
    (r"blocks\.(\d+)\.(ls1|ls2)\.gamma", r"encoder.blocks.\1.\2.gamma"),
    (r"cls_token", "encoder.class_token"),
    (r"pos_embed", "encoder.table"),
    (r"pos_embed_spatial", "encoder.positions.space"),
    (r"pos_embed_temporal", "encoder.positions.time"),
    (r"pos_embed_class", "encoder.class_position"),
    *with_prefix("decoder_", "predictor.", [rule for rule in _VIT if "patch_embed" not in rule[0]]),
    (r"decoder_blocks\.(\d+)\.attn\.([qkv])\.(weight|bias)", r"predictor.blocks.\1.attn.\2.\3"),
    (r"decoder_embed\.(weight|bias)", r"predictor.embed.\1"),
    (r"decoder_pred\.(weight|bias)", r"predictor.proj.\1"),
    (r"decoder_cls_token", "predictor.class_token"),
    (r"decoder_pos_embed", "predictor.table"),
    (r"decoder_pos_embed_spatial", "predictor.positions.space"),
    (r"decoder_pos_embed_temporal", "predictor.positions.time"),
    (r"decoder_pos_embed_class", "predictor.class_position"),
    (r"mask_token", "query.tokens.0"),
    (r"head\.(weight|bias)", None),  # a classifier of images
]
_HF_LAYER: Rules = [  # names of transformers 4 and 5
    (r"attention\.attention\.([qkv])(?:uery|ey|alue)\.(weight|bias)", r"attn.\1.\2"),
    (r"attention\.attention\.([qv])_bias", r"attn.\1.bias"),
    (r"attention\.([qkv])(?:uery|ey|alue|_proj)\.(weight|bias)", r"attn.\1.\2"),
    (r"attention\.(?:output\.dense|o_proj|proj)\.(weight|bias)", r"attn.proj.\1"),
    (r"(?:intermediate\.dense|mlp\.fc1)\.(weight|bias)", r"mlp.fc1.\1"),
    (r"(?:output\.dense|mlp\.fc2)\.(weight|bias)", r"mlp.fc2.\1"),
    (r"(?:layernorm_before|norm1)\.(weight|bias)", r"norm1.\1"),
    (r"(?:layernorm_after|norm2)\.(weight|bias)", r"norm2.\1"),
]
# The prefix has one group, so the numbers of the layer's own groups rise by one.
_HF_BLOCK: Rules = [
    (pattern, re.sub(r"\\(\d)", lambda m: f"\\{int(m[1]) + 1}", str(name))) for pattern, name in _HF_LAYER
]
_HF_POOLER: Rules = [  # the attentive head of VJEPA2ForVideoClassification
    (r"pooler\.query_tokens", "head.query_tokens"),
    *with_prefix(
        r"pooler\.self_attention_layers\.(\d+)\.",
        r"head.blocks.\1.",
        [
            (r"self_attn\.([qkv])_proj\.(weight|bias)", r"attn.\2.\3"),
            (r"self_attn\.out_proj\.(weight|bias)", r"attn.proj.\2"),
            (r"layer_(norm\d)\.(weight|bias)", r"\2.\3"),
            (r"(mlp\.fc\d)\.(weight|bias)", r"\2.\3"),
        ],
    ),
    (r"pooler\.cross_attention_layer\.cross_attn\.([qkv])_proj\.(weight|bias)", r"head.xattn.\1.\2"),
    (r"pooler\.cross_attention_layer\.layer_(norm\d)\.(weight|bias)", r"head.\1.\2"),
    (r"pooler\.cross_attention_layer\.(mlp\.fc\d)\.(weight|bias)", r"head.\1.\2"),
]
_HF_PREFIX = r"(?:(?:videomae|vit|ijepa|vjepa2)\.)?"
HUGGING_FACE: Rules = [
    *with_prefix(_HF_PREFIX + r"(?:encoder\.layer|layers)\.(\d+)\.", r"encoder.blocks.\1.", _HF_BLOCK),
    (
        _HF_PREFIX + r"(?:encoder\.)?embeddings\.patch_embeddings\.proj(?:ection)?\.(weight|bias)",
        r"encoder.patch_embed.proj.\1",
    ),
    (_HF_PREFIX + r"embeddings\.cls_token", "encoder.class_token"),
    (_HF_PREFIX + r"embeddings\.position_embeddings", "encoder.table"),
    (_HF_PREFIX + r"(?:encoder\.)?layernorm\.(weight|bias)", r"encoder.norm.\1"),
    # transformers 5.23 writes the decoder of vit_mae as decoder_encoder.layer
    *with_prefix(r"decoder\.decoder_(?:layers|encoder\.layer)\.(\d+)\.", r"predictor.blocks.\1.", _HF_BLOCK),
    *with_prefix(_HF_PREFIX + r"predictor\.layer\.(\d+)\.", r"predictor.blocks.\1.", _HF_BLOCK),
    (r"encoder_to_decoder\.(weight|bias)", r"predictor.embed.\1"),
    (r"decoder\.decoder_embed\.(weight|bias)", r"predictor.embed.\1"),
    (_HF_PREFIX + r"predictor\.embeddings\.predictor_embeddings\.(weight|bias)", r"predictor.embed.\1"),
    (r"decoder\.(?:decoder_)?norm\.(weight|bias)", r"predictor.norm.\1"),
    (_HF_PREFIX + r"predictor\.layernorm\.(weight|bias)", r"predictor.norm.\1"),
    (r"decoder\.(?:head|decoder_pred)\.(weight|bias)", r"predictor.proj.\1"),
    (_HF_PREFIX + r"predictor\.proj\.(weight|bias)", r"predictor.proj.\1"),
    (r"decoder\.decoder_pos_embed", "predictor.table"),
    (r"(?:decoder\.)?mask_token", "query.tokens.0"),
    (_HF_PREFIX + r"predictor\.embeddings\.mask_tokens", "query.tokens"),
    (r"fc_norm\.(weight|bias)", r"head.norm.\1"),
    (r"classifier\.(weight|bias)", r"head.linear.\1"),
    *_HF_POOLER,
    (_HF_PREFIX + r"pooler\.dense\.(weight|bias)", None),  # of IJepaModel, never trained
]


class RenamedTensors(NamedTuple):
    """The tensors of a checkpoint under our names."""

    tensors: dict[str, Tensor]
    origin: dict[str, str]  # our name: the file's key
    unused: list[str]  # keys of the file that are not needed

    def move(self, names: dict[str, str]) -> None:
        """Renames tensors, all at once; names: old name to new name."""
        moved = {new: (self.tensors.pop(old), self.origin[old]) for old, new in names.items()}
        for new, (tensor, origin) in moved.items():
            self.tensors[new] = tensor
            self.origin[new] = origin

    def drop(self, name: str) -> None:
        """Removes a tensor, if it is there, and lists its key as unused."""
        if self.tensors.pop(name, None) is not None:
            self.unused.append(self.origin[name])


def rename(state: dict[str, Tensor], rules: Rules, source: str) -> RenamedTensors:
    """Renames every key by the first rule that matches it; then packs q, k, v and numbered rows.

    Raises UserError for a key without a rule and for two keys with one name. source: the file, for error
    messages.
    """
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unused: list[str] = []
    unknown: list[str] = []
    for key, value in state.items():
        rule = next(((m, name) for pattern, name in rules if (m := re.fullmatch(pattern, key))), None)
        if rule is None:
            unknown.append(key)
            continue
        match, template = rule
        if template is None:
            unused.append(key)
            continue
        name = match.expand(template)
        if name in tensors:
            raise UserError(f"{source}: '{key}' and '{origin[name]}' are the same weight; which is right?")
        tensors[name] = value
        origin[name] = key
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        shown = ", ".join(map(repr, unknown[:4]))
        raise UserError(f"{source}: unexpected {shown}{more}: this variant is not supported")
    return RenamedTensors(pack_tensors(tensors, origin, source), origin, unused)


def pack_tensors(tensors: dict[str, Tensor], origin: dict[str, str], source: str) -> dict[str, Tensor]:
    """Packs q, k and v of an attention, keys and values of a probe's cross-attention, and numbered rows, each
    into one tensor."""
    packed = _pack_attention(tensors, origin, source)
    for stem in ("query.tokens", "predictor.modality"):
        rows = [name for name in packed if name.startswith(f"{stem}.")]
        rows.sort(key=lambda name: int(name.rsplit(".", 1)[1]))
        if rows and rows != [f"{stem}.{i}" for i in range(len(rows))]:
            raise UserError(f"{source}: '{origin[rows[-1]]}' is there, one before it is not")
        if rows:
            values = [packed.pop(name).reshape(1, -1) for name in rows]
            packed[stem] = _concatenate(values, rows[0], origin, source)
            origin[stem] = origin[rows[0]]
    return packed


def _pack_attention(tensors: dict[str, Tensor], origin: dict[str, str], source: str) -> dict[str, Tensor]:
    # VideoMAE's keys have no bias: it is zero.
    keys_have_no_bias = not any(name.endswith(".attn.k.bias") for name in tensors)
    packed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.(?:attn|xattn)\.)([qkv])\.(weight|bias)", name)
        if match is None:
            packed[name] = value
            continue
        layer, part, kind = match.groups()
        letters = "qkv"
        if layer == "head.xattn.":  # the query of a cross-attention stays by itself
            letters = "kv"
            if part == "q":
                packed[name] = value
        if part != letters[0]:
            continue
        parts = {letter: tensors.get(f"{layer}{letter}.{kind}") for letter in letters}
        if parts.get("k") is None and keys_have_no_bias and kind == "bias":
            parts["k"] = torch.zeros_like(value)
        if missing := [letter for letter, tensor in parts.items() if tensor is None]:
            raise UserError(f"{source}: '{origin[name]}' is there, its {missing[0]} part is not")
        joint = f"{layer}{letters}.{kind}"
        packed[joint] = _concatenate([t for t in parts.values() if t is not None], name, origin, source)
        origin[joint] = origin[name]
    return packed


def _concatenate(parts: list[Tensor], name: str, origin: dict[str, str], source: str) -> Tensor:
    if len({part.shape for part in parts}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise UserError(f"{source}: '{origin[name]}' and its counterparts have shapes {shapes}, not one")
    return torch.cat(parts)

"""Our checkpoints as Hugging Face folders, which transformers loads with the same outputs: videomae and vjepa2."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write, make_folder
from vidssl.pretrained.infer_config import Checkpoint

# Ours -> theirs, for the names inside a block; q, k and v are unpacked first.
VIDEOMAE_BLOCK = {
    "attn.q.weight": "attention.attention.query.weight",
    "attn.k.weight": "attention.attention.key.weight",
    "attn.v.weight": "attention.attention.value.weight",
    "attn.q.bias": "attention.attention.q_bias",  # as published, and as transformers 4 and 5 read it
    "attn.v.bias": "attention.attention.v_bias",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
VJEPA2_BLOCK = {
    "attn.q": "attention.query",
    "attn.k": "attention.key",
    "attn.v": "attention.value",
    "attn.proj": "attention.proj",
}


VJEPA2_POOLER_BLOCK = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "norm": "layer_norm",
}


def save_hf(folder: Path, found: Checkpoint) -> str:
    """config.json, model.safetensors and a preprocessor's statistics; -> the class of transformers that reads them."""
    m = found.model
    if m["height"] != m["width"]:
        raise UserError(f"transformers' models are square, this one is {m['height']} x {m['width']} px")
    if m.get("levels") or m.get("class_token") or m.get("image_tokenizer") or m.get("mlp", "gelu") != "gelu":
        raise UserError(
            "transformers has no model with levels, a class token, an image tokenizer or SwiGLU of this kind"
        )
    positions = m.get("positions", "sincos_uniform")
    writers = {"sincos_flat": videomae, "rope": vjepa2}
    if positions not in writers:
        raise UserError(
            f"no model of transformers has positions {positions!r}: videomae has sincos_flat, vjepa2 has rope (tiled)"
        )
    weights, config = writers[positions](found)
    make_folder(folder)
    plain = {k: v.contiguous().clone() for k, v in weights.items()}
    atomic_write(folder / "model.safetensors", lambda beside: save_file(plain, beside, {"format": "pt"}))
    pixels = {"image_mean": found.pixels["mean"], "image_std": found.pixels["std"]}
    for name, content in (("preprocessor_config.json", pixels), ("config.json", config)):
        atomic_write(folder / name, partial(write_json, content))
    return config["architectures"][0]


def write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1))


def unpack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """attn.qkv.* -> attn.q.*, attn.k.*, attn.v.*, and the same of xattn.kv.*."""
    out: dict[str, Tensor] = {}
    for key, value in weights.items():
        parts = next((parts for parts in ("qkv", "kv") if f"attn.{parts}." in key), "")
        if parts:
            pieces = zip(parts, value.chunk(len(parts)), strict=True)
            out |= {key.replace(parts, part): piece for part, piece in pieces}
        else:
            out[key] = value
    return out


def renamed(
    weights: dict[str, Tensor], layer: str, block: dict[str, str], ends: dict[str, str]
) -> dict[str, Tensor]:
    """blocks.N.* -> `layer`.N.*, with the names of `block` inside; the other keys by the beginnings in `ends`."""
    out = {}
    for key, value in unpack(weights).items():
        if m := re.fullmatch(r"blocks\.(\d+)\.(.*)", key):
            rest = next((new + m[2][len(old) :] for old, new in block.items() if m[2].startswith(old)), m[2])
            out[f"{layer}.{m[1]}.{rest}"] = value
        else:
            old = next(k for k in ends if key.startswith(k))
            out[ends[old] + key[len(old) :]] = value
    return out


def without_key_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """VideoMAE's attention has no key bias: it adds the same to all scores of a query, which softmax takes away."""
    return {k: v for k, v in weights.items() if not k.endswith("attn.k.bias")}


def videomae(found: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    m = found.model
    config = {
        "architectures": ["VideoMAEModel"],
        "model_type": "videomae",
        "image_size": m["height"],
        "patch_size": m["patch"],
        "num_channels": 3,
        "num_frames": m["frames"],
        "tubelet_size": m["tubelet"],
        "hidden_size": m["dim"],
        "num_hidden_layers": m["depth"],
        "num_attention_heads": m["heads"],
        "intermediate_size": round(m["dim"] * m["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": m["eps"],
        "qkv_bias": True,
        "use_mean_pooling": not m["final_norm"],
    }
    ends = {
        "patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
        "norm": "videomae.layernorm",
    }
    names = "videomae.encoder.layer", VIDEOMAE_BLOCK, ends
    weights = renamed(without_key_bias(unpack(found.encoder)), *names)
    if found.predictor is not None and found.query is not None:
        p = found.predictor
        check_predictor(p, "sincos_flat", embed_bias=False)
        if p["out"] != 3 * m["tubelet"] * m["patch"] ** 2:
            raise UserError(
                f"transformers' VideoMAE predicts all pixels of a patch, this one {p['out']} values"
            )
        config |= {
            "architectures": ["VideoMAEForPreTraining"],
            "decoder_num_attention_heads": p["heads"],
            "decoder_hidden_size": p["width"],
            "decoder_num_hidden_layers": p["depth"],
            "decoder_intermediate_size": round(p["width"] * p["mlp_ratio"]),
            "norm_pix_loss": True,
        }
        ends = {"embed": "encoder_to_decoder", "norm": "decoder.norm", "proj": "decoder.head"}
        decoder = without_key_bias(unpack(found.predictor_weights))
        weights |= renamed(decoder, "decoder.decoder_layers", VIDEOMAE_BLOCK, ends)
        weights["mask_token"] = one_token(found.query)[None, None]
    elif found.head:
        if "query_tokens" in found.head:
            raise UserError(
                "transformers' VideoMAE classifies by the mean of tokens, this one by an attentive head"
            )
        config |= {"architectures": ["VideoMAEForVideoClassification"], **labels(found)}
        weights |= renamed(found.head, "", {}, {"norm": "fc_norm", "linear": "classifier"})
    return weights, config


def labels(found: Checkpoint) -> dict[str, Any]:
    """Numbers as names of the classes: the files do not hold the names."""
    classes = range(len(found.head["linear.weight"]))
    return {"id2label": {str(i): str(i) for i in classes}, "label2id": {str(i): i for i in classes}}


def vjepa2(found: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    m, p = found.model, found.predictor
    if p is None or found.query is None:
        raise UserError("transformers' VJEPA2Model has a predictor; this checkpoint holds none")
    check_predictor(p, "rope", embed_bias=True)
    if p["out"] != m["dim"]:
        raise UserError(
            f"transformers' predictor gives the encoder's width {m['dim']}; this one gives {p['out']}"
        )
    config = {
        "architectures": ["VJEPA2Model"],
        "model_type": "vjepa2",
        "patch_size": m["patch"],
        "crop_size": m["height"],
        "frames_per_clip": m["frames"],
        "tubelet_size": m["tubelet"],
        "hidden_size": m["dim"],
        "in_chans": 3,
        "num_attention_heads": m["heads"],
        "num_hidden_layers": m["depth"],
        "mlp_ratio": ratio(m["mlp_ratio"], m["dim"]),
        "layer_norm_eps": m["eps"],
        "qkv_bias": True,
        "hidden_act": "gelu",
        "pred_hidden_size": p["width"],
        "pred_num_attention_heads": p["heads"],
        "pred_num_hidden_layers": p["depth"],
        "pred_num_mask_tokens": len(found.query),
        "pred_mlp_ratio": ratio(p["mlp_ratio"], p["width"]),
    }
    ends = {"patch_embed.proj": "encoder.embeddings.patch_embeddings.proj", "norm": "encoder.layernorm"}
    weights = renamed(found.encoder, "encoder.layer", VJEPA2_BLOCK, ends)
    ends = {
        "embed": "predictor.embeddings.predictor_embeddings",
        "norm": "predictor.layernorm",
        "proj": "predictor.proj",
    }
    weights |= renamed(found.predictor_weights, "predictor.layer", VJEPA2_BLOCK, ends)
    weights["predictor.embeddings.mask_tokens"] = found.query[:, None, None]
    if found.head:
        if "query_tokens" not in found.head or found.head_heads != m["heads"]:
            raise UserError(
                f"transformers' V-JEPA 2 has an attentive head of {m['heads']} heads; this one is another"
            )
        depth = len({k.split(".")[1] for k in found.head if k.startswith("blocks.")})
        config |= {
            "architectures": ["VJEPA2ForVideoClassification"],
            "num_pooler_layers": depth,
            **labels(found),
        }
        cross = "pooler.cross_attention_layer"
        ends = {"query_tokens": "pooler.query_tokens", "norm": f"{cross}.layer_norm", "mlp": f"{cross}.mlp"}
        ends |= {f"xattn.{part}": f"{cross}.cross_attn.{part}_proj" for part in "qkv"} | {
            "linear": "classifier"
        }
        weights = {f"vjepa2.{k}": v for k, v in weights.items()}
        weights |= renamed(found.head, "pooler.self_attention_layers", VJEPA2_POOLER_BLOCK, ends)
    return weights, config


def ratio(mlp_ratio: float, dim: int) -> float:
    """The ratio whose product transformers, which rounds down, makes the same hidden width."""
    return (
        mlp_ratio if int(dim * mlp_ratio) == round(dim * mlp_ratio) else math.nextafter(mlp_ratio, math.inf)
    )


def check_predictor(p: dict[str, Any], positions: str, embed_bias: bool) -> None:
    fits = p.get("positions", "sincos_uniform") == positions and p.get("embed_bias", True) == embed_bias
    extra = p.get("modality") or p.get("context_head") or p.get("class_token", "none") != "none"
    if not fits or extra or p.get("mlp", "gelu") != "gelu":
        raise UserError(
            f"transformers' predictor has positions {positions}, embed_bias {embed_bias} and no more; not this one"
        )


def one_token(query: Tensor) -> Tensor:
    if len(query) != 1:
        raise UserError(f"transformers' VideoMAE has one mask token, this checkpoint {len(query)}")
    return query[0]

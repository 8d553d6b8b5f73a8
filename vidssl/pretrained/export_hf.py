"""Exports checkpoints as Hugging Face folders (videomae, vjepa2, ijepa), which transformers loads with the
same outputs."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write, make_folder
from vidssl.pretrained.files import write_tensors
from vidssl.pretrained.hf_processor import processor_config
from vidssl.pretrained.infer_config import Checkpoint

# Our names inside a block: those of published files, which transformers 4 and 5 read. q, k and v are unpacked
# first.
IJEPA_BLOCK = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
VIDEOMAE_BLOCK = {
    "attn.q.bias": "attention.attention.q_bias",
    "attn.v.bias": "attention.attention.v_bias",
    **IJEPA_BLOCK,
}
Export = tuple[dict[str, Tensor], dict[str, Any]]  # weights and config.json
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


def save_hf(folder: Path, checkpoint: Checkpoint) -> str:
    """Writes config.json, model.safetensors and preprocessor_config.json. Returns the name of transformers'
    class."""
    model = checkpoint.model
    if model["height"] != model["width"]:
        raise UserError(
            f"transformers' models are square, this one is {model['height']} x {model['width']} px"
        )
    check_supported(model)
    weights, hf_config = exporter_of(model)(checkpoint)
    make_folder(folder)
    plain = {k: v.contiguous().clone() for k, v in weights.items()}
    atomic_write(
        folder / "model.safetensors", lambda temporary: write_tensors(temporary, plain, {"format": "pt"})
    )
    processor = processor_config(hf_config["model_type"], model["height"], checkpoint.pixels)
    for name, content in (("preprocessor_config.json", processor), ("config.json", hf_config)):
        atomic_write(folder / name, partial(write_json, content))
    return hf_config["architectures"][0]


def check_supported(model: dict[str, Any]) -> None:
    """Raises UserError for a part of an encoder that no model of transformers has. model: its arguments."""
    if model.get("levels") or model.get("image_tokenizer"):
        raise UserError(
            "transformers has no V-JEPA 2.1, whose model.levels and image tokenizer this encoder has: "
            "--to torch and --to onnx write it"
        )
    kinds = (model.get("mlp", "gelu"), model.get("attention", "full"), model.get("block_norm", "pre"))
    if model.get("class_token") or model.get("conditioned") or kinds != ("gelu", "full", "pre"):
        raise UserError(
            "transformers has no model for clips with a class token, noise levels, model.attention other "
            "than full, post-norm blocks, or SwiGLU of this kind: --to torch and --to onnx write them"
        )


def exporter_of(model: dict[str, Any]) -> Callable[[Checkpoint], Export]:
    """The function for an encoder of these arguments; raises UserError if transformers lacks its
    positions."""
    positions = model.get("positions", "sincos_uniform")
    exporters = {"sincos_flat": export_videomae, "rope": export_vjepa2}
    if is_image_model(model) and not positions.startswith("rope"):
        return export_ijepa
    if positions not in exporters:
        raise UserError(
            f"no model of transformers has positions {positions!r}: videomae has sincos_flat, vjepa2 has "
            "rope (tiled), ijepa (images) any table: --to torch and --to onnx write them"
        )
    return exporters[positions]


def is_image_model(model: dict[str, Any]) -> bool:
    return (model["frames"], model["tubelet"]) == (1, 1)


def write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1))


def unpack_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits attn.qkv.* into attn.q.*, attn.k.* and attn.v.*, and xattn.kv.* into xattn.k.* and xattn.v.*."""
    unpacked: dict[str, Tensor] = {}
    for key, value in weights.items():
        letters = next((letters for letters in ("qkv", "kv") if f"attn.{letters}." in key), "")
        if not letters:
            unpacked[key] = value
            continue
        for letter, part in zip(letters, value.chunk(len(letters)), strict=True):
            unpacked[key.replace(letters, letter)] = part
    return unpacked


def rename_to_hf(
    weights: dict[str, Tensor], layer: str, block: dict[str, str], prefixes: dict[str, str]
) -> dict[str, Tensor]:
    """Unpacks attention and renames: blocks.N.* to `layer`.N.* with `block` for the names inside, other keys
    by `prefixes`."""
    renamed = {}
    for key, value in unpack_attention(weights).items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.*)", key):
            index, name = match.groups()
            name = next((new + name[len(old) :] for old, new in block.items() if name.startswith(old)), name)
            renamed[f"{layer}.{index}.{name}"] = value
        else:
            prefix = next(k for k in prefixes if key.startswith(k))
            renamed[prefixes[prefix] + key[len(prefix) :]] = value
    return renamed


def without_key_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """VideoMAE's attention has no key bias: it adds the same number to all scores of a query, which softmax
    cancels."""
    return {k: v for k, v in unpack_attention(weights).items() if not k.endswith("attn.k.bias")}


def vit_config(m: dict[str, Any]) -> dict[str, Any]:
    """What transformers' configurations of a ViT have in common. m: the model's section."""
    return {
        "image_size": m["height"],
        "patch_size": m["patch"],
        "num_channels": 3,
        "hidden_size": m["dim"],
        "num_hidden_layers": m["depth"],
        "num_attention_heads": m["heads"],
        "intermediate_size": round(m["dim"] * m["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": m["eps"],
        "qkv_bias": True,
    }


def export_videomae(checkpoint: Checkpoint) -> Export:
    m = checkpoint.model
    hf_config = {
        "architectures": ["VideoMAEModel"],
        "model_type": "videomae",
        **vit_config(m),
        "num_frames": m["frames"],
        "tubelet_size": m["tubelet"],
        "use_mean_pooling": not m["final_norm"],
    }
    prefixes = {
        "patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
        "norm": "videomae.layernorm",
    }
    encoder = without_key_bias(checkpoint.encoder)
    weights = rename_to_hf(encoder, "videomae.encoder.layer", VIDEOMAE_BLOCK, prefixes)
    if checkpoint.predictor is not None and checkpoint.query is not None:
        decoder, decoder_config = export_videomae_decoder(checkpoint, checkpoint.predictor, checkpoint.query)
        return weights | decoder, hf_config | decoder_config
    if checkpoint.head:
        if "query_tokens" in checkpoint.head:
            raise UserError(
                "transformers' VideoMAE classifies by the mean of tokens, this one by an attentive head"
            )
        hf_config["architectures"] = ["VideoMAEForVideoClassification"]
        hf_config |= numbered_labels(checkpoint)
        weights |= rename_to_hf(checkpoint.head, "", {}, {"norm": "fc_norm", "linear": "classifier"})
    return weights, hf_config


def export_ijepa(checkpoint: Checkpoint) -> Export:
    """Without the predictor, which transformers' I-JEPA does not have."""
    m = checkpoint.model
    if checkpoint.head or not m["final_norm"]:
        raise UserError(
            "transformers' I-JEPA has a final norm and no norm in its classifier; this one differs"
        )
    hf_config = {"architectures": ["IJepaModel"], "model_type": "ijepa", **vit_config(m)}
    encoder = checkpoint.build_encoder()
    table = encoder.positions.embedding(encoder.grid, None)
    assert isinstance(table, Tensor)
    plain = {k: v for k, v in checkpoint.encoder.items() if not k.startswith("positions.")}
    prefixes = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    weights = rename_to_hf(plain, "encoder.layer", IJEPA_BLOCK, prefixes)
    kernel = "embeddings.patch_embeddings.projection.weight"
    # one frame: a convolution over rows and columns
    weights[kernel] = weights[kernel].squeeze(2)
    weights["embeddings.position_embeddings"] = table.detach()[None]
    return weights, hf_config


def export_videomae_decoder(checkpoint: Checkpoint, predictor: dict[str, Any], query: Tensor) -> Export:
    check_predictor(predictor, "sincos_flat", embed_bias=False)
    if predictor["out"] != 3 * checkpoint.model["tubelet"] * checkpoint.model["patch"] ** 2:
        raise UserError(
            f"transformers' VideoMAE predicts all pixels of a patch, this one {predictor['out']} values"
        )
    if len(query) != 1:
        raise UserError(f"transformers' VideoMAE has one mask token, this checkpoint {len(query)}")
    hf_config = {
        "architectures": ["VideoMAEForPreTraining"],
        "decoder_num_attention_heads": predictor["heads"],
        "decoder_hidden_size": predictor["width"],
        "decoder_num_hidden_layers": predictor["depth"],
        "decoder_intermediate_size": round(predictor["width"] * predictor["mlp_ratio"]),
        "norm_pix_loss": True,
    }
    prefixes = {"embed": "encoder_to_decoder", "norm": "decoder.norm", "proj": "decoder.head"}
    decoder = without_key_bias(checkpoint.predictor_weights)
    weights = rename_to_hf(decoder, "decoder.decoder_layers", VIDEOMAE_BLOCK, prefixes)
    weights["mask_token"] = query[0][None, None]
    return weights, hf_config


def numbered_labels(checkpoint: Checkpoint) -> dict[str, Any]:
    """Class numbers in place of class names, which the files do not contain."""
    classes = range(len(checkpoint.head["linear.weight"]))
    return {"id2label": {str(i): str(i) for i in classes}, "label2id": {str(i): i for i in classes}}


def export_vjepa2(checkpoint: Checkpoint) -> Export:
    m = checkpoint.model
    p = checkpoint.predictor
    if p is None or checkpoint.query is None:
        raise UserError("transformers' VJEPA2Model has a predictor; this checkpoint has none")
    check_predictor(p, "rope", embed_bias=True)
    if p["out"] != m["dim"]:
        raise UserError(
            f"transformers' predictor gives the encoder's width {m['dim']}; this one gives {p['out']}"
        )
    hf_config = {
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
        "mlp_ratio": floor_safe_ratio(m["mlp_ratio"], m["dim"]),
        "layer_norm_eps": m["eps"],
        "qkv_bias": True,
        "hidden_act": "gelu",
        "pred_hidden_size": p["width"],
        "pred_num_attention_heads": p["heads"],
        "pred_num_hidden_layers": p["depth"],
        "pred_num_mask_tokens": len(checkpoint.query),
        "pred_mlp_ratio": floor_safe_ratio(p["mlp_ratio"], p["width"]),
    }
    prefixes = {"patch_embed.proj": "encoder.embeddings.patch_embeddings.proj", "norm": "encoder.layernorm"}
    weights = rename_to_hf(checkpoint.encoder, "encoder.layer", VJEPA2_BLOCK, prefixes)
    prefixes = {
        "embed": "predictor.embeddings.predictor_embeddings",
        "norm": "predictor.layernorm",
        "proj": "predictor.proj",
    }
    weights |= rename_to_hf(checkpoint.predictor_weights, "predictor.layer", VJEPA2_BLOCK, prefixes)
    weights["predictor.embeddings.mask_tokens"] = checkpoint.query[:, None, None]
    if checkpoint.head:
        head, head_config = export_vjepa2_head(checkpoint)
        weights = {f"vjepa2.{k}": v for k, v in weights.items()} | head
        hf_config |= head_config
    return weights, hf_config


def export_vjepa2_head(checkpoint: Checkpoint) -> Export:
    heads = checkpoint.model["heads"]
    if "query_tokens" not in checkpoint.head or checkpoint.head_heads != heads:
        raise UserError(f"transformers' V-JEPA 2 has an attentive head of {heads} heads; this one is another")
    hf_config = {
        "architectures": ["VJEPA2ForVideoClassification"],
        "num_pooler_layers": len({k.split(".")[1] for k in checkpoint.head if k.startswith("blocks.")}),
        **numbered_labels(checkpoint),
    }
    cross = "pooler.cross_attention_layer"
    prefixes = {
        "query_tokens": "pooler.query_tokens",
        "norm": f"{cross}.layer_norm",
        "mlp": f"{cross}.mlp",
        "linear": "classifier",
    }
    prefixes |= {f"xattn.{letter}": f"{cross}.cross_attn.{letter}_proj" for letter in "qkv"}
    layers = "pooler.self_attention_layers"
    return rename_to_hf(checkpoint.head, layers, VJEPA2_POOLER_BLOCK, prefixes), hf_config


def floor_safe_ratio(mlp_ratio: float, dim: int) -> float:
    """A ratio for which int(dim * ratio), as transformers computes it, is the hidden width round(dim *
    mlp_ratio)."""
    if int(dim * mlp_ratio) == round(dim * mlp_ratio):
        return mlp_ratio
    return math.nextafter(mlp_ratio, math.inf)


def check_predictor(predictor: dict[str, Any], positions: str, embed_bias: bool) -> None:
    """Raises UserError if transformers' predictor lacks an option of this one."""
    same_positions = predictor.get("positions", "sincos_uniform") == positions
    same_bias = predictor.get("embed_bias", True) == embed_bias
    unsupported = (
        predictor.get("modality")
        or predictor.get("context_head")
        or predictor.get("class_token", "none") != "none"
        or predictor.get("mlp", "gelu") != "gelu"
    )
    if not same_positions or not same_bias or unsupported:
        raise UserError(
            f"transformers' predictor has positions {positions}, embed_bias {embed_bias} and no other "
            "options; this one differs"
        )

"""Public checkpoints -> our modules: which format a file has, every key accounted for."""

import argparse
import json
import re
from collections import OrderedDict
from pathlib import Path, PosixPath
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.model.heads import HEAD_EPS, AttentiveHead
from vidssl.pretrained.infer_config import Checkpoint, check_ranks, check_shapes, describe, make_head
from vidssl.pretrained.key_maps import (
    ATTENTIVE,
    HUGGING_FACE,
    JEPA,
    MAE,
    VIDEOMAE,
    VIDEOMAE_FINETUNED,
    RenamedTensors,
    Rules,
    rename,
)


def read_public(where: str, **given: Any) -> Checkpoint:
    """A file or a Hugging Face folder. given: arguments of Encoder that the file does not say, and predictor_heads."""
    path = Path(where)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        return read_folder(path, given)
    return read_state(unwrap(load_state_file(path), str(path)), str(path), given)


def load_state_file(path: Path) -> dict[str, Any]:
    """The content of a file, weights only: nothing in it is executed."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    harmless: list[Any] = [argparse.Namespace, OrderedDict, PosixPath, np.dtype, np.ndarray]
    harmless += [type(np.dtype(t)) for t in ("float32", "float64", "int64", "bool")]
    for home in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
        harmless += [(scalar, f"{home}.multiarray.scalar"), (array, f"{home}.multiarray._reconstruct")]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as e:
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise UserError(
                f"{path}: refused, it would run code ({code[1]}); save it again as plain tensors"
            ) from None
        raise UserError(
            f"{path}: not a readable checkpoint (no weights in a form that torch knows)"
        ) from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError, SafetensorError) as e:
        raise UserError(f"{path}: not a readable checkpoint ({' '.join(str(e).split())[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def unwrap(content: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The state dict inside, one flat dictionary; of the JEPA family `encoder.`, `predictor.`, `target_encoder.`."""
    jepa = [
        p
        for p in ("target_encoder", "ema_encoder", "encoder", "predictor")
        if isinstance(content.get(p), dict)
    ]
    if jepa:
        flat = {}
        for select_subtree in jepa:
            for key, value in content[select_subtree].items():
                flat[f"{select_subtree}.{re.sub(r'^(module[.])?(backbone[.])?', '', key)}"] = value
        return flat
    for name in ("model", "module", "model_state", "state_dict"):
        if isinstance(content.get(name), dict):
            return unwrap(content[name], where)
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{where}: no weights in it; its keys are {', '.join(map(str, list(content)[:6]))}")
    return {re.sub(r"^module[.]", "", k): v for k, v in tensors.items()}


def read_state(state: dict[str, Tensor], where: str, given: dict[str, Any]) -> Checkpoint:
    """A state dict of one of the official implementations; `where` names it in errors."""
    name, rules = detect(state, where, given)
    if rules is not JEPA:
        return describe(rename(state, rules, where), name, where, given)
    # The momentum encoder is the evaluated one; the trained one comes beside it. A distilled model has its own average
    # (ema_encoder), and then target_encoder is the teacher.
    encoders = {
        p: select_subtree(state, p)
        for p in ("ema_encoder", "target_encoder", "encoder")
        if select_subtree(state, p)
    }
    predictor = {k: v for k, v in state.items() if k.startswith("predictor.")}
    found = {
        p: describe(
            canonicalise(rename({**encoder, **predictor}, JEPA, where), name, given), name, where, given
        )
        for p, encoder in encoders.items()
        if p != "target_encoder" or "ema_encoder" not in encoders
    }
    evaluated, *online = found.values()
    evaluated.online = online[0].encoder if online else None
    evaluated.unused += [k for k in state if "ema_encoder" in found and k.startswith("target_encoder.")]
    return evaluated


def select_subtree(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One of the encoders of a JEPA state dict, as `encoder.*`."""
    return {f"encoder.{k[len(name) + 1 :]}": v for k, v in state.items() if k.startswith(f"{name}.")}


def detect(state: dict[str, Tensor], where: str, given: dict[str, Any]) -> tuple[str, Rules]:
    """The format that a state dict has, and its rules."""
    kernel = state.get("patch_embed.proj.weight")
    if any("embeddings.patch_embeddings." in k for k in state):
        raise UserError(
            f"{where}: a file of transformers; give the folder that it lies in, with its config.json"
        )
    if "encoder_to_decoder.weight" in state:
        return "VideoMAE", VIDEOMAE
    if any(k.startswith(("encoder.", "target_encoder.", "ema_encoder.")) for k in state):
        return detect_jepa(state, where, given), JEPA
    if any(k.startswith("pooler.") for k in state):
        raise UserError(f"{where}: the head of a probe, without an encoder")
    if kernel is None:
        raise UserError(f"{where}: no known format; its keys begin with {', '.join(list(state)[:3])}")
    if kernel.ndim == 4:
        return ("MAE" if "decoder_embed.weight" in state else "ViT"), MAE
    if any(k.endswith("attn.q.weight") for k in state):
        return "MAE-ST", MAE
    return "VideoMAE", VIDEOMAE_FINETUNED


def detect_jepa(state: dict[str, Tensor], where: str, given: dict[str, Any]) -> str:
    """I-JEPA, V-JEPA, V-JEPA 2 or V-JEPA 2.1."""
    kernel = next((v for k, v in state.items() if k.endswith("encoder.patch_embed.proj.weight")), None)
    if kernel is None:
        raise UserError(f"{where}: a predictor without an encoder")
    if kernel.ndim == 4:
        return "I-JEPA"
    if any(".norms_block." in k for k in state):
        return "V-JEPA 2.1"
    tokens = sum(k.startswith("predictor.mask_tokens.") for k in state)
    table = any(k.endswith("pos_embed") for k in state)
    if not table or tokens > 2 or str(given.get("positions")).startswith("rope"):
        return "V-JEPA 2"
    if tokens or "positions" in given:
        return "V-JEPA"
    raise UserError(
        f"{where}: V-JEPA, or V-JEPA 2 with a stale pos_embed? The predictor would tell; give positions=sincos_uniform "
        f"(V-JEPA) or positions=rope (V-JEPA 2)"
    )


def canonicalise(r: RenamedTensors, name: str, given: dict[str, Any]) -> RenamedTensors:
    """SwiGLU's three layers in timm's names; V-JEPA 2.1's four norms; positions that rotary models do not use."""
    swiglu = {"fc1": "fc1_g", "fc2": "fc1_x", "fc3": "fc2"}
    for select_subtree in ("encoder", "predictor"):
        if f"{select_subtree}.blocks.0.mlp.fc3.weight" in r.tensors:
            for key in [k for k in r.tensors if re.match(rf"{select_subtree}\.blocks\.\d+\.mlp\.", k)]:
                new = re.sub(r"mlp\.(fc\d)", lambda m: f"mlp.{swiglu[m[1]]}#", key)
                r.tensors[new], r.origin[new] = r.tensors.pop(key), r.origin[key]
    for key in [k for k in r.tensors if "#" in k]:
        r.tensors[key.replace("#", "")], r.origin[key.replace("#", "")] = r.tensors.pop(key), r.origin[key]
    if name in ("V-JEPA 2", "V-JEPA 2.1") and str(given.get("positions", "rope")).startswith("rope"):
        for table in ("encoder.table", "predictor.table"):
            if table in r.tensors:
                r.unused.append(r.origin[table])
                del r.tensors[table]
    if name == "V-JEPA 2.1":
        norms = [int(k.split(".")[2]) for k in r.tensors if k.startswith("encoder.level_norms.")]
        one_level = "predictor.embed.weight" in r.tensors
        for key in [k for k in r.tensors if k.startswith("encoder.level_norms.")]:
            if key.startswith(f"encoder.level_norms.{max(norms)}."):
                new = key.replace(f"level_norms.{max(norms)}", "norm")
                r.tensors[new], r.origin[new] = r.tensors.pop(key), r.origin[key]
            elif one_level:  # the distilled models have the other norms and never use them
                r.unused.append(r.origin[key])
                del r.tensors[key]
    return r


def read_folder(path: Path, given: dict[str, Any]) -> Checkpoint:
    """A folder with config.json, as Hugging Face's hub serves it: transformers' models, and ViTs of timm."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: neither encoder.safetensors nor config.json in it")
    c = read_json(path / "config.json")
    state: dict[str, Any] = {}
    for file in weight_files(path):
        state |= load_state_file(file)
    if "architecture" in c:
        pixels = {k: v for k, v in c.get("pretrained_cfg", {}).items() if k in ("mean", "std")}
        return describe(rename(state, MAE, str(path)), "ViT", str(path), {**pixels, **given})
    names = {"videomae": "VideoMAE", "vjepa2": "V-JEPA 2", "ijepa": "I-JEPA", "vit_mae": "MAE"}
    kind = c.get("model_type")
    if kind not in names:
        raise UserError(f"{path}: model_type {kind!r}; known are {', '.join(names)} and ViTs of timm")
    if c.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path}: hidden_act {c['hidden_act']!r}; only 'gelu' is known here")
    try:
        said = hf_config_to_kwargs(c, kind)
    except KeyError as e:
        raise UserError(f"{path}/config.json: {e} is missing") from None
    if (path / "preprocessor_config.json").is_file():
        pre = read_json(path / "preprocessor_config.json")
        said |= {"mean": pre["image_mean"], "std": pre["image_std"]} if "image_mean" in pre else {}
    r = rename(state, HUGGING_FACE, str(path))
    if kind in ("ijepa", "vit_mae"):  # a classifier of images
        for key in [k for k in r.tensors if k.startswith("head.")]:
            r.unused.append(r.origin[key])
            del r.tensors[key]
    return describe(r, names[kind], str(path), {**said, **given})


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None


def weight_files(path: Path) -> list[Path]:
    """The one file of weights in a folder, or all that its index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            names = sorted(set(read_json(path / f"{name}.index.json").get("weight_map", {}).values()))
            if missing := [n for n in names if not (path / n).is_file()]:
                raise UserError(f"{path}: {name}.index.json names {missing[0]}, which is not there")
            return [path / n for n in names]
    raise UserError(f"{path}: no model.safetensors or pytorch_model.bin in it")


def hf_config_to_kwargs(c: dict[str, Any], kind: str) -> dict[str, Any]:
    """What the config.json of transformers says of a model, in our words."""
    said: dict[str, Any] = {"heads": c["num_attention_heads"], "eps": c.get("layer_norm_eps", 1e-12)}
    if kind == "vjepa2":
        said |= {
            "positions": "rope",
            "frames": c["frames_per_clip"],
            "height": c["crop_size"],
            "width": c["crop_size"],
        }
        return said | {"predictor_heads": c["pred_num_attention_heads"], "head_eps": said["eps"]}
    size = c["image_size"] if isinstance(c["image_size"], list) else [c["image_size"]] * 2
    said |= {"frames": c.get("num_frames", 1), "height": size[0], "width": size[1]}
    said |= (
        {"head_eps": 1e-5} if kind == "videomae" else {}
    )  # transformers' fc_norm; the official code's is 1e-6
    return said | (
        {"predictor_heads": c["decoder_num_attention_heads"]} if "decoder_num_attention_heads" in c else {}
    )


def read_attentive(state: dict[str, Tensor], heads: int, where: str) -> AttentiveHead:
    """The head of a published probe (its `classifier`, or one of its `classifiers`), keys without `module.`."""
    r = rename(state, ATTENTIVE, where)
    check_ranks(r, where)
    weights = {k.removeprefix("head."): v.float() for k, v in r.tensors.items()}
    if "linear.weight" not in weights or "query_tokens" not in weights:
        raise UserError(f"{where}: not an attentive head (no query_tokens, or no last layer)")
    check_shapes(lambda: make_head(weights, heads, HEAD_EPS), weights, "head.", r, where)
    return Checkpoint("probe", {}, {}, head=weights, head_heads=heads).build_head()  # type: ignore[return-value]

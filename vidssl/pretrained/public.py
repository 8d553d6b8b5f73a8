"""Reads published checkpoints: detects the format of a file and accounts for every key."""

import argparse
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from pathlib import Path, PosixPath
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import read_json_object
from vidssl.model.heads import HEAD_EPS, AttentiveHead
from vidssl.pretrained.content import check_content
from vidssl.pretrained.infer_config import (
    Checkpoint,
    build_head,
    check_ranks,
    check_shapes,
    infer_checkpoint,
)
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
from vidssl.pretrained.sources import check_source

JEPA_ENCODERS = ("ema_encoder", "target_encoder", "encoder")  # the first that a file contains is evaluated


def read_public(source: str, **overrides: Any) -> Checkpoint:
    """Reads a file or a Hugging Face folder.

    overrides: arguments of Encoder that the file does not contain, and predictor_heads, head_eps, mean, std.
    """
    path = Path(source)
    check_source(source)
    if path.is_dir():
        return read_hf_folder(path, overrides)
    state = unwrap_state_dict(load_state_file(path), str(path))
    return checkpoint_from_state(state, str(path), overrides)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises UserError if they do not have the hash in its header."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_content(path, tensors, file.metadata())
    return tensors


def load_state_file(path: Path) -> dict[str, Any]:
    """The content of a weight file; torch files are read weights-only, so that nothing in them is
    executed."""
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        with torch.serialization.safe_globals(_harmless_globals()):
            placeholders = _placeholders(path)
        with torch.serialization.safe_globals(_harmless_globals() + placeholders):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as e:
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise UserError(
                f"{path}: refused, it would run code ({code[1]}); save it again as plain tensors"
            ) from None
        reason = re.search(r"[Ee]rror: (.{1,200})", str(e))
        cause = reason[1] if reason else "torch cannot read it safely; save its weights alone"
        raise UserError(f"{path}: not a readable checkpoint ({cause})") from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError, SafetensorError) as e:
        raise UserError(f"{path}: not a readable checkpoint ({' '.join(str(e).split())[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _harmless_globals() -> list[Any]:
    """Classes that published checkpoints contain beside tensors: arguments, paths, NumPy scalars and
    arrays."""
    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(0).__reduce__()[0]
    harmless: list[Any] = [
        argparse.Namespace,
        OrderedDict,
        PosixPath,
        np.dtype,
        np.ndarray,
    ]
    harmless += [value for name, value in vars(np.dtypes).items() if name.endswith("DType")]
    for package in ("numpy.core", "numpy._core"):  # their names in NumPy 1 and 2
        harmless += [(scalar, f"{package}.multiarray.scalar"), (array, f"{package}.multiarray._reconstruct")]
    return harmless


class Placeholder:
    """Stands for an object of a class that is not ours: it accepts what pickle gives it and does nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Of the standard library, only data; os.system and its like are refused, not read as placeholders.
DATA_MODULES = {"argparse", "collections", "datetime", "decimal", "enum", "fractions", "pathlib", "random"}
DATA_MODULES |= {"types", "typing", "uuid", "zoneinfo"}
DATA_BUILTINS = {"list", "dict", "set", "frozenset", "tuple", "slice", "range", "complex", "object"}
DATA_BUILTINS |= {"int", "float", "str", "bool", "bytes", "bytearray"}


def _placeholders(path: Path) -> list[Any]:
    """A Placeholder for each class of data and of packages other than the standard library in a torch file,
    so that configurations, meters or random states beside the weights do not keep them from being read."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6, which torch cannot list
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    inert = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        # Protocol 2 writes Python 2's names: commands for subprocess.
        module = IMPORT_MAPPING.get(module, module)
        if module == "builtins":
            is_inert = attribute in DATA_BUILTINS
        else:
            package = module.split(".")[0]
            is_inert = package not in sys.stdlib_module_names or package in DATA_MODULES
        if is_inert:
            inert.append((type(attribute, (Placeholder,), {}), name))
    return inert


# Parts of a name that DataParallel, DDP, torch.compile, FSDP and checkpointing put anywhere into it.
WRAPPERS = r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
# Attributes that hold the whole network; removed where every key begins with it.
HOLDERS = ("backbone", "model", "net", "network", "trunk", "ema_model", "teacher", "student", "online", "ema")
# Entries that hold a state dict; the first that a file contains is read.
CONTAINERS: tuple[str, ...] = (
    "model",
    "module",
    "model_state",
    "model_state_dict",
    "state_dict",
    "network",
    "net",
    "weights",
)
CONTAINERS += ("teacher", "ema_state_dict", "model_ema", "state_dict_ema", "student")


def unwrap_state_dict(content: dict[str, Any], source: str) -> dict[str, Tensor]:
    """The state dict inside a file as one flat dictionary; the JEPA family's networks get the prefixes
    `encoder.`, `predictor.`, `target_encoder.` and `ema_encoder.`.

    Names of wrappers and of attributes that hold the whole network are removed, in any order and number.
    Raises UserError if that makes two keys one, or if there are no weights.
    """
    networks = [n for n in (*JEPA_ENCODERS, "predictor") if isinstance(content.get(n), dict)]
    if networks:
        return {
            f"{network}.{key}": value
            for network in networks
            for key, value in strip_wrappers(content[network], source).items()
        }
    for name in CONTAINERS:
        if isinstance(content.get(name), dict):
            return unwrap_state_dict(content[name], source)
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{source}: no weights in it; its keys are {', '.join(map(str, list(content)[:6]))}")
    return strip_wrappers(tensors, source)


def strip_wrappers(state: dict[str, Any], source: str) -> dict[str, Any]:
    """The same values under the names of the bare network, whatever it was wrapped in."""
    names = {key: re.sub(WRAPPERS, "", key) for key in state}
    while len(first := {name.partition(".")[0] for name in names.values()}) == 1 and first <= {*HOLDERS}:
        names = {key: name.partition(".")[2] for key, name in names.items()}
    origin: dict[str, str] = {}
    for key, name in names.items():
        if name in origin:
            raise UserError(f"{source}: '{key}' and '{origin[name]}' are the same weight; which is right?")
        origin[name] = key
    return {name: state[key] for name, key in origin.items()}


def checkpoint_from_state(state: dict[str, Tensor], source: str, overrides: dict[str, Any]) -> Checkpoint:
    """Converts a state dict of one of the official implementations; `source` names it in error messages."""
    name, rules = detect_format(state, source, overrides)
    if rules is not JEPA:
        return infer_checkpoint(rename(state, rules, source), name, source, overrides)
    # The EMA encoder is evaluated, and the trained one is kept beside it. A distilled model has its own
    # average (ema_encoder), and there target_encoder is the teacher.
    encoders = {n: weights for n in JEPA_ENCODERS if (weights := select_encoder(state, n))}
    has_own_average = "ema_encoder" in encoders
    if has_own_average:
        encoders.pop("target_encoder", None)
    predictor = {k: v for k, v in state.items() if k.startswith("predictor.")}
    checkpoints = []
    for encoder in encoders.values():
        renamed = canonicalise(rename({**encoder, **predictor}, JEPA, source), name, overrides)
        checkpoints.append(infer_checkpoint(renamed, name, source, overrides))
    evaluated, *online = checkpoints
    evaluated.online = online[0].encoder if online else None
    if has_own_average:
        evaluated.unused += [k for k in state if k.startswith("target_encoder.")]
    return evaluated


def select_encoder(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One of the encoders of a JEPA state dict, with the prefix `encoder.`."""
    return {f"encoder.{k[len(name) + 1 :]}": v for k, v in state.items() if k.startswith(f"{name}.")}


def detect_format(state: dict[str, Tensor], source: str, overrides: dict[str, Any]) -> tuple[str, Rules]:
    """The name of a state dict's format, and its rules."""
    kernel = state.get("patch_embed.proj.weight")
    if any("embeddings.patch_embeddings." in k for k in state):
        raise UserError(f"{source}: a file of transformers; give its folder, with its config.json")
    if "encoder_to_decoder.weight" in state:
        return "VideoMAE", VIDEOMAE
    if any(k.startswith(("encoder.", "target_encoder.", "ema_encoder.")) for k in state):
        return detect_jepa(state, source, overrides), JEPA
    if any(k.startswith("pooler.") for k in state):
        raise UserError(f"{source}: the head of a probe, without an encoder")
    if kernel is None:
        raise UserError(f"{source}: no known format; its keys begin with {', '.join(list(state)[:3])}")
    if kernel.ndim == 4:
        return ("MAE" if "decoder_embed.weight" in state else "ViT"), MAE
    if any(k.endswith("attn.q.weight") for k in state):
        return "MAE-ST", MAE
    return "VideoMAE", VIDEOMAE_FINETUNED


def detect_jepa(state: dict[str, Tensor], source: str, overrides: dict[str, Any]) -> str:
    """I-JEPA, V-JEPA, V-JEPA 2 or V-JEPA 2.1."""
    kernel = next((v for k, v in state.items() if k.endswith("encoder.patch_embed.proj.weight")), None)
    if kernel is None:
        raise UserError(f"{source}: a predictor without an encoder")
    if kernel.ndim == 4:
        return "I-JEPA"
    if any(".norms_block." in k for k in state):
        return "V-JEPA 2.1"
    mask_tokens = sum(k.startswith("predictor.mask_tokens.") for k in state)
    has_table = any(k.endswith("pos_embed") for k in state)
    if not has_table or mask_tokens > 2 or str(overrides.get("positions")).startswith("rope"):
        return "V-JEPA 2"
    if mask_tokens or "positions" in overrides:
        return "V-JEPA"
    raise UserError(
        f"{source}: V-JEPA, or V-JEPA 2 with an unused pos_embed: without a predictor the file does not "
        f"tell; give positions=sincos_uniform (V-JEPA) or positions=rope (V-JEPA 2)"
    )


def canonicalise(renamed: RenamedTensors, name: str, overrides: dict[str, Any]) -> RenamedTensors:
    """Moves SwiGLU's three layers to timm's names, drops tables that rotary models do not use, and moves the
    last of V-JEPA 2.1's level norms to `norm`."""
    _rename_swiglu(renamed)
    if name in ("V-JEPA 2", "V-JEPA 2.1") and str(overrides.get("positions", "rope")).startswith("rope"):
        for table in ("encoder.table", "predictor.table"):
            renamed.drop(table)
    if name == "V-JEPA 2.1":
        _settle_level_norms(renamed)
    return renamed


def _rename_swiglu(renamed: RenamedTensors) -> None:
    timm_names = {"fc1": "fc1_g", "fc2": "fc1_x", "fc3": "fc2"}
    for network in ("encoder", "predictor"):
        if f"{network}.blocks.0.mlp.fc3.weight" not in renamed.tensors:
            continue
        layers = [k for k in renamed.tensors if re.match(rf"{network}\.blocks\.\d+\.mlp\.", k)]
        renamed.move({k: re.sub(r"mlp\.(fc\d)", lambda m: f"mlp.{timm_names[m[1]]}", k) for k in layers})


def _settle_level_norms(renamed: RenamedTensors) -> None:
    """The norm of the last level is `norm`; the distilled models contain the other norms and never use
    them."""
    norms = [k for k in renamed.tensors if k.startswith("encoder.level_norms.")]
    last = max((int(k.split(".")[2]) for k in norms), default=-1)
    one_level = "predictor.embed.weight" in renamed.tensors
    renamed.move({k: k.replace(f"level_norms.{last}", "norm") for k in norms if k.split(".")[2] == str(last)})
    for key in norms if one_level else ():
        renamed.drop(key)


HF_FORMATS = {"videomae": "VideoMAE", "vjepa2": "V-JEPA 2", "ijepa": "I-JEPA", "vit_mae": "MAE"}


def read_hf_folder(path: Path, overrides: dict[str, Any]) -> Checkpoint:
    """A folder with config.json, as Hugging Face's hub serves it: models of transformers, and ViTs of
    timm."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: neither encoder.safetensors nor config.json in it")
    hf_config = load_json(path / "config.json")
    state: dict[str, Any] = {}
    for file in weight_files(path):
        state |= load_state_file(file)
    if "architecture" in hf_config:
        pixels = {k: v for k, v in hf_config.get("pretrained_cfg", {}).items() if k in ("mean", "std")}
        return infer_checkpoint(rename(state, MAE, str(path)), "ViT", str(path), {**pixels, **overrides})
    kind = hf_config.get("model_type")
    if kind not in HF_FORMATS:
        raise UserError(f"{path}: model_type {kind!r}; known are {', '.join(HF_FORMATS)} and ViTs of timm")
    if hf_config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path}: hidden_act {hf_config['hidden_act']!r}; only 'gelu' is supported")
    try:
        arguments = hf_config_to_arguments(hf_config, kind)
    except KeyError as e:
        raise UserError(f"{path}/config.json: {e} is missing") from None
    if (path / "preprocessor_config.json").is_file():
        preprocessor = load_json(path / "preprocessor_config.json")
        if "image_mean" in preprocessor:
            arguments |= {"mean": preprocessor["image_mean"], "std": preprocessor["image_std"]}
    renamed = rename(state, HUGGING_FACE, str(path))
    if kind in ("ijepa", "vit_mae"):  # drop a classifier of images
        for key in [k for k in renamed.tensors if k.startswith("head.")]:
            renamed.drop(key)
    return infer_checkpoint(renamed, HF_FORMATS[kind], str(path), {**arguments, **overrides})


def load_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "download or write it again")


def weight_files(path: Path) -> list[Path]:
    """The one weight file of a folder, or all files that its index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            names = sorted(set(load_json(path / f"{name}.index.json").get("weight_map", {}).values()))
            if missing := [n for n in names if not (path / n).is_file()]:
                raise UserError(f"{path}: {name}.index.json names {missing[0]}, which is not there")
            return [path / n for n in names]
    raise UserError(f"{path}: no model.safetensors or pytorch_model.bin in it")


def hf_config_to_arguments(hf_config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Translates the config.json of transformers to arguments of Encoder and of infer_checkpoint."""
    eps = hf_config.get("layer_norm_eps", 1e-12)
    arguments: dict[str, Any] = {"heads": hf_config["num_attention_heads"], "eps": eps}
    if kind == "vjepa2":
        size = hf_config["crop_size"]
        arguments |= {"frames": hf_config["frames_per_clip"], "height": size, "width": size}
        arguments |= {"predictor_heads": hf_config["pred_num_attention_heads"], "head_eps": eps}
        return arguments | {"positions": "rope"}
    size = hf_config["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    arguments |= {"frames": hf_config.get("num_frames", 1), "height": height, "width": width}
    if kind == "videomae":  # transformers' fc_norm has 1e-5; the official code's has 1e-6
        arguments["head_eps"] = 1e-5
    if "decoder_num_attention_heads" in hf_config:
        arguments["predictor_heads"] = hf_config["decoder_num_attention_heads"]
    return arguments


def read_attentive_head(state: dict[str, Tensor], heads: int, source: str) -> AttentiveHead:
    """The head of a published probe: its `classifier`, or one of its `classifiers`, with keys without
    `module.`."""
    renamed = rename(state, ATTENTIVE, source)
    check_ranks(renamed, source)
    weights = {k.removeprefix("head."): v.float() for k, v in renamed.tensors.items()}
    if "linear.weight" not in weights or "query_tokens" not in weights:
        raise UserError(f"{source}: not an attentive head (no query_tokens, or no last layer)")
    check_shapes(lambda: build_head(weights, heads, HEAD_EPS), weights, "head.", renamed, source)
    head = build_head(weights, heads, HEAD_EPS)
    head.load_state_dict(weights)
    assert isinstance(head, AttentiveHead)
    return head

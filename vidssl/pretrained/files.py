"""Our own files: safetensors whose header says what they are. A run folder and a converted checkpoint look the same.

encoder.safetensors (the evaluated one), encoder_online.safetensors (the trained one, where that is another),
predictor.safetensors (predictor and mask tokens), head.safetensors (a classifier).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidssl import config
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write
from vidssl.model.vit import Encoder
from vidssl.pretrained import load
from vidssl.pretrained.infer_config import Checkpoint

SIZES = ("frames", "height", "width")  # of a native clip


class LoadedEncoder(NamedTuple):
    """An encoder, and what it was trained with."""

    encoder: Encoder
    about: dict[
        str, Any
    ]  # model (arguments of Encoder), pixels (mean, std); of our own runs config, data, step, too


def save(folder: Path, found: Checkpoint, about: dict[str, Any]) -> None:
    """Every part of a checkpoint into its file, with `about`, the model and the input's statistics in the headers."""
    about = header(found, about)
    save_weights(folder / "encoder.safetensors", found.encoder, about)
    if found.online is not None:
        save_weights(folder / "encoder_online.safetensors", found.online, about)
    if found.predictor is not None and found.query is not None:
        weights = {f"predictor.{k}": v for k, v in found.predictor_weights.items()} | {
            "query.tokens": found.query
        }
        save_weights(folder / "predictor.safetensors", weights, {**about, "predictor": found.predictor})
    if found.head:
        head = {"heads": found.head_heads, "eps": found.head_eps}
        save_weights(folder / "head.safetensors", found.head, {**about, "head": head})


def header(found: Checkpoint, about: dict[str, Any]) -> dict[str, Any]:
    """What the file of an encoder says of itself."""
    return {**about, "model": found.model, "pixels": found.pixels}


def read(where: str, **given: Any) -> tuple[Checkpoint, dict[str, Any]]:
    """A run folder, a .safetensors file of ours, or a public checkpoint -> the checkpoint, and its header.

    given: what a public file does not say, see public.read.
    """
    path = Path(where)
    main = path / "encoder.safetensors" if path.is_dir() else path
    if not main.is_file() or main.suffix != ".safetensors" or not is_ours(main):
        found = load.read(where, **given)
        return found, {"source": found.format}
    if given:
        raise UserError(f"{main}: says what it is; {', '.join(given)} cannot be given")
    weights, about = load_weights(main)
    if "model" not in about or "pixels" not in about:
        raise UserError(f"{main}: is not an encoder")
    found = Checkpoint("vidssl", about["model"], weights, about["pixels"])
    if path.is_dir() and (online := path / "encoder_online.safetensors").is_file():
        found.online = load_weights(online)[0]
    if path.is_dir() and (predictor := path / "predictor.safetensors").is_file():
        parts, header = load_weights(predictor)
        found.predictor, found.query = header["predictor"], parts.pop("query.tokens")
        found.predictor_weights = {k.removeprefix("predictor."): v for k, v in parts.items()}
    if path.is_dir() and (head := path / "head.safetensors").is_file():
        found.head, header = load_weights(head)
        found.head_heads, found.head_eps = header["head"]["heads"], header["head"]["eps"]
    return found, about


def is_ours(path: Path) -> bool:
    """Whether a .safetensors file has our header; timm and Hugging Face write the same container."""
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return b'"vidssl"' in f.read(min(size, 1 << 24))


def load_encoder(where: str, random_init: int | None = None) -> LoadedEncoder:
    """See `read`; random_init: a seed, for the same encoder untrained."""
    found, about = read(where)
    if random_init is not None:
        torch.manual_seed(random_init)
    try:
        encoder = make_encoder(found.model)
        if random_init is None:
            encoder.load_state_dict(found.encoder)
    except (KeyError, TypeError, RuntimeError) as e:
        why = " ".join(str(e).split())
        raise UserError(f"{where}: its weights are not those its header describes ({why})") from None
    return LoadedEncoder(
        encoder.eval().requires_grad_(False), {**about, "model": found.model, "pixels": found.pixels}
    )


def make_encoder(model: dict[str, Any]) -> Encoder:
    """model: arguments of Encoder, as they stand in a header."""
    options = {k: v for k, v in model.items() if k not in SIZES}
    return config.build(options, Encoder, **{k: model[k] for k in SIZES})


def as_video(found: Checkpoint, frames: int, tubelet: int) -> Checkpoint:
    """An image encoder as the start of a video encoder, which on a still clip of one tubelet computes the same.

    The kernel is repeated over the tubelet and divided by its length; places of the image become `learned_separable`
    places in space, with zero for time.
    """
    model = dict(found.model)
    if model["tubelet"] != 1 or model["frames"] != 1:
        raise UserError(f"this {found.format} checkpoint is of a video model already")
    if frames < tubelet or frames % tubelet:
        raise UserError(f"{frames} frames are not a multiple of the {tubelet} of one patch")
    kernel = found.encoder["patch_embed.proj.weight"]
    weights = {**found.encoder, "patch_embed.proj.weight": kernel.repeat(1, 1, tubelet, 1, 1) / tubelet}
    if model["positions"] in ("learned", "sincos_2d"):
        table: Tensor = weights.pop("positions.table", make_encoder(model).positions.table)
        weights["positions.space"] = table.clone()
        weights["positions.time"] = torch.zeros(frames // tubelet, table.shape[1])
        model["positions"] = "learned_separable"
    model |= {"frames": frames, "tubelet": tubelet}
    return Checkpoint(found.format, model, weights, found.pixels, unused=found.unused)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors; OSError if it cannot be written."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as e:
        raise OSError(f"{path.name}: {e}") from None


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
    """safetensors with `about` (JSON) in its header, so that the file alone says what it is."""
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    atomic_write(
        path, lambda beside: write_tensors(beside, plain, {"vidssl": json.dumps(about, sort_keys=True)})
    )


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (weights, about)."""
    try:
        with safe_open(path, "pt") as f:
            about = (f.metadata() or {}).get("vidssl")
            weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({e})") from None
    if about is None:
        raise UserError(f"{path}: not an encoder written by vidssl (no description in its header)")
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{path}: some of its weights are not finite: the run that wrote it had diverged")
    return weights, json.loads(about)

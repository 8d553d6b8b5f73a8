"""Loads encoders and checkpoints: the project's own files, or published checkpoints (see public.py)."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidssl import config
from vidssl.core.errors import UserError
from vidssl.model.schema import NATIVE_SIZE_KEYS
from vidssl.model.vit import Encoder
from vidssl.pretrained.files import encoder_file, is_native, read_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.public import read_public
from vidssl.pretrained.step_checkpoint import is_step_checkpoint, read_step_checkpoint


class LoadedEncoder(NamedTuple):
    """A frozen encoder and the metadata it was stored with."""

    encoder: Encoder
    metadata: dict[
        str, Any
    ]  # model (arguments of Encoder), pixels (mean, std); of own runs also config, data, step


def read_checkpoint_file(source: str, **overrides: Any) -> tuple[Checkpoint, dict[str, Any]]:
    """Reads a run folder, a step checkpoint or .safetensors file of ours, or a published checkpoint. Returns
    (checkpoint, metadata).

    overrides: facts that a published file does not contain, see public.read_public.
    """
    path = Path(source)
    if is_step_checkpoint(path):
        return read_step_checkpoint(path)
    if not is_native(path):
        checkpoint = read_public(source, **overrides)
        return checkpoint, {"source": checkpoint.format}
    if overrides:
        raise UserError(
            f"{encoder_file(path)}: describes its own model; {', '.join(overrides)} cannot be given"
        )
    return read_native(path)


def load_encoder(source: str | Path, random_init: int | None = None) -> LoadedEncoder:
    """Loads an encoder for evaluation: in eval mode, without gradients, on the CPU.

    source: a run folder, a step checkpoint or .safetensors file of ours, or a published checkpoint (V-JEPA,
    VideoMAE, MAE-ST, MAE, I-JEPA, a Hugging Face folder, a ViT of timm). random_init: a seed; the same
    architecture is returned untrained. Clips are f32 [B, 3, T, H, W], normalised with metadata["pixels"];
    features are f32 [B, N, D].
    """
    checkpoint, metadata = read_checkpoint_file(str(source))
    if random_init is not None:
        torch.manual_seed(random_init)
    try:
        encoder = build_encoder(checkpoint.model)
        if random_init is None:
            encoder.load_state_dict(checkpoint.encoder)
    except (KeyError, TypeError, RuntimeError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{source}: its weights do not fit the model in its header ({reason})") from None
    metadata = {**metadata, "model": checkpoint.model, "pixels": checkpoint.pixels}
    return LoadedEncoder(encoder.eval().requires_grad_(False), metadata)


def load_teacher(path: str) -> Encoder:
    """The frozen encoder that method.target.kind=teacher distils, with the statistics of its pixels."""
    encoder, metadata = load_encoder(path)
    encoder.pixels = (metadata["pixels"]["mean"], metadata["pixels"]["std"])
    return encoder


def build_encoder(model: dict[str, Any]) -> Encoder:
    """An encoder with fresh weights. model: arguments of Encoder, as in a header."""
    options = {k: v for k, v in model.items() if k not in NATIVE_SIZE_KEYS}
    return config.build_from_header(options, Encoder, **{k: model[k] for k in NATIVE_SIZE_KEYS})


def inflate_to_video(image: Checkpoint, frames: int, tubelet: int) -> Checkpoint:
    """Turns an image encoder into a video encoder that computes the same on a still clip of one tubelet.

    The patch kernel is repeated over the tubelet and divided by its length; the table of positions becomes
    the spatial part of `learned_separable` positions, whose temporal part is zero.
    """
    model = dict(image.model)
    if model["tubelet"] != 1 or model["frames"] != 1:
        raise UserError(f"this {image.format} checkpoint is already a video model")
    if frames < tubelet or frames % tubelet:
        raise UserError(f"{frames} frames are not a multiple of the tubelet of {tubelet}")
    kernel = image.encoder["patch_embed.proj.weight"]
    weights = {**image.encoder, "patch_embed.proj.weight": kernel.repeat(1, 1, tubelet, 1, 1) / tubelet}
    if model["positions"] in ("learned", "sincos_2d"):
        table: Tensor = weights.pop("positions.table", build_encoder(model).positions.table)
        weights["positions.space"] = table.clone()
        weights["positions.time"] = torch.zeros(frames // tubelet, table.shape[1])
        model["positions"] = "learned_separable"
    model |= {"frames": frames, "tubelet": tubelet}
    return Checkpoint(image.format, model, weights, image.pixels, unused=image.unused)

"""The project's own weight files: safetensors whose header describes the model. Run folders and converted
checkpoints have the same files.

encoder.safetensors (the evaluated encoder), encoder_online.safetensors (the trained one, where it is
another), predictor.safetensors (predictor and mask tokens), head.safetensors (a classifier).
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import MAX_HEADER_BYTES, atomic_write
from vidssl.pretrained.content import HASH_KEY, check_content, check_matrices, content_hash
from vidssl.pretrained.infer_config import Checkpoint

HEADER_KEY = "vidssl"  # of the safetensors metadata entry that holds our header


def save_native(folder: Path, checkpoint: Checkpoint, metadata: dict[str, Any]) -> None:
    """Writes every part of a checkpoint to its file; each header has `metadata`, the model and the pixel
    statistics."""
    header = native_header(checkpoint, metadata)
    save_weights(folder / "encoder.safetensors", checkpoint.encoder, header)
    if checkpoint.online is not None:
        save_weights(folder / "encoder_online.safetensors", checkpoint.online, header)
    if checkpoint.predictor is not None and checkpoint.query is not None:
        weights = {f"predictor.{name}": value for name, value in checkpoint.predictor_weights.items()}
        weights["query.tokens"] = checkpoint.query
        save_weights(folder / "predictor.safetensors", weights, {**header, "predictor": checkpoint.predictor})
    if checkpoint.head:
        head = {"heads": checkpoint.head_heads, "eps": checkpoint.head_eps}
        save_weights(folder / "head.safetensors", checkpoint.head, {**header, "head": head})


def native_header(checkpoint: Checkpoint, metadata: dict[str, Any]) -> dict[str, Any]:
    """The header of an encoder file."""
    return {**metadata, "model": checkpoint.model, "pixels": checkpoint.pixels}


def encoder_file(path: Path) -> Path:
    """The file that holds the encoder: `path` itself, or the one of that name in a folder."""
    return path / "encoder.safetensors" if path.is_dir() else path


def is_native(path: Path) -> bool:
    """Whether a file, or the encoder file of a folder, has our header; timm and Hugging Face use the same
    container."""
    file = encoder_file(path)
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    with open(file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return f'"{HEADER_KEY}"'.encode() in f.read(min(size, MAX_HEADER_BYTES))


def read_native(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """One encoder file, or a folder with all its parts. Returns (checkpoint, header of the encoder)."""
    weights, header = load_weights(encoder_file(path))
    if "model" not in header or "pixels" not in header:
        raise UserError(f"{encoder_file(path)}: is not an encoder")
    checkpoint = Checkpoint("vidssl", header["model"], weights, header["pixels"])
    if not path.is_dir():
        return checkpoint, header
    if (online := path / "encoder_online.safetensors").is_file():
        checkpoint.online = load_weights(online)[0]
    if (predictor := path / "predictor.safetensors").is_file():
        weights, predictor_header = load_weights(predictor)
        checkpoint.predictor = predictor_header["predictor"]
        checkpoint.query = weights.pop("query.tokens")
        checkpoint.predictor_weights = {k.removeprefix("predictor."): v for k, v in weights.items()}
    if (head := path / "head.safetensors").is_file():
        checkpoint.head, head_header = load_weights(head)
        checkpoint.head_heads = head_header["head"]["heads"]
        checkpoint.head_eps = head_header["head"]["eps"]
    return checkpoint, header


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with a hash of its content; raises OSError if it cannot be written."""
    try:
        save_file(tensors, path, {**(metadata or {}), HASH_KEY: content_hash(tensors)})
    except SafetensorError as e:
        raise OSError(f"{path.name}: {e}") from None


def save_weights(path: Path, weights: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes weights atomically as safetensors with `header` as JSON in the metadata, so that the file
    describes itself."""
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    metadata = {HEADER_KEY: json.dumps(header, sort_keys=True)}
    atomic_write(path, lambda temporary: write_tensors(temporary, plain, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (weights, header) of one of our files; raises UserError if a weight is not finite."""
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({e})") from None
    header = metadata.get(HEADER_KEY)
    if header is None:
        raise UserError(f"{path}: not an encoder written by vidssl (no description in its header)")
    check_content(path, weights, metadata)
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{path}: some of its weights are not finite: the run that wrote it had diverged")
    if HASH_KEY not in metadata:
        check_matrices(weights, str(path))
    return weights, json.loads(header)

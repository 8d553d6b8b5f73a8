"""The content of weight files: a hash that is written with it, and signs of damage where there is none."""

from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from vidssl.core.errors import UserError

HASH_KEY = "content_sha256"  # of the metadata entry of a safetensors file that holds the hash


def content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names."""
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_content(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    """Raises UserError unless the tensors have the hash that was written with them. Files of others have
    none."""
    written = (metadata or {}).get(HASH_KEY)
    if written is not None and content_hash(tensors) != written:
        raise UserError(
            f"{path}: damaged: its weights do not have the hash they were written with; "
            "write or copy the file again"
        )


def check_matrices(weights: dict[str, Tensor], source: str) -> None:
    """Raises UserError if a weight is not finite, or if a weight matrix of a block or of the patch embedding
    has one value everywhere: no training leaves that."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{source}: '{name}' is not finite: NaN or infinite values are among its weights")
        is_matrix = weight.ndim >= 2 and name.endswith(".weight") and weight.numel() > 1
        inner = name.startswith(("blocks.", "patch_embed."))
        if is_matrix and inner and bool((weight == weight.flatten()[0]).all()):
            value = float(weight.flatten()[0])
            raise UserError(f"{source}: '{name}' is {value:g} everywhere: damaged or not trained")

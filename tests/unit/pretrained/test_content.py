"""Weight files carry a hash of their content, and a damaged one is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidssl.core.errors import UserError
from vidssl.pretrained.content import HASH_KEY
from vidssl.pretrained.files import load_weights, save_weights
from vidssl.pretrained.public import load_safetensors

WEIGHTS = {"blocks.0.mlp.fc1.weight": torch.arange(12.0).reshape(3, 4), "norm.bias": torch.arange(12.0)}


def zeros(tensors, raw):
    return raw[:-96] + bytes(96)


def flipped(tensors, raw):
    return raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:]


def swapped(tensors, raw):
    return raw[:-96] + raw[-48:] + raw[-96:-48]


@pytest.mark.parametrize("damage", [zeros, flipped, swapped])
@pytest.mark.parametrize("read", [load_weights, load_safetensors])
def test_a_damaged_file_is_named(damage, read, tmp_path):
    path = tmp_path / "encoder.safetensors"
    weights = {**WEIGHTS, "norm.bias": torch.arange(12.0) + 1}
    save_weights(path, weights, {"step": 1})
    read(path)
    path.write_bytes(damage(weights, path.read_bytes()))
    with pytest.raises(UserError, match=r"encoder.safetensors: damaged: .* hash"):
        read(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_every_type_and_shape_has_a_hash(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(path, {"scalar": torch.ones((), dtype=dtype), "none": torch.ones(0, 3, dtype=dtype)}, {})
    assert load_weights(path)[0].keys() == {"scalar", "none"}


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_matrix_without_a_hash_is_an_error(value, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({**WEIGHTS, "blocks.0.mlp.fc1.weight": torch.full((3, 4), value)}, path, {"vidssl": "{}"})
    with pytest.raises(UserError, match=r"'blocks.0.mlp.fc1.weight' is 0(.5)? everywhere"):
        load_weights(path)
    save_file(WEIGHTS, path, {"vidssl": "{}"})
    assert load_weights(path)[0].keys() == load_file(path).keys()
    assert HASH_KEY not in load_weights(path)[1]

"""The public Python API: `vidssl.load_encoder`, `vidssl.Encoder`, `vidssl.__version__`."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import vidssl
from vidssl.core.errors import UserError
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint

MODEL = {"frames": 4, "height": 16, "width": 16, "dim": 24, "depth": 1, "heads": 2, "patch": 8}


def test_load_encoder(tmp_path):
    trained = vidssl.Encoder(**MODEL).eval()
    save_native(tmp_path, Checkpoint("vidssl", MODEL, trained.state_dict()), {"step": 3})
    video = torch.randn(2, 3, 4, 16, 16)
    encoder, metadata = vidssl.load_encoder(tmp_path)
    assert isinstance(encoder, vidssl.Encoder) and not encoder.training
    assert encoder(video).equal(trained(video)) and encoder(video).shape == (2, 8, 24)
    assert metadata["step"] == 3 and metadata["model"] == MODEL
    assert metadata["pixels"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    first, again = (vidssl.load_encoder(tmp_path, random_init=1).encoder(video) for _ in range(2))
    assert first.equal(again) and not first.equal(trained(video))


def test_load_encoder_of_another_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        vidssl.load_encoder(tmp_path / "nowhere")


def test_version_is_the_installed_one():
    assert vidssl.__version__ == version("vidssl")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vidssl.nothing


def test_the_api_imports_neither_accelerate_nor_transformers():
    code = "import sys, vidssl; vidssl.load_encoder, vidssl.Encoder; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("accelerate", "transformers", "deepspeed", "av"):
        assert f"'{name}'" not in modules, name

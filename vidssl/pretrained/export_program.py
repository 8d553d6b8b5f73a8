"""Exports an encoder as a program that runs without vidssl: torch.export (.pt2) or ONNX.

The program maps video f32 [batch, 3, T, H, W], normalised, to features f32 [batch, N, D], for any number of
clips and the native size. encoder.json beside it says the size, the statistics of pixels and the versions.
"""

import io
import json
import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import vidssl
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, fsync_path, make_folder
from vidssl.core.versions import version_of
from vidssl.model.vit import Encoder
from vidssl.pretrained.infer_config import Checkpoint

Program = Literal["torch", "onnx"]
FILES: dict[Program, str] = {"torch": "encoder.pt2", "onnx": "encoder.onnx"}
OPSET = 18  # of ONNX; onnxruntime 1.14 and later run it
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # the extra `export`
TRACED_BATCH, TRIED_BATCH = 2, 3  # clips of the example that is traced, and of the one that is compared
# of the features, which have a norm of their own; rounding of f32 gives 1e-6 to 1e-5
MAX_DIFFERENCE = 1e-3


class FeaturesOnly(nn.Module):
    """An encoder that takes nothing but clips."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, video: Tensor) -> Tensor:
        return self.encoder(video)


def check_program_packages(kind: Program) -> None:
    """Raises UserError if a package that the export needs is not installed."""
    if kind == "onnx" and (missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]):
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install 'vidssl[export]'")


def save_program(folder: Path, checkpoint: Checkpoint, kind: Program, source: str) -> dict[str, Any]:
    """Writes the program and encoder.json. Returns the content of the latter.

    Raises UserError if the written program does not compute what the encoder does. source: the checkpoint.
    """
    check_program_packages(kind)
    model = FeaturesOnly(checkpoint.build_encoder()).eval().requires_grad_(False)
    size = [checkpoint.model[name] for name in ("frames", "height", "width")]
    generator = torch.Generator().manual_seed(0)
    example, tried = (torch.randn(n, 3, *size, generator=generator) for n in (TRACED_BATCH, TRIED_BATCH))
    make_folder(folder)
    with torch.no_grad():
        # also makes tables of rotary positions, which are then constants of the program
        expected = model(tried)
        shapes = {"video": {0: torch.export.Dim("batch", min=1)}}
        exported = torch.export.export(model, (example,), dynamic_shapes=shapes)
        # Files of a program that ends early stay out of the folder.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            path = Path(temporary) / FILES[kind]
            write, run = (_write_torch, _run_torch) if kind == "torch" else (_write_onnx, _run_onnx)
            write(exported, path)
            difference = float((run(path, tried) - expected).abs().max())
            if not difference <= MAX_DIFFERENCE:
                raise UserError(
                    f"{source}: {FILES[kind]} differs from PyTorch by {difference:.2g}, more than rounding; "
                    "try another version of torch or onnxruntime"
                )
            for file in sorted(Path(temporary).iterdir()):
                fsync_path(file)
                os.replace(file, folder / file.name)
    about = {
        "file": FILES[kind],
        "input": {"name": "video", "dtype": "float32", "shape": ["batch", 3, *size]},
        "output": {"name": "features", "dtype": "float32", "shape": ["batch", *expected.shape[1:]]},
        "pixels": {"scale": 1 / 255, **checkpoint.pixels},
        "difference_from_pytorch": difference,
        **({"opset": OPSET} if kind == "onnx" else {}),
        "source": source,
        "model": checkpoint.model,
        "versions": {"vidssl": vidssl.__version__, "torch": str(torch.__version__)}
        | {name: version_of(name) for name in (ONNX_PACKAGES if kind == "onnx" else ())},
    }
    text = json.dumps(about, indent=1)
    atomic_write_text(folder / "encoder.json", text)
    return about


def _write_torch(exported: torch.export.ExportedProgram, path: Path) -> None:
    """By way of memory: torch's own writer ends the process where the disk is full."""
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    path.write_bytes(buffer.getbuffer())


def _run_torch(path: Path, video: Tensor) -> Tensor:
    return torch.export.load(path).module()(video)


def _write_onnx(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Weights beyond 2 GB go to a second file."""
    with warnings.catch_warnings():
        # of torch's own code
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, output_names=["features"], verbose=False
        )
    assert program is not None
    program.save(path)


def _run_onnx(path: Path, video: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (features,) = session.run(["features"], {"video": video.numpy()})
    return torch.from_numpy(features)

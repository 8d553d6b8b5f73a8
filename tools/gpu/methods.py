"""Five steps of every method, tiny: the losses on the device are those of the CPU in f32, and the first of
them in bf16.

Later losses in bf16 say nothing where clips are compared: with eight tiny clips a rounding grows tenfold a
step (0.4 of SimCLR's fourth loss, on a CPU, too).
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from gpu.check import run

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/integration"))
from test_methods import METHODS, losses, make_teacher, small

LIMITS = {"fp32": 1e-4, "bf16": 2e-2}  # largest relative difference of a loss from the CPU's in f32


def methods(a: argparse.Namespace) -> tuple[bool, str, dict[str, Any]]:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    Accelerator(cpu=a.device == "cpu")  # the first one decides the device of all
    errors: dict[str, dict[str, float]] = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            cfg = small(method, *make_teacher(method, Path(folder)))
            expected = torch.tensor(losses(cfg, "cpu"))
            errors[method] = {}
            for precision in LIMITS:
                found = torch.tensor(losses(cfg, a.device, precision))
                error = ((found - expected) / expected).abs()
                errors[method][precision] = (error.max() if precision == "fp32" else error[0]).item()
        print(method, " ".join(f"{k} {v:.1e}" for k, v in errors[method].items()))
    wrong = [
        f"{method} {precision} {error:.1e}"
        for method, of in errors.items()
        for precision, error in of.items()
        if not error <= LIMITS[precision]
    ]
    largest = {p: max(of[p] for of in errors.values()) for p in LIMITS}
    text = ", ".join(f"{p} {value:.1e}" for p, value in largest.items())
    ends = f"; over the limit: {', '.join(wrong)}" if wrong else ""
    return (
        not wrong,
        f"{len(errors)} methods, largest difference of a loss from the CPU's: {text}{ends}",
        errors,
    )


if __name__ == "__main__":
    run(methods, __doc__)

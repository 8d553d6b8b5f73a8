"""Prints what is installed and which devices there are."""

import argparse
import platform
from typing import Any

import torch
from gpu.check import run

from vidssl.core.cpus import available_cpus
from vidssl.core.versions import version_of

PACKAGES = (
    "torch",
    "torchvision",
    "accelerate",
    "timm",
    "av",
    "decord2",
    "torchcodec",
    "transformers",
    "deepspeed",
)


def environment(a: argparse.Namespace) -> tuple[bool, str, dict[str, Any]]:
    found: dict[str, Any] = {"python": platform.python_version(), "cores": available_cpus()}
    found |= {name: version_of(name) for name in PACKAGES}
    devices = "CPU"
    if a.device == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cudnn"] = torch.backends.cudnn.version()
        count = torch.cuda.device_count()
        found["devices"] = [torch.cuda.get_device_name(i) for i in range(count)]
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
        devices = f"{count} x {found['devices'][0]}"
    for name, value in found.items():
        print(f"{name}: {value}")
    return True, f"{devices}, torch {torch.__version__}, {found['cores']} cores", found


if __name__ == "__main__":
    run(environment, __doc__)

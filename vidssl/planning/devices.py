"""Accelerators by the vendors' data sheets: memory and power. Their rates are in training/flops.py."""

import difflib
import re
from typing import Literal, NamedTuple

from vidssl.core.errors import UserError

Sharding = Literal["none", "ddp", "fsdp2", "zero1", "zero2"]


class Device(NamedTuple):
    """One accelerator, or a core of a CPU."""

    name: str  # by which training/flops.py knows its rates
    memory_bytes: int | None  # None: the host's
    watts: float  # largest power of the board

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU


CPU = "CPU"
# f32 FLOP a second of a core in a large matrix product: half of the two cores of docs/benchmarks.md
CPU_CORE_FLOPS = 126.5e9
GB = 10**9
DEVICES = {
    "A100": Device("A100", 80 * GB, 400),
    "A100-40GB": Device("A100", 40 * GB, 400),
    "H100": Device("H100", 80 * GB, 700),
    "H200": Device("H200", 141 * GB, 700),
    "B200": Device("B200", 180 * GB, 1000),
    "L40S": Device("L40S", 48 * GB, 350),
    "4090": Device("RTX 4090", 24 * GB, 450),
    "3090": Device("RTX 3090", 24 * GB, 350),
    "MI300X": Device("MI300X", 192 * GB, 750),
    "V100": Device("V100-SXM2", 32 * GB, 300),
    # of a server's processor, its share of the package
    CPU: Device(CPU, None, 10),
}


def parse_devices(text: str) -> tuple[int, Device]:
    """The number and the kind of the devices of a host, as in 8xH100, h100 or 2xRTX4090; 4xCPU: cores."""
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text.strip(), re.IGNORECASE)
    assert match is not None
    count, name = match.groups()
    keys = {_plain(key): key for key in DEVICES}
    key = keys.get(_plain(name))
    if key is None:
        near = difflib.get_close_matches(_plain(name), keys, n=1)
        hint = f"did you mean {keys[near[0]]}?" if near else f"known: {', '.join(DEVICES)}"
        raise UserError(f"--gpus {text}: no data sheet of {name} is known; {hint}")
    if count is not None and int(count) < 1:
        raise UserError(f"--gpus {text}: give at least 1")
    return int(count or 1), DEVICES[key]


def _plain(name: str) -> str:
    """A name without what people write differently."""
    return re.sub(r"nvidia|geforce|amd|rtx|[\s_-]", "", name.lower())

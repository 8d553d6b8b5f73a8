"""Lets tests run FSDP2 and DeepSpeed on CPU processes (gloo), which Accelerate (1.15) allows on accelerators
only."""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def enable_cpu_sharding() -> None:
    """Makes AcceleratorState use the FSDP and DeepSpeed plugins on several CPU processes as it does on GPUs.

    Accelerate ignores them there (AcceleratorState.__init__), though all that it then does works on CPUs,
    too.
    """
    original = AcceleratorState.__init__

    def patched(self: AcceleratorState, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if self.distributed_type != DistributedType.MULTI_CPU:
            return
        fsdp, deepspeed = options.get("fsdp_plugin"), options.get("deepspeed_plugin")
        if fsdp or deepspeed:
            self.fsdp_plugin = fsdp
            self.deepspeed_plugins = deepspeed
            self.distributed_type = DistributedType.DEEPSPEED if deepspeed else DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = patched  # type: ignore[method-assign]

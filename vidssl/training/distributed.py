"""Shards over the processes (FSDP2; DeepSpeed: deepspeed.py): weights, gradients, optimiser state; whole where needed.

`accelerate launch` asks for it by environment variables (configs/accelerate/fsdp2.yaml). Each Block of the encoder, the
momentum encoder and the predictor is a unit of its own, what is left is the last one, and all parameters are cut in the
same way, so that optimiser and momentum update work on each process's own pieces.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from vidssl.core.errors import UserError
from vidssl.training.deepspeed import ZeroOptimizer, zero_plugin


def make_accelerator(precision: str, **options: Any) -> Accelerator:
    """The processes as they were launched; in shards if that was asked for. precision: fp32, bf16 or fp16."""
    cpu, alone = not torch.cuda.is_available(), os.environ.get("WORLD_SIZE", "1") == "1"
    sharded, deepspeed, kind = fsdp_plugin(precision), None, DistributedType.FSDP
    if env_flag("ACCELERATE_USE_DEEPSPEED"):
        deepspeed, kind = zero_plugin(precision), DistributedType.DEEPSPEED
        if cpu and alone:  # nobody to share with
            deepspeed, os.environ["ACCELERATE_USE_DEEPSPEED"] = None, "false"
    mixed = "no" if precision == "fp32" or deepspeed else precision
    plugins = {"fsdp_plugin": sharded, "deepspeed_plugin": deepspeed}
    accelerator = Accelerator(mixed_precision=mixed, cpu=cpu, **plugins, **options)
    if (sharded or deepspeed) and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate (1.15, AcceleratorState.__init__) heeds the plugins on accelerators only, though all that it then
        # does works on processes of a CPU, too.
        accelerator.state.fsdp_plugin = sharded
        accelerator.state.deepspeed_plugins = deepspeed
        accelerator.state.distributed_type = kind
        PartialState._shared_state["distributed_type"] = kind
    return accelerator


def fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """What the launcher asks for; None: no shards.

    On GPUs, of bf16 and fp16 the weights are gathered in that precision, and the gradients summed in f32; what is
    computed in f32 all the same is left to autocast, as without shards. On CPUs autocast leaves LayerNorm's weights as
    they are, so there they are gathered in f32.
    """
    if not env_flag("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 is not supported: set fsdp_version: 2, as in configs/accelerate/fsdp2.yaml")
    if env_flag("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing: use efficiency.activation_checkpointing=true instead")
    dtype = (
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision) if torch.cuda.is_available() else None
    )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, timeout: timedelta
) -> tuple[Any, Any]:
    """Both as the processes need them; timeout: how long one waits for another."""
    groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
    engine: Any
    engine, prepared = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        set_timeout = (
            getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
        )  # torch < 2.14
        set_timeout(timeout, engine.data_parallel_group)  # a group of its own
        prepared = accelerator.deepspeed_engine_wrapped = ZeroOptimizer(engine, groups)
    return engine, prepared


def deepspeed_optimizer(accelerator: Accelerator) -> ZeroOptimizer | None:
    """The optimiser, if it is DeepSpeed's."""
    return (
        accelerator.deepspeed_engine_wrapped
        if accelerator.distributed_type == DistributedType.DEEPSPEED
        else None
    )


@contextlib.contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Backward passes in here are a part of a step: what processes sum over each other can wait for the last one."""
    if (sharded := deepspeed_optimizer(accelerator)) is None:
        with accelerator.no_sync(model):
            yield
        return
    sharded.last = False
    try:
        yield
    finally:
        sharded.last = True


def env_flag(name: str) -> bool:
    """Is an environment variable of `accelerate launch` true?"""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def is_sharded(module: nn.Module) -> bool:
    """Are the weights? Then every process must take part in forward passes and in copies of what was learned."""
    return isinstance(module, FSDPModule)


def full_tensor(t: Tensor) -> Tensor:
    """The whole tensor, of which each process has a piece; all processes must ask for it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard_like(full: Tensor, other: Tensor) -> Tensor:
    """Of a whole tensor the piece that this process has of `other`; all processes must ask for it."""
    if not isinstance(other, DTensor) or full.shape != other.shape:
        return full
    return distribute_tensor(full.to(other.device), other.device_mesh, other.placements)


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """In here parts of a sharded model can be called by themselves: its last unit is whole, its blocks are while they
    run, and autocast is on where they are gathered in low precision. All processes must enter and call the same."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        here = next(p for p in model.parameters() if not isinstance(p, DTensor))
        with torch.autocast(here.device.type, here.dtype, enabled=here.dtype != torch.float32):
            yield
    finally:  # blocks, too: fsdp_reshard_after_forward: false leaves them whole until a backward pass
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def all_reduce_metrics(
    accelerator: Accelerator, means: dict[str, Tensor], sums: dict[str, float]
) -> dict[str, float]:
    """Averages and sums over all processes, the same in each, in one exchange."""
    own = [full_tensor(v.detach()).double().to(accelerator.device) for v in means.values()]
    each = torch.stack(
        [*own, *torch.tensor([*sums.values()], dtype=torch.float64, device=accelerator.device)]
    )
    total = accelerator.reduce(each, "sum").tolist()
    world = accelerator.num_processes
    return {k: v / world if k in means else v for k, v in zip([*means, *sums], total, strict=True)}


def skip_step(accelerator: Accelerator) -> None:
    """A step that is not taken; the scale of fp16 gradients moves on all the same."""
    if (sharded := deepspeed_optimizer(accelerator)) is not None:
        sharded.leave_out()
    if accelerator.scaler is not None:
        accelerator.scaler.update()


def check_ranks_agree(accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """An error if the processes have read different checkpoints, or some of them none. All processes must ask."""
    mine = torch.tensor([state["step"] if state else 0], device=accelerator.device)
    steps = sorted(set(accelerator.gather(mine).tolist()))
    if len(steps) > 1:
        raise UserError(
            f"the processes have read checkpoints of different steps {steps} (0: none): the folder is not shared"
        )

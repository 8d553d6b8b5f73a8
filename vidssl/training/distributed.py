"""Strategy: how the processes of a run share the work (one process, DDP, FSDP2; ZeRO is in deepspeed.py).

`accelerate launch` chooses it by environment variables (configs/accelerate/*.yaml). No other module asks which one runs:
losses, norms, checkpoints and diagnostics are the same for all of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from vidssl.core.errors import UserError

if TYPE_CHECKING:
    from vidssl.training.optim import OptimConfig

NO_LIMIT = float("inf")
T = TypeVar("T")


class ProcessOptions(Protocol):
    """The part of the `efficiency` section that a Strategy reads."""

    @property
    def precision(self) -> str: ...  # fp32, bf16 or fp16

    @property
    def peer_timeout_s(self) -> int: ...  # seconds that a process waits for another one


class Strategy:
    """One process, or DDP: every process holds the whole model.

    The subclasses (Fsdp2, deepspeed.Zero) override what sharding changes. Collective methods must be called by all
    processes: prepare, backward, clip, step, skip_step, reduce, on_main, load_state, barrier; of the processes with
    `participates_in_save` also full_state, of those with `runs_diagnostics` also unsharded.
    """

    def __init__(self, accelerator: Accelerator, timeout: timedelta = timedelta(minutes=10)):
        """timeout: how long a process waits for another one in a collective."""
        self.accelerator = accelerator
        self.timeout = timeout
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.scaler: Any = accelerator.scaler  # GradScaler of fp16; None in other precisions

    @staticmethod
    def from_env(
        efficiency: ProcessOptions,
        *,
        unused_parameters: bool = False,
        allow_sharding: bool = True,
        **options: Any,
    ) -> Strategy:
        """Joins the processes of this run and returns the Strategy that `accelerate launch` chose.

        unused_parameters: some parameters get no gradient in some steps; options: passed on to Accelerator. Raises
        UserError if the combination is not supported.
        """
        fsdp = fsdp_plugin(efficiency.precision)
        zero = None
        if env_flag("ACCELERATE_USE_DEEPSPEED"):
            from vidssl.training import deepspeed

            zero = deepspeed.zero_plugin(efficiency.precision, unused_parameters)
        if (fsdp or zero) and not allow_sharding:
            raise UserError("fine-tuning is of whole models: use configs/accelerate/ddp.yaml")
        timeout = timedelta(seconds=efficiency.peer_timeout_s)
        accelerator = Accelerator(
            mixed_precision="no" if efficiency.precision == "fp32" or zero else efficiency.precision,
            cpu=not torch.cuda.is_available(),
            fsdp_plugin=fsdp,
            deepspeed_plugin=zero,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, find_unused_parameters=unused_parameters
                ),
                InitProcessGroupKwargs(timeout=timeout),
            ],
            **options,
        )
        if accelerator.distributed_type == DistributedType.FSDP:
            return Fsdp2(accelerator, timeout)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return deepspeed.Zero(accelerator, timeout)
        if fsdp or zero:
            raise UserError("FSDP2 and DeepSpeed run on GPUs only: on CPUs use configs/accelerate/ddp.yaml")
        return Strategy(accelerator, timeout)

    # Training steps

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Returns the model to call in the training loop, and the optimizer."""
        return self.accelerator.prepare(model, optimizer)

    def autocast(self) -> AbstractContextManager[None]:
        """Context of a forward pass in the run's precision."""
        return self.accelerator.autocast()

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Gradient accumulation: defers the reduction of gradients to the first backward pass outside this context."""
        return self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, config: OptimConfig, step: int) -> Tensor:
        """Clips the gradients of step 0.. as `config` says. Returns their total norm before clipping, f32 [].

        Only the first clip undoes the scale of fp16 gradients, which may happen once a step. Source of
        clip_per_module: V-JEPA, app/vjepa/train.py: encoder and predictor (with its mask tokens) separately.
        """
        limit = config.clip_grad if config.clip_grad is not None and step >= config.clip_start else NO_LIMIT
        norm = self._unscale_and_clip(model.parameters(), NO_LIMIT if config.clip_per_module else limit)
        if config.clip_per_module and limit < NO_LIMIT:
            named = [
                ("encoder" in name.split("."), p) for name, p in model.named_parameters() if p.requires_grad
            ]
            for in_encoder in (True, False):
                self._clip([p for of_encoder, p in named if of_encoder == in_encoder], limit)
        return norm

    def _unscale_and_clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        return self.accelerator.clip_grad_norm_(parameters, limit)

    def _clip(self, parameters: Iterable[nn.Parameter], limit: float) -> None:
        nn.utils.clip_grad_norm_(parameters, limit)

    def step(self, optimizer: Any) -> None:
        optimizer.step()

    def skip_step(self, optimizer: Any) -> None:
        """Drops the gradients instead of a step. The GradScaler of fp16 is still updated."""
        if self.scaler is not None:
            self.scaler.update()

    # Exchange between processes

    def reduce(self, means: dict[str, Tensor], sums: dict[str, float]) -> dict[str, float]:
        """Averages and sums over the processes, the same in each of them, with one all-reduce."""
        values = [full_tensor(v.detach()).double().to(self.device) for v in means.values()]
        counts = torch.tensor([*sums.values()], dtype=torch.float64, device=self.device)
        total = self.accelerator.reduce(torch.stack([*values, *counts]), "sum").tolist()
        averages = [value / self.world for value in total[: len(means)]]
        return dict(zip([*means, *sums], [*averages, *total[len(means) :]], strict=True))

    def on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` in the first process. Returns its (picklable) result, or raises its UserError, in all."""
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = function()
            except UserError as e:
                result[1] = str(e)
        if self.world > 1:
            torch.distributed.broadcast_object_list(result, device=self.device)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Waits for all processes (a launcher may end all of them when the first one ends) and closes the trackers."""
        self.barrier()
        self.accelerator.end_training()

    # Diagnostics and checkpoints

    @property
    def runs_diagnostics(self) -> bool:
        """Whether this process takes part when the features are measured."""
        return self.is_main

    @property
    def participates_in_save(self) -> bool:
        """Whether this process takes part in full_state."""
        return self.runs_diagnostics

    def unsharded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which submodules of `model` can be called directly, with all their parameters."""
        return unsharded(model)

    def full_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Copies of the whole state in CPU memory: model, optimizer and scaler; tensors only in the first process."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        return gather_to_cpu(state, keep=self.is_main) | {"scaler": scaler}

    def load_state(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Restores what full_state returned. Moments of parameters whose shape has changed are left out."""
        places = model.state_dict()
        model.load_state_dict(
            {k: shard_like(v, places[k]) if k in places else v for k, v in state["model"].items()}
        )
        groups, saved = optimizer.param_groups, state["optimizer"]
        for group, old in zip(groups, saved["param_groups"], strict=True):
            old["fused"] = group["fused"]  # a matter of speed, which may change
        optimizer.load_state_dict({**saved, "state": self.moments(optimizer, saved)})
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def moments(self, optimizer: Any, saved: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
        """AdamW's moments of the parameters that have kept their shape."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        kept = {i: s for i, s in saved["state"].items() if s["exp_avg"].shape == params[i].shape}
        return {i: {k: shard_like(v, params[i]) for k, v in s.items()} for i, s in kept.items()}


class Fsdp2(Strategy):
    """FSDP2: weights, gradients and optimizer state are sharded over the processes.

    Each transformer Block of the encoder, the momentum encoder and the predictor is one unit, all other parameters are
    the last one. All parameters are sharded in the same way, so that the optimizer and the EMA update work on shards.
    """

    @property
    def runs_diagnostics(self) -> bool:
        return True  # every forward pass gathers weights from all processes


def fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """Options of FSDP2, or None if `accelerate launch` did not choose it.

    On GPUs, weights are gathered in bf16 or fp16 if that is the run's precision, and gradients are reduced in f32;
    autocast handles what is computed in f32 all the same, as without shards. On CPUs autocast leaves the weights of
    LayerNorm as they are, so there they are gathered in f32.
    """
    if not env_flag("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 is not supported: set fsdp_version: 2, as in configs/accelerate/fsdp2.yaml")
    if env_flag("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing: use efficiency.activation_checkpointing=true instead")
    low = {"bf16": torch.bfloat16, "fp16": torch.float16} if torch.cuda.is_available() else {}
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(
            low.get(precision), torch.float32, cast_forward_inputs=False
        ),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )


def env_flag(name: str) -> bool:
    """Whether an environment variable of `accelerate launch` is set to true."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def full_tensor(t: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded; a collective then."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard_like(full: Tensor, other: Tensor) -> Tensor:
    """This process's shard of `full`, sharded like `other`; a collective if `other` is sharded."""
    if not isinstance(other, DTensor) or full.shape != other.shape:
        return full
    return distribute_tensor(full.to(other.device), other.device_mesh, other.placements)


def gather_to_cpu(tree: Any, keep: bool = True) -> Any:
    """Copies a tree with every tensor whole and in CPU memory. Collective if tensors are sharded; without `keep` None
    replaces every tensor."""
    if isinstance(tree, Tensor):
        full = full_tensor(tree.detach())
        return full.to("cpu", copy=True).contiguous() if keep else None
    if isinstance(tree, dict):
        return {k: gather_to_cpu(v, keep) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gather_to_cpu(v, keep) for v in tree)
    return tree


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Temporarily gathers the parameters of an FSDP2 model outside its Blocks (a Block gathers its own when it runs),
    so that submodules can be called directly; autocast is on where weights are gathered in low precision."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        gathered = next(p for p in model.parameters() if not isinstance(p, DTensor))
        with torch.autocast(gathered.device.type, gathered.dtype, enabled=gathered.dtype != torch.float32):
            yield
    finally:  # Blocks too: with fsdp_reshard_after_forward: false they stay gathered until a backward pass
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

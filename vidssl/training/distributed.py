"""Strategy: how the processes of a run share the work (one process, DDP, FSDP2; ZeRO is in deepspeed.py).

`accelerate launch` chooses it by environment variables (configs/accelerate/*.yaml). No other module asks
which one runs: losses, norms, checkpoints and diagnostics are the same for all of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
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
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from vidssl.core.constants import upload
from vidssl.core.errors import UserError, disk_error_line
from vidssl.core.precision import Precision, ResolvedPrecision, resolve_precision, use_tf32
from vidssl.training.blocks import all_stacks
from vidssl.training.clip_share import ClipShare

if TYPE_CHECKING:
    from vidssl.training.schema import OptimConfig

NO_LIMIT = float("inf")
# rank 0 gets the full state, others an empty dict
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
T = TypeVar("T")


class ProcessOptions(Protocol):
    """The part of the `efficiency` section that a Strategy reads."""

    @property
    def precision(self) -> Precision: ...  # of the forward pass

    @property
    def peer_timeout_s(self) -> int: ...  # seconds that a process waits for another one


class Strategy:
    """One process, or DDP: every process holds the whole model.

    The subclasses (Fsdp2, deepspeed.Zero) override what sharding changes. Collective methods must be called
    by all processes: prepare, backward, clip, step, skip_step, step_if, reduce_metrics, all_reduce_metrics,
    run_on_main, load_state, barrier; of the processes with `participates_in_save` also full_state.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        timeout: timedelta = timedelta(minutes=10),
        precision: ResolvedPrecision = "fp32",
    ):
        """timeout: how long a process waits for another one in a collective; precision: of the forward
        pass."""
        self.accelerator = accelerator
        self.timeout = timeout
        self.precision = precision
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

        unused_parameters: some parameters get no gradient in some steps; options: passed on to Accelerator.
        The precision `auto` is resolved here, once. Raises UserError if the combination is not supported.
        """
        use_tf32()
        precision = resolve_precision(efficiency.precision)
        fsdp = fsdp_plugin(precision)
        zero = None
        if env_flag("ACCELERATE_USE_DEEPSPEED"):
            from vidssl.training import deepspeed

            zero = deepspeed.zero_plugin(precision, unused_parameters)
        if (fsdp or zero) and not allow_sharding:
            raise UserError("fine-tuning does not support sharded models: use configs/accelerate/ddp.yaml")
        timeout = timedelta(seconds=efficiency.peer_timeout_s)
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" or zero else precision,
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
            return Fsdp2(accelerator, timeout, precision)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return deepspeed.Zero(accelerator, timeout, precision)
        if fsdp or zero:
            raise UserError("FSDP2 and DeepSpeed run on GPUs only: on CPUs use configs/accelerate/ddp.yaml")
        return Strategy(accelerator, timeout, precision)

    @property
    def data_patience_s(self) -> float:
        """Seconds that a process waits for data: half as long as the others wait for it, so that the one that
        knows the cause ends first; 0, without end, where nobody waits."""
        return self.timeout.total_seconds() / 2 if self.world > 1 else 0

    # Training steps

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Returns the model to call in the training loop, and the optimizer."""
        return self.accelerator.prepare(model, optimizer)

    def autocast(self) -> AbstractContextManager[None]:
        """Context of a forward pass in the run's precision."""
        return self.accelerator.autocast()

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Gradient accumulation: defers the reduction of gradients to the first backward pass outside this
        context."""
        return self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, config: OptimConfig, step: int) -> Tensor:
        """Clips the gradients as configured. Returns their total norm before clipping, f32 [].

        step: 0-based index of this step. Only the first clip undoes the scale of fp16 gradients, which may
        happen once a step. Source of clip_per_module: V-JEPA, app/vjepa/train.py: encoder and predictor (with
        its mask tokens) separately.
        """
        limit = config.clip_grad if config.clip_grad is not None and step >= config.clip_start else NO_LIMIT
        self.accelerator.unscale_gradients()
        named = [(name.split("."), p) for name, p in model.named_parameters() if p.requires_grad]
        parts = [[p for _, p in named]]
        if config.clip_per_module and limit < NO_LIMIT:
            parts = [[p for name, p in named if ("encoder" in name) == inside] for inside in (True, False)]
        norms = [self._gradient_norm(part) for part in parts]
        if limit < NO_LIMIT:
            for part, norm in zip(parts, norms, strict=True):
                self._scale_down(part, limit, norm)
        return torch.linalg.vector_norm(torch.stack([full_tensor(norm).to(self.device) for norm in norms]))

    def _gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _scale_down(self, parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
        """Multiplies the gradients by limit / norm where that is below 1."""
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    def step(self, optimizer: Any) -> None:
        optimizer.step()

    def skip_step(self, optimizer: Any) -> None:
        """Drops the gradients instead of a step. The GradScaler of fp16 is still updated."""
        if self.scaler is not None:
            self.scaler.update()

    def step_if(self, optimizer: Any, accepted: Tensor | bool) -> Tensor | bool:
        """Takes the step or skips it. accepted: the decision, perhaps as bool [] on the device; a fused AdamW
        follows that without the host. Returns it, as the host knows it."""
        inner: Any = unwrapped(optimizer)
        if isinstance(accepted, Tensor) and self.scaler is None and is_fused(inner):
            inner.found_inf = (~accepted).float()  # as a GradScaler tells it
            try:
                self.step(optimizer)
            finally:
                del inner.found_inf
            return accepted
        if accepted:
            self.step(optimizer)
        else:
            self.skip_step(optimizer)
        return bool(accepted)

    # Exchange between processes

    def reduce_metrics(self, means: dict[str, Tensor], sums: dict[str, float]) -> Tensor:
        """Averages and sums over the processes, the same in each of them, with one all-reduce: f64 [n] on the
        device, for which the host does not wait."""
        values = [full_tensor(v.detach()).double().to(self.device) for v in means.values()]
        counts = upload(torch.tensor([*sums.values()], dtype=torch.float64), self.device)
        total = self.accelerator.reduce(torch.cat([torch.stack(values), counts]), "sum")
        return torch.cat([total[: len(means)] / self.world, total[len(means) :]])

    def all_reduce_metrics(self, means: dict[str, Tensor], sums: dict[str, float]) -> dict[str, float]:
        """What `reduce_metrics` returns, as the host reads it."""
        return dict(zip([*means, *sums], self.reduce_metrics(means, sums).tolist(), strict=True))

    @property
    def clip_share(self) -> ClipShare:
        """This process's part of clips that all measure together."""
        return ClipShare(self.rank, self.world, self.sum)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes; collective."""
        total: Tensor = self.accelerator.reduce(values.to(self.device), "sum")
        return total

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` in the first process. Returns its (picklable) result, or raises its UserError,
        also for an error of the disk, in all: none waits for a first process that has ended."""
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = function()
            except UserError as e:
                result[1] = str(e)
            except OSError as e:
                result[1] = disk_error_line(e)
                if result[1] is None:
                    raise
        if self.world > 1:
            torch.distributed.broadcast_object_list(result, device=self.device)
        if result[1] is not None:
            raise UserError(result[1])
        return result[0]

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Waits for all processes (a launcher may end all of them when the first one ends) and closes the
        trackers."""
        self.barrier()
        self.accelerator.end_training()

    # Diagnostics and checkpoints

    @property
    def runs_diagnostics(self) -> bool:
        """Whether this process measures what is not shared: held-out error and online probe."""
        return self.is_main

    @property
    def participates_in_save(self) -> bool:
        """Whether this process takes part in full_state."""
        return self.runs_diagnostics

    @property
    def saves_alone(self) -> bool:
        """Whether this process has the whole state, so that full_state needs no other one."""
        return self.is_main

    def full_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Copies the whole state into CPU memory of the first process: "model" (weights by name), "optimizer"
        (AdamW's state_dict with names in the place of numbers) and "scaler". The same for every Strategy."""
        return {
            "model": copy_to_cpu(get_model_state_dict(model, options=FULL_ON_CPU), self.device.type == "cpu"),
            "optimizer": self._optimizer_state(model, optimizer),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def _optimizer_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        state = get_optimizer_state_dict(model, unwrapped(optimizer), options=FULL_ON_CPU)
        return copy_to_cpu(state, self.device.type == "cpu")

    def load_state(self, model: nn.Module, optimizer: Any, state: dict[str, Any] | None) -> None:
        """Restores a full_state. Only the first process reads `state`; it broadcasts tensor by tensor."""
        state = state or {}
        self.load_weights(model, state.get("model"))
        self.load_moments(model, optimizer, state.get("optimizer"))
        scaler = self.run_on_main(lambda: state["scaler"])
        if self.scaler is not None and scaler:
            self.scaler.load_state_dict(scaler)

    def load_weights(self, model: nn.Module, weights: dict[str, Tensor] | None, strict: bool = True) -> None:
        """Loads `weights` of the first process; without `strict`, weights that are not in it stay as they
        are."""
        values: dict[str, Any] = {**(weights or {})}
        set_model_state_dict(model, values, options=self._load_options(strict))

    def load_moments(self, model: nn.Module, optimizer: Any, saved: dict[str, Any] | None) -> None:
        """Loads AdamW's moments and step counts from `saved` of the first process (see full_state).

        Parameters that it lacks, or that had another shape, start without moments.
        """
        shapes = {name: p.shape for name, p in model.named_parameters()}
        moments: dict[str, dict[str, Tensor]] = saved["state"] if saved else {}
        kept = self.run_on_main(
            lambda: [n for n, m in moments.items() if m["exp_avg"].shape == shapes.get(n)]
        )
        self._set_moments(model, unwrapped(optimizer), kept, {n: moments[n] for n in kept if self.is_main})

    def _set_moments(
        self, model: nn.Module, optimizer: Any, kept: list[str], moments: dict[str, dict[str, Tensor]]
    ) -> None:
        """kept: names of parameters that get moments; moments: their values, on the first process only."""
        # set_optimizer_state_dict initialises an empty state only if no parameter has a gradient
        optimizer.zero_grad()
        optimizer.state.clear()
        names = {p: name for name, p in model.named_parameters()}
        groups = [{**g, "params": [names[p] for p in g["params"]]} for g in optimizer.param_groups]
        saved: dict[str, Any] = {"state": moments, "param_groups": groups} if self.is_main else {}
        if kept:
            set_optimizer_state_dict(model, optimizer, saved, options=self._load_options(strict=False))
        for p in {p for group in optimizer.param_groups for p in group["params"]}:
            if names[p] not in kept:
                optimizer.state.pop(p, None)

    def _load_options(self, strict: bool) -> StateDictOptions:
        return StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world > 1, strict=strict)


class Fsdp2(Strategy):
    """FSDP2: weights, gradients and optimizer state are sharded over the processes.

    Each transformer Block of the encoder, the EMA encoder and the predictor is one unit, all other parameters
    are the last one. All parameters are sharded in the same way, so that the optimizer and the EMA update
    work on shards.
    """

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        names = {type(block).__name__ for stack in all_stacks(model) for block in stack}
        self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(names)
        return super().prepare(model, optimizer)

    @property
    def runs_diagnostics(self) -> bool:
        return True  # every forward pass gathers weights from all processes

    @property
    def saves_alone(self) -> bool:
        return self.world == 1


def fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """Options of FSDP2, or None if `accelerate launch` did not choose it.

    On GPUs, weights are gathered in bf16 or fp16 if that is the run's precision, and gradients are reduced in
    f32; autocast handles what is computed in f32 all the same, as without shards. On CPUs autocast leaves the
    weights of LayerNorm as they are, so there they are gathered in f32.
    """
    if not env_flag("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 is not supported: set fsdp_version: 2, as in configs/accelerate/fsdp2.yaml")
    if env_flag("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing: use efficiency.activation_checkpointing=true instead")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16} if torch.cuda.is_available() else {}
    reduced_dtype = dtypes.get(precision)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(reduced_dtype, torch.float32, cast_forward_inputs=False),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )


def env_flag(name: str) -> bool:
    """Whether an environment variable of `accelerate launch` is set to true."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def full_tensor(t: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded; a collective then."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside Accelerate's."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def is_fused(optimizer: Any) -> bool:
    """Whether it is an optimizer of torch whose step is one kernel."""
    return bool(getattr(optimizer, "defaults", {}).get("fused"))


def copy_to_cpu(tree: Any, copy: bool = True) -> Any:
    """The tree with contiguous tensors in CPU memory that later training steps do not change.

    copy: also copies tensors that are in CPU memory already; without it only step counts, which AdamW keeps
    there.
    """
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=copy or tree.dim() == 0).contiguous()
    if isinstance(tree, dict):
        return {k: copy_to_cpu(v, copy) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copy_to_cpu(v, copy) for v in tree)
    return tree


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Temporarily gathers the parameters of an FSDP2 model outside its Blocks (a Block gathers its own when
    it runs), so that submodules can be called directly; autocast is on where weights are gathered in low
    precision."""
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

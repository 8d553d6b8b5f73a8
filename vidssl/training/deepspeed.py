"""DeepSpeed's ZeRO, stages 1 and 2: optimizer state (stage 2: and gradients) sharded over the processes,
weights whole.

`accelerate launch` chooses it by environment variables (configs/accelerate/zero1.yaml, zero2.yaml). DeepSpeed
reduces and partitions the gradients; clipping, skipped steps and schedules stay in our loop. No other module
knows DeepSpeed.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DeepSpeedPlugin
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from vidssl.core.errors import UserError
from vidssl.training.distributed import Strategy

USE_FSDP2 = "use configs/accelerate/fsdp2.yaml"
BUCKET_ELEMENTS = 25_000_000  # gradients reduced at a time; each process holds an f32 buffer of that size
MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Strategy):
    """ZeRO-1 or ZeRO-2."""

    optimizer: "ZeroOptimizer"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, "ZeroOptimizer"]:
        groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
        engine, _ = self.accelerator.prepare(model, optimizer)
        # torch < 2.14 has only the private name
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(self.timeout, engine.data_parallel_group)  # a process group of its own
        engine.set_gradient_accumulation_boundary(True)  # see no_sync
        self.optimizer = ZeroOptimizer(engine, groups)
        return engine, self.optimizer

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        self.optimizer.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.optimizer.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.engine.backward(loss)

    def _gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        return self.optimizer.gradient_norm(parameters)

    def _scale_down(self, parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
        self.optimizer.scale_down(parameters, limit, norm)

    def skip_step(self, optimizer: Any) -> None:
        self.optimizer.skip_step()

    @property
    def participates_in_save(self) -> bool:
        return True

    @property
    def saves_alone(self) -> bool:
        return self.world == 1

    def _optimizer_state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        names = {p: name for name, p in model.named_parameters()}
        groups = [{**g, "params": [names[p] for p in g["params"]]} for g in self.optimizer.param_groups]
        moments = {names[p]: state for p, state in self.optimizer.gather_moments().items()}
        return {"state": moments, "param_groups": groups}

    def load_weights(self, model: nn.Module, weights: dict[str, Tensor] | None, strict: bool = True) -> None:
        super().load_weights(model, weights, strict)
        self.optimizer.engine.optimizer.refresh_fp32_params()

    def _set_moments(
        self, model: nn.Module, optimizer: Any, kept: list[str], moments: dict[str, dict[str, Tensor]]
    ) -> None:
        parameters = dict(model.named_parameters())
        self.optimizer.scatter_moments([parameters[name] for name in kept], [*moments.values()])


class ZeroOptimizer:
    """AdamW with sharded state, and the part of torch's interface that a training loop uses.

    engine: made by Accelerate; param_groups: those of the optimizer it was made from, with whole parameters.
    A process holds a fragment (or nothing) of the gradient and of the moments of each parameter:
    `_hp_mapping` holds the fragment's address in the flattened parameter (lp) and in the one long tensor in
    which DeepSpeed keeps the process's fragments of a group (hp).
    """

    def __init__(self, engine: Any, param_groups: list[dict[str, Any]]):
        self.engine = engine
        self.param_groups = param_groups

    def zero_grad(self) -> None:
        """Does nothing: the engine frees the gradients after a step."""

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """As torch.nn.utils.get_total_norm of the gradients; collective."""
        grads = [g for p in parameters if (g := gradient_fragment(p)) is not None]
        zero = torch.zeros((), device=self.engine.device)
        square = torch.stack(
            [zero, *(n.square() for n in (torch._foreach_norm(grads) if grads else ()))]
        ).sum()
        dist.all_reduce(square)
        return square.sqrt()

    def scale_down(self, parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
        """As torch.nn.utils.clip_grads_with_norm_."""
        grads = [g for p in parameters if (g := gradient_fragment(p)) is not None]
        if grads:
            torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))

    def step(self) -> None:
        for own, group in zip(self.engine.optimizer.param_groups, self.param_groups, strict=True):
            own.update(lr=group["lr"], weight_decay=group["weight_decay"])
        self.engine.step()

    def skip_step(self) -> None:
        """Drops the gradients: the engine does so by itself where they are not finite, so they are made
        infinite."""
        for p in self._parameters():
            if (g := gradient_fragment(p)) is not None:
                g.fill_(torch.inf)
        self.engine.step()
        if not self.engine.optimizer.overflow:
            raise UserError("DeepSpeed took a step that was to be skipped: pip install 'deepspeed>=0.19.8'")

    def gather_moments(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """AdamW's state of whole parameters, in CPU memory of the first process; empty in the others.
        Collective."""
        gathered: dict[nn.Parameter, dict[str, Tensor]] = {}
        for p, state in zip(self._parameters(), self._states(), strict=True):
            for name in MOMENTS if state else ():
                whole = torch.zeros(p.numel(), device=p.device)
                if p._hp_mapping is not None:
                    fragment(whole, p._hp_mapping.lp_fragment_address).copy_(self._own(p, state[name]))
                dist.reduce(whole, 0)
                if dist.get_rank() == 0:
                    step = state["step"].to("cpu", copy=True)
                    gathered.setdefault(p, {"step": step})[name] = whole.view(p.shape).to("cpu", copy=True)
        return gathered

    def scatter_moments(self, parameters: list[Any], moments: list[dict[str, Tensor]]) -> None:
        """Loads AdamW's state of whole `parameters` from `moments` of the first process. Collective.

        All parameters of a group share one step count, so that either all of them have moments or none.
        """
        inner = self.engine.optimizer.optimizer
        if not parameters:
            inner.state.clear()
            return
        if lacking := len(self._parameters()) - len(parameters):
            raise UserError(
                f"{lacking} of {len(self._parameters())} parameters have no moments in the checkpoint; "
                f"{USE_FSDP2}"
            )
        for group in inner.param_groups:
            (long,) = group["params"]
            if not inner.state[long]:
                step = torch.zeros((), device=long.device if group["fused"] else "cpu")
                inner.state[long] |= {"step": step, **{name: torch.zeros_like(long) for name in MOMENTS}}
        states = dict(zip(self._parameters(), self._states(), strict=True))
        sources = iter(moments)
        for p in parameters:
            source = next(sources, {})
            for name in ("step", *MOMENTS):
                shape = p.shape if name in MOMENTS else ()
                whole = source.get(name, torch.empty(shape)).to(p.device, torch.float32).reshape(-1)
                dist.broadcast(whole, 0)
                if name == "step":
                    states[p]["step"].fill_(float(whole))
                elif p._hp_mapping is not None:
                    self._own(p, states[p][name]).copy_(fragment(whole, p._hp_mapping.lp_fragment_address))

    def _parameters(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def _states(self) -> list[dict[str, Tensor]]:
        """For each parameter the state of its group's long tensor; empty before the first step."""
        inner = self.engine.optimizer.optimizer
        pairs = zip(inner.param_groups, self.param_groups, strict=True)
        return [inner.state.get(long["params"][0], {}) for long, group in pairs for _ in group["params"]]

    @staticmethod
    def _own(p: Any, long: Tensor) -> Tensor:
        """The view of a parameter's fragment in the long tensor of its group."""
        return fragment(long, p._hp_mapping.hp_fragment_address)


def fragment(flat: Tensor, address: Any) -> Tensor:
    return flat.narrow(0, address.start, address.numel)


def gradient_fragment(p: Any) -> Tensor | None:
    """This process's part of a parameter's gradient between backward pass and step, as a view; None: it has
    none."""
    mapping = getattr(p, "_hp_mapping", None)
    return None if mapping is None else mapping.get_lp_grad_fragment(p._index_in_param_group)


def zero_plugin(precision: str, unused_parameters: bool = False) -> DeepSpeedPlugin:
    """Options of DeepSpeed. Raises UserError if `accelerate launch` or the run asks for something
    unsupported.

    precision: fp32, or bf16 by autocast with weights and gradient sums in f32; unused_parameters: see
    Strategy.from_env.
    """
    if unused_parameters:
        raise UserError(
            f"model.image_tokenizer: DeepSpeed decays weights that a batch does not use; {USE_FSDP2}"
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise UserError(
            "deepspeed_config_file: the run's configuration sets its contents; give zero_stage: 1 or 2"
        )
    if stage not in ("1", "2"):
        raise UserError(
            f"DeepSpeed's zero_stage {stage}: give 1 or 2; to shard weights (stage 3) {USE_FSDP2}"
        )
    for what in ("optimizer", "param"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none") != "none":
            raise UserError(
                f"offload_{what}_device: only none is supported; to need less memory, {USE_FSDP2} or "
                "efficiency.activation_checkpointing"
            )
    if precision == "fp16":
        raise UserError(
            f"DeepSpeed does not support efficiency.precision=fp16 here: give bf16, or {USE_FSDP2}"
        )
    try:
        import deepspeed
        import transformers  # noqa: F401  Accelerate needs it
    except ImportError as e:
        raise UserError(f"{e.name} is not installed: pip install 'vidssl[deepspeed]'") from None
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # on a CPU it would be compiled at the start
    )
    plugin = DeepSpeedPlugin()
    plugin.deepspeed_config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET_ELEMENTS
    # only for DeepSpeed's own reports: the training loop accumulates
    plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    if precision == "bf16":
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        plugin.deepspeed_config["torch_autocast"] = autocast
    return plugin

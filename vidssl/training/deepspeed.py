"""DeepSpeed's ZeRO, stages 1 and 2: optimiser state (2: and gradients) cut over the processes, weights whole.

`accelerate launch` asks for it by environment variables (configs/accelerate/zero1.yaml, zero2.yaml). The engine sums
gradients and cuts them; when a step is taken, and with which gradients, is decided outside of it, as for other runs.
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
BUCKET = 25_000_000  # gradients that are summed at a time, of which each process holds a buffer in f32


class Zero(Strategy):
    """DeepSpeed's ZeRO: optimizer state (stage 2: and gradients) sharded over the processes, weights whole."""

    optimizer: "ZeroOptimizer"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, "ZeroOptimizer"]:
        groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
        engine, _ = self.accelerator.prepare(model, optimizer)
        # torch < 2.14 has only the private name
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(self.timeout, engine.data_parallel_group)  # a process group of its own
        self.optimizer = self.accelerator.deepspeed_engine_wrapped = ZeroOptimizer(engine, groups)
        return engine, self.optimizer

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        self.optimizer.last = False
        try:
            yield
        finally:
            self.optimizer.last = True

    def _unscale_and_clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        return self.optimizer.clip_grad_norm_(parameters, limit)

    def _clip(self, parameters: Iterable[nn.Parameter], limit: float) -> None:
        self.optimizer.clip_grad_norm_(parameters, limit)

    def skip_step(self, optimizer: Any) -> None:
        self.optimizer.leave_out()

    @property
    def participates_in_save(self) -> bool:
        return True


def zero_plugin(precision: str, unused_parameters: bool = False) -> DeepSpeedPlugin:
    """What the launcher asks for. precision: fp32, or bf16 by autocast, with sums and weights in f32."""
    if unused_parameters:
        raise UserError(
            "model.image_tokenizer: DeepSpeed decays weights that a batch makes no use of; use fsdp2.yaml"
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise UserError(
            "deepspeed_config_file: what it would say is in the run's configuration; give zero_stage: 1 or 2"
        )
    if stage not in ("1", "2"):
        raise UserError(
            f"DeepSpeed's zero_stage {stage}: give 1 or 2; for weights in shards (stage 3) {USE_FSDP2}"
        )
    for what in ("optimizer", "param"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none") != "none":
            raise UserError(
                f"offload_{what}_device: only none; to need less memory, {USE_FSDP2} or efficiency.activation_checkpointing"
            )
    if precision == "fp16":
        raise UserError(f"efficiency.precision=fp16 does not go with DeepSpeed: give bf16, or {USE_FSDP2}")
    try:
        import deepspeed
        import transformers  # noqa: F401  Accelerate asks for it
    except ImportError as e:
        raise UserError(f"{e.name} is not installed: pip install 'vidssl[deepspeed]'") from None
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # on a CPU it would be compiled at the start
    )
    found = DeepSpeedPlugin()
    found.deepspeed_config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    found.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    found.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }  # for its reports
    if precision == "bf16":
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        found.deepspeed_config["torch_autocast"] = autocast
    return found


class ZeroOptimizer:
    """AdamW whose state is in pieces, used as torch's own: param_groups and state_dict are those of whole parameters.

    engine: what Accelerate made; param_groups: those of the optimiser before. Of each parameter a process has a piece
    (or none) of its gradient and moments: `_hp_mapping` says where it lies in the parameter (lp) and in the one long
    tensor into which the process's pieces of a group are laid out (hp).
    """

    def __init__(self, engine: Any, param_groups: list[dict[str, Any]]):
        self.engine, self.param_groups, self.last = engine, param_groups, True

    def backward(self, loss: Tensor, **_: Any) -> None:
        """Add to the gradients; after the `last` part of a step they are summed over the processes and cut."""
        self.engine.set_gradient_accumulation_boundary(self.last)
        self.engine.backward(loss)

    def zero_grad(self) -> None:
        """Nothing: the engine keeps no gradients after a step."""

    def clip_grad_norm_(self, params: Iterable[nn.Parameter], limit: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_; all processes must ask."""
        grads = [g for p in params if (g := local_gradient(p)) is not None]
        zero = torch.zeros((), device=self.engine.device)
        square = torch.stack([zero, *(torch.linalg.vector_norm(g).square() for g in grads)]).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        for g in grads if limit < torch.inf else ():
            g.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self) -> None:
        for own, group in zip(self.engine.optimizer.param_groups, self.param_groups, strict=True):
            own.update(lr=group["lr"], weight_decay=group["weight_decay"])
        self.engine.step()

    def leave_out(self) -> None:
        """A step that is not taken: ZeRO itself lets gradients go that are not finite."""
        for p in self._params():
            if (g := local_gradient(p)) is not None:
                g.fill_(torch.inf)
        self.engine.step()
        if not self.engine.optimizer.overflow:
            raise UserError("DeepSpeed took a step that was to be left out: pip install 'deepspeed>=0.19.8'")

    def state_dict(self) -> dict[str, Any]:
        """As that of AdamW over whole parameters, in the first process. The others must ask, too, and get no state."""
        state: dict[int, dict[str, Tensor]] = {}
        for i, (p, pieces) in enumerate(zip(self._params(), self._states(), strict=True)):
            for name in ("exp_avg", "exp_avg_sq") if pieces else ():
                whole = torch.zeros(p.numel(), device=p.device)
                if p._hp_mapping is not None:
                    part(whole, p._hp_mapping.lp_fragment_address).copy_(self._own(p, pieces[name]))
                dist.reduce(whole, 0)
                if dist.get_rank() == 0:
                    state.setdefault(i, {"step": pieces["step"].cpu()})[name] = whole.view(p.shape).cpu()
        numbers = iter(range(len(self._params())))
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]} for group in self.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Of whole parameters, whose values may have changed, too."""
        self.engine.optimizer.refresh_fp32_params()
        inner, params = self.engine.optimizer.optimizer, self._params()
        if not saved["state"]:
            inner.state.clear()
            return
        if lacking := len(params) - len(saved["state"]):
            raise UserError(
                f"{lacking} of {len(params)} parameters have no moments in the checkpoint; {USE_FSDP2} for it"
            )
        for group in inner.param_groups:
            (long,) = group["params"]
            if not inner.state[long]:
                step = torch.zeros((), device=long.device if group["fused"] else "cpu")
                moments = {name: torch.zeros_like(long) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[long] |= {"step": step, **moments}
        for i, (p, pieces) in enumerate(zip(params, self._states(), strict=True)):
            pieces["step"].fill_(float(saved["state"][i]["step"]))
            for name in ("exp_avg", "exp_avg_sq") if p._hp_mapping is not None else ():
                whole = saved["state"][i][name].reshape(-1)
                self._own(p, pieces[name]).copy_(part(whole, p._hp_mapping.lp_fragment_address))

    def _params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def _states(self) -> list[dict[str, Tensor]]:
        """Of each parameter the state of the long tensor that it has a piece of; empty before the first step."""
        inner = self.engine.optimizer.optimizer
        each = zip(inner.param_groups, self.param_groups, strict=True)
        return [inner.state.get(long["params"][0], {}) for long, group in each for _ in group["params"]]

    @staticmethod
    def _own(p: Any, long: Tensor) -> Tensor:
        return part(long, p._hp_mapping.hp_fragment_address)


def part(long: Tensor, address: Any) -> Tensor:
    return long.narrow(0, address.start, address.numel)


def local_gradient(p: Any) -> Tensor | None:
    """This process's piece of a parameter's gradient, between backward pass and step; it may be changed in place."""
    mapping = getattr(p, "_hp_mapping", None)
    return None if mapping is None else mapping.get_lp_grad_fragment(p._index_in_param_group)

"""Memory of a training step, counted without computing it: a step runs on tensors without values, and the
bytes of all that is in use at a time are added up.

The tensors are those of the CPU, since torch without CUDA cannot run a GPU's operations; under autocast both
round the same products, so that the same tensors are kept. Memory that a kernel takes for itself does not
count.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vidssl.core.constants import constant
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.objective.noise_score import filter_matrix
from vidssl.objective.objective import Objective
from vidssl.training.micro_batches import MicroBatch
from vidssl.training.schema import TrainConfig

# Of large tensors they are false everywhere, since torch draws again what is outside of its bounds.
COMPARISONS = ("lt", "le", "gt", "ge")
LARGE = 2**14  # elements from which on the values of a tensor are not computed; masks have fewer


class StepMemory(NamedTuple):
    """Bytes of the forward and backward passes of a micro-batch, beside weights, moments and u8 clips."""

    clips: int
    kept: int  # in use when the forward pass has ended, with what the rounded weights take
    peak: int  # the most at any time, with the gradients that exist at that time
    peak_beside: int  # the same without gradients of weights
    casts: int  # of `kept`, the rounded copies of the weights, which do not depend on the clips


class WithoutValues(TorchFunctionMode):
    """Context in which large weights are made, and stay as the system gives them: nothing is drawn, and
    memory that is never written takes no room."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, Tensor) and first.numel() > LARGE and first.is_floating_point():
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
                return first
            if name == "clone":
                return torch.empty_like(first)
            if name.strip("_") in COMPARISONS:
                return torch.zeros((), dtype=torch.bool).expand(first.shape)
        return func(*args, **kwargs)


def build_without_values(cfg: TrainConfig) -> Objective:
    """The method of a configuration with weights that have shapes alone."""
    with WithoutValues():
        return cfg.build_objective()


class LiveBytes(TorchDispatchMode):
    """Context that adds up the bytes of the tensors which were made in it and are in use."""

    def __init__(self, weights: Sequence[Tensor]):
        """weights: whose rounded copies are counted by themselves."""
        super().__init__()
        self.weights = {storage_key(w) for w in weights}
        self.now = 0
        self.peak = 0
        self.gradients = 0
        self.peak_beside = 0
        self.in_use: dict[int, tuple[weakref.ref, int]] = {}
        self.casts: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                key = self._add(tensor)
                if func is torch.ops.aten._to_copy.default and storage_key(args[0]) in self.weights:
                    self.casts.add(key)
        return made

    @property
    def cast_bytes(self) -> int:
        return sum(self.in_use[key][1] for key in self.casts if key in self.in_use)

    def add_gradient(self, weight: Tensor) -> None:
        """Called when a weight has its gradient."""
        assert weight.grad is not None
        self.gradients += weight.grad.untyped_storage().nbytes()

    def _add(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key not in self.in_use and key not in self.weights:
            size = storage.nbytes()
            self.in_use[key] = weakref.ref(storage, lambda _: self._remove(key)), size
            self.now += size
            self.peak = max(self.peak, self.now)
            self.peak_beside = max(self.peak_beside, self.now - self.gradients)
        return key

    def _remove(self, key: int) -> None:
        self.now -= self.in_use.pop(key)[1]
        self.casts.discard(key)


def storage_key(tensor: Tensor) -> int:
    """The same for all tensors that share their memory."""
    return tensor.untyped_storage()._cdata


def count_step_memory(objective: Objective, part: MicroBatch, precision: str) -> StepMemory:
    """The memory of the forward and backward passes of a micro-batch, as they are set up by configure_blocks.

    part: of zoo.flops.drawn_parts. precision: fp32 or bf16 (fp16 has the same size).
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
    own = {name: _fake_like(fake, tensor) for name, tensor in tensors.items()}
    live = LiveBytes([*own.values()])
    for tensor in own.values():
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(live.add_gradient)
    # its own draws are on the device of the clips
    rng = KeyedRNG(0, part.rng.step, torch.arange(len(part.video)), part.rng.batch)
    # the clips are counted apart
    with fake:
        video = torch.empty(part.video.shape, dtype=torch.uint8)
    with unchanged(objective), fake, live:
        masks = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), part.masks)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            losses = torch.func.functional_call(objective, own, (normalise(video), rng, masks))
        kept = live.now
        casts = live.cast_bytes
        losses["loss"].backward()
    return StepMemory(len(part.video), kept, live.peak, live.peak_beside, casts)


@contextmanager
def unchanged(objective: Objective) -> Iterator[None]:
    """Context that ends with what the modules and the caches of constants held before, so that no tensor
    without values is left there."""
    before = [(module, dict(vars(module))) for module in objective.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
        for made in (constant, filter_matrix):
            made.cache_clear()


def _fake_like(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    with fake:
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return made.requires_grad_(tensor.requires_grad)


def largest_part(parts: Sequence[MicroBatch]) -> MicroBatch:
    """The micro-batch with the most pixels, and of these the one whose masks keep the most tokens."""

    def size(part: MicroBatch) -> tuple[int, int]:
        kept = sum(leaf.numel() for leaf in tree_leaves(part.masks) if isinstance(leaf, Tensor))
        return part.video.numel(), kept

    return max(parts, key=size)

"""Memory of one device: what is kept all the time, and a step, by the strategy that shares the model."""

from typing import NamedTuple

from torch import nn

from vidssl.objective.objective import Objective
from vidssl.objective.targets import Target
from vidssl.planning.devices import Sharding
from vidssl.planning.step_memory import StepMemory
from vidssl.training.blocks import all_stacks
from vidssl.training.deepspeed import BUCKET_ELEMENTS

FLOAT = 4  # bytes of an f32
ROUNDED = 2  # bytes of a bf16 or fp16
GATHERED_UNITS = 2  # of FSDP2 whose weights are whole at a time: the one that computes, and the next


class ParameterCount(NamedTuple):
    """Numbers of parameters of a method."""

    encoder: int  # that is trained
    others: int  # that are trained beside it: predictor, query, heads
    frozen: int  # without gradients: momentum encoder, teachers
    largest_block: int  # of a transformer block
    outside_blocks: int  # of `encoder` and `others`

    @property
    def trained(self) -> int:
        return self.encoder + self.others


def count_parameters(objective: Objective) -> ParameterCount:
    encoder = _trained(objective.encoder)
    trained = _trained(objective)
    every = sum(p.numel() for p in objective.parameters())
    teachers = [m.teacher for m in objective.modules() if isinstance(m, Target) and m.teacher is not None]
    frozen = every - trained + sum(p.numel() for teacher in teachers for p in teacher.parameters())
    blocks = [block for stack in all_stacks(objective) for block in stack]
    largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    return ParameterCount(encoder, trained - encoder, frozen, largest, trained - sum(map(_trained, blocks)))


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class PlannedMemory(NamedTuple):
    """Bytes on one device at the peak of a step."""

    weights: int
    frozen: int
    moments: int
    gradients: int  # that exist before the pass: of earlier micro-batches, and copies of the strategy
    activations: int  # kept for the backward pass
    passing: int  # beyond these at the peak: gradients of the pass, and what operations need
    clips: int  # of this step and the next one, u8

    @property
    def total(self) -> int:
        return sum(self)


def planned_memory(
    count: ParameterCount,
    step: StepMemory,
    sharding: Sharding,
    world: int,
    micro_batches: int,
    clip_bytes: int,
    rounded: bool,
) -> PlannedMemory:
    """step: of one of the micro-batches; clip_bytes: u8, of the device's share of a step; rounded: products
    are in bf16 or fp16."""
    trained = FLOAT * count.trained
    earlier = trained if micro_batches > 1 else 0
    bucket = FLOAT * min(BUCKET_ELEMENTS, count.trained)
    weights = trained
    frozen = FLOAT * count.frozen
    moments = 2 * trained
    kept = step.kept
    # gradients of earlier micro-batches are there already
    peak = step.peak_beside if micro_batches > 1 or sharding in ("zero2", "fsdp2") else step.peak
    if sharding in ("zero1", "zero2", "fsdp2"):
        moments //= world
    if sharding == "fsdp2":
        frozen //= world
        # a unit's rounded weights are those that are gathered, and are given up after it
        kept -= step.casts
        peak -= step.casts
        unit = GATHERED_UNITS * count.largest_block
        weights = trained // world + (ROUNDED if rounded else FLOAT) * (unit + count.outside_blocks)
        held = trained // world + FLOAT * unit
    elif sharding in ("zero1", "zero2"):
        # DeepSpeed's optimizer has a copy of its share of the weights
        weights += trained // world
        held = bucket + (trained // world if sharding == "zero2" else earlier)
    else:
        # DDP copies gradients into buckets, which stay
        held = earlier + (trained if sharding == "ddp" else 0)
    return PlannedMemory(weights, frozen, moments, held, kept, max(peak - kept, 0), 2 * clip_bytes)


def in_parts(step: StepMemory, parts: int) -> StepMemory:
    """The memory of a micro-batch that is 1 / parts of this one."""

    def part_of(size: int) -> int:
        return step.casts + (size - step.casts) // parts

    return StepMemory(
        step.clips // parts, part_of(step.kept), part_of(step.peak), part_of(step.peak_beside), step.casts
    )

"""The plan of a pre-training run: what its configuration needs on given devices, and what was assumed."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vidssl.core.errors import UserError
from vidssl.planning.data_cost import PackedCorpus, measure_corpus, measure_cpu_ms, open_indexed
from vidssl.planning.device_memory import (
    FLOAT,
    ParameterCount,
    PlannedMemory,
    count_parameters,
    in_parts,
    planned_memory,
)
from vidssl.planning.devices import CPU_CORE_FLOPS, Device, Sharding
from vidssl.planning.failures import best_interval_s, goodput
from vidssl.planning.step_memory import StepMemory, build_without_values, count_step_memory, largest_part
from vidssl.training.blocks import configure_blocks
from vidssl.training.config_checks import check_batch
from vidssl.training.flops import published_peak
from vidssl.training.schema import TrainConfig
from vidssl.zoo.flops import drawn_parts, flops_without_values

COUNTED_SIZES = 8  # of masks, whose FLOPs are averaged
DECODE_SHARE = 0.5  # of the CPU time of a clip; the other half is colour conversion and the crop
HOUR_S = 3600.0


@dataclass(frozen=True)
class Assumptions:
    """What a configuration does not say."""

    mfu: float  # share of the peak rate that the model FLOPs reach
    cpu_ms: float  # CPU time of a clip until it is on the device
    overhead: float = 1.5  # power of all over that of the devices: hosts, network, cooling
    mtbf_hours: float = 50_000.0  # of one device, between failures that end a run
    restart_s: float = 300.0  # from a failure to the next step
    save_bytes_s: float = 2e9  # at which the state is copied to the host, while the run waits
    reserve_bytes: float = 1e9  # of a device: context and libraries
    reserve_share: float = 0.05  # of the planned memory: gaps between blocks


class Cluster(NamedTuple):
    """The devices of a run."""

    device: Device
    per_host: int
    hosts: int
    sharding: Sharding

    @property
    def devices(self) -> int:
        return self.per_host * self.hosts

    @property
    def world(self) -> int:
        """Processes: one for each GPU; the cores of a host share one."""
        return self.hosts if self.device.is_cpu else self.devices


@dataclass(frozen=True)
class RunPlan:
    """All figures of a plan, in bytes, seconds and FLOPs."""

    config: dict[str, Any]  # what the figures depend on most
    parameters: ParameterCount
    flops_clip: float  # model FLOPs
    flops_run: float
    memory: PlannedMemory
    kept_clip: float  # bytes that the backward pass needs of a clip
    fits: bool
    advice: str  # how it would fit
    step_s: float
    run_s: float  # without failures
    clips_s: float
    cores: float  # that decoding keeps busy, over all hosts
    checkpoint_bytes: int
    stored_bytes: int  # checkpoints and encoders of the run, at most
    corpus: PackedCorpus | None
    save_s: float
    mtbf_s: float  # of the run
    best_save_every: int  # steps
    goodput_best: float
    goodput: float  # with run.save_every
    joules: float
    assumptions: Assumptions

    def as_dict(self) -> dict[str, Any]:
        tree = asdict(self)
        for name in ("parameters", "memory", "corpus"):
            part = getattr(self, name)
            tree[name] = None if part is None else part._asdict()
        tree["memory"]["total"] = self.memory.total
        return tree


def peak_flops(device: Device, precision: str) -> float:
    """Dense peak of a device, FLOP a second. Raises UserError if it cannot compute in this precision."""
    if device.is_cpu:
        return CPU_CORE_FLOPS
    peak = published_peak(device.name, "tf32" if precision == "fp32" else precision)
    # before TF32
    peak = peak or (published_peak(device.name, "fp32") if precision == "fp32" else None)
    if peak is None:
        raise UserError(
            f"efficiency.precision {precision}: {device.name} does not have it: give fp32 or fp16"
        )
    return peak


def planned_precision(cfg: TrainConfig, device: Device) -> str:
    """The precision of the run on this device, as `auto` resolves there."""
    if cfg.efficiency.precision != "auto":
        return cfg.efficiency.precision
    return "bf16" if not device.is_cpu and published_peak(device.name, "bf16") else "fp32"


def plan_run(
    cfg: TrainConfig,
    cluster: Cluster,
    assumed: Assumptions,
    corpus: PackedCorpus | None = None,
) -> RunPlan:
    """corpus: of the run, if it is known."""
    check_batch(cfg, cluster.world)
    run = cfg.run
    precision = planned_precision(cfg, cluster.device)
    rate = peak_flops(cluster.device, precision) * cluster.devices * assumed.mfu
    objective = build_without_values(cfg)
    configure_blocks(objective, cfg.efficiency.activation_checkpointing)
    count = count_parameters(objective)
    parts = drawn_parts(cfg, objective, cluster.world)
    step = count_step_memory(objective, largest_part(parts), precision)
    memory = _memory(cfg, cluster, count, step, cfg.efficiency.micro_batches, precision)
    couples_clips = objective.couples_clips
    flops_step = flops_without_values(cfg, objective, parts, COUNTED_SIZES)
    fits = _fits(cluster.device, memory, assumed)
    advice = "" if fits else _advice(cfg, cluster, count, step, precision, assumed, couples_clips)
    step_s = flops_step / rate
    clips_s = run.batch / step_s
    weights = FLOAT * (count.trained + count.frozen)
    checkpoint = weights + 2 * FLOAT * count.trained
    save_s = checkpoint / assumed.save_bytes_s
    mtbf_s = HOUR_S * assumed.mtbf_hours / cluster.devices
    best_s = best_interval_s(save_s, mtbf_s)
    losses = (save_s, assumed.restart_s, mtbf_s)
    counts = zip(cfg.data.clips(run.batch), cfg.data.streams(), strict=True)
    cpu_clips = sum(n * stream.windows for n, stream in counts)
    # what is decoded once for several clips of a video is a part of the work
    repeats = 1 - DECODE_SHARE + DECODE_SHARE / cfg.data.repeat
    return RunPlan(
        config=_facts(cfg, cluster, precision),
        parameters=count,
        flops_clip=flops_step / run.batch,
        flops_run=flops_step * run.steps,
        memory=memory,
        kept_clip=(step.kept - step.casts) / step.clips,
        fits=fits,
        advice=advice,
        step_s=step_s,
        run_s=step_s * run.steps,
        clips_s=clips_s,
        cores=0.0 if cfg.data.cache != "none" else cpu_clips / step_s * repeats * assumed.cpu_ms / 1000,
        checkpoint_bytes=checkpoint,
        stored_bytes=_stored_bytes(cfg, count, checkpoint),
        corpus=corpus,
        save_s=save_s,
        mtbf_s=mtbf_s,
        best_save_every=max(1, min(run.steps, round(best_s / step_s))),
        goodput_best=goodput(best_s, *losses),
        goodput=goodput(min(run.save_every, run.steps) * step_s, *losses),
        joules=cluster.device.watts * cluster.devices * assumed.overhead * step_s * run.steps,
        assumptions=assumed,
    )


def _facts(cfg: TrainConfig, cluster: Cluster, precision: str) -> dict[str, Any]:
    run = cfg.run
    return {
        "steps": run.steps,
        "batch": run.batch,
        "micro_batches": cfg.efficiency.micro_batches,
        "activation_checkpointing": cfg.efficiency.activation_checkpointing,
        "save_every": run.save_every,
        "cache": cfg.data.cache,
        "device": cluster.device.name,
        "device_bytes": cluster.device.memory_bytes,
        "devices": cluster.devices,
        "hosts": cluster.hosts,
        "sharding": cluster.sharding,
        "precision": precision,
    }


def _memory(
    cfg: TrainConfig,
    cluster: Cluster,
    count: ParameterCount,
    step: StepMemory,
    micro_batches: int,
    precision: str,
) -> PlannedMemory:
    clips = zip(cfg.data.clips(cfg.run.batch), cfg.data.streams(), strict=True)
    frames = sum(n * stream.clip_frames for n, stream in clips)
    clip_bytes = 3 * frames * cfg.augment.arguments["size"] ** 2 // cluster.world
    rounded = precision != "fp32"
    return planned_memory(count, step, cluster.sharding, cluster.world, micro_batches, clip_bytes, rounded)


def _fits(device: Device, memory: PlannedMemory, assumed: Assumptions) -> bool:
    if device.memory_bytes is None:
        return True
    return memory.total * (1 + assumed.reserve_share) + assumed.reserve_bytes <= device.memory_bytes


def _advice(
    cfg: TrainConfig,
    cluster: Cluster,
    count: ParameterCount,
    step: StepMemory,
    precision: str,
    assumed: Assumptions,
    couples_clips: bool,
) -> str:
    """The fewest micro-batches with which a run fits, or what else there is."""
    now = cfg.efficiency.micro_batches
    if not couples_clips:
        shares = [clips // cluster.world for clips in cfg.data.clips(cfg.run.batch)]
        for parts in range(now + 1, min(shares) + 1):
            if all(share % parts == 0 for share in shares) and parts % now == 0:
                smaller = in_parts(step, parts // now)
                memory = _memory(cfg, cluster, count, smaller, parts, precision)
                if _fits(cluster.device, memory, assumed):
                    return f"efficiency.micro_batches={parts} takes {memory.total / 1e9:.1f} GB"
    more = [] if cfg.efficiency.activation_checkpointing else ["efficiency.activation_checkpointing=true"]
    more += [] if cluster.sharding == "fsdp2" or cluster.world == 1 else ["--sharding fsdp2"]
    return ", ".join([*more, "a smaller run.batch" if cluster.world == 1 else "more devices"])


def _stored_bytes(cfg: TrainConfig, count: ParameterCount, checkpoint: int) -> int:
    """Of all checkpoints that are there at a time (one more than are kept, while it is written), of the
    encoder and of its snapshots."""
    run = cfg.run
    encoders = 1 + bool(count.frozen) + (math.ceil(run.steps / run.save_every) if run.snapshots else 0)
    kept = run.keep_last + 1 + (run.steps // run.keep_every if run.keep_every else 0)
    saved = min(kept, math.ceil(run.steps / run.save_every))
    return saved * checkpoint + encoders * FLOAT * count.encoder


def look_at_corpus(
    cfg: TrainConfig, measured_clips: int, on_gpu: bool
) -> tuple[PackedCorpus | None, float | None]:
    """The corpus of a run, and the CPU milliseconds of a clip if they are measured."""
    shards = open_indexed(cfg)
    cpu_ms = measure_cpu_ms(cfg, shards, measured_clips, on_gpu) if measured_clips else None
    return measure_corpus(shards), cpu_ms

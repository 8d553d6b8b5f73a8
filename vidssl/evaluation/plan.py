"""What a probe takes, before any video is decoded: bytes of features, device memory, FLOPs, and hours at
rates that are measured on this machine with black clips and random tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidssl.core.spectrum import MAX_TOKENS
from vidssl.evaluation.controls import control_name
from vidssl.evaluation.extractor import FeaturePlan
from vidssl.evaluation.feature_cache import FeatureShape, free_gb, missing_gb
from vidssl.evaluation.features import FeatureLoader, decoding_workers
from vidssl.evaluation.heads import Attentive, TrainedHeadProtocol, all_logits, only_cross_attend
from vidssl.evaluation.probe_data import ProbeSplits
from vidssl.evaluation.probing import ProbeRun
from vidssl.evaluation.processes import ONE_PROCESS
from vidssl.evaluation.protocol import ProbeProtocol, TrainingSet
from vidssl.evaluation.tasks import Task

DECODE_S = 0.05  # CPU seconds a clip of 16 frames from 340 x 256 H.264 (tools/bench_data.py)
# Bytes per token and channel of a transformer's forward pass without gradients
ENCODE_BYTES = {"fp32": 40, "bf16": 26}
GIGA = 1e9
# A measurement computes so much, if that is at least one example and at most some batches
MEASURED_FLOPS = {"cpu": 1e11, "device": 3e14}
MEASURED_BATCHES = 4


class RunSize(NamedTuple):
    """Numbers of samples of a row of the results."""

    train: int
    held_out: int  # of train, to compare settings
    test: int


class Work(NamedTuple):
    """Numbers of examples, over all processes."""

    grid: int = 0  # through all settings' heads, forward and backward
    single: int = 0  # the same through one head
    grid_predictions: int = 0  # forward
    single_predictions: int = 0
    read: int = 0  # through no head: statistics and mean tokens

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def examples(self) -> int:
        """Read in all passes."""
        return sum(self)


def run_size(run: ProbeRun, splits: ProbeSplits, protocol: ProbeProtocol) -> RunSize:
    """Undecodable samples are not known yet, and count."""
    labels = splits.label_sets[run.label].labels
    train, test = (sum(label is not None for label in labels[split]) for split in ("train", "test"))
    train = train if run.subset is None else len(run.subset.indices)
    held_out = round(protocol.val_fraction * train) if len(protocol.hyperparameters()) > 1 else 0
    return RunSize(train, held_out, test)


def work_of_run(size: RunSize, protocol: TrainedHeadProtocol) -> Work:
    """Selection of a setting, training with it on all of train, and test."""
    per_sample = protocol.examples_per_sample
    fitted = size.train - size.held_out if size.held_out else 0
    return Work(
        grid=fitted * protocol.epochs,
        single=size.train * protocol.epochs,
        grid_predictions=size.held_out * per_sample,
        single_predictions=size.test * per_sample,
        read=(fitted + size.train) * per_sample if protocol.standardise else 0,
    )


class HeadFlops(NamedTuple):
    """FLOPs of matrix products per example, of one head and of the heads of all settings."""

    forward: float
    training: float  # forward and backward
    grid_forward: float
    grid_training: float

    def of(self, work: Work) -> float:
        return (
            work.grid * self.grid_training
            + work.single * self.training
            + work.grid_predictions * self.grid_forward
            + work.single_predictions * self.forward
        )


def head_flops(protocol: TrainedHeadProtocol, shape: FeatureShape, outputs: int) -> HeadFlops:
    """Counted on tensors without data."""
    clips = protocol.clips_of_example
    source = RandomTokens(shape._replace(samples=1, clips=clips), torch.device("meta"))
    (tokens,) = source.batches(clips, [[0]])

    def count(heads: int) -> tuple[float, float]:
        with torch.device("meta"):
            models = nn.ModuleList(protocol.make_head(source, outputs) for _ in range(heads))
        models.requires_grad_(False)
        with FlopCounterMode(display=False) as forward:
            _ = list(all_logits(list(models), tokens))
        models.requires_grad_(True)
        with FlopCounterMode(display=False) as training:
            torch.stack(list(all_logits(list(models), tokens))).sum().backward()
        return forward.get_total_flops(), training.get_total_flops()

    one = count(1)
    settings = len(protocol.hyperparameters())
    if only_cross_attend([protocol.make_head(source, outputs)]):
        return HeadFlops(*one, *count(settings))
    return HeadFlops(*one, *(settings * flops for flops in one))


class RandomTokens:
    """Features of random numbers, drawn anew for each batch."""

    def __init__(self, shape: FeatureShape, device: torch.device):
        self.shape = shape
        self.device = device
        self.processes = ONE_PROCESS

    def positions(self, samples: Sequence[int]) -> list[int]:
        return list(range(len(samples)))

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        for batch in batches:
            yield torch.randn(
                len(batch), clips_per_example * self.shape.tokens, self.shape.width, device=self.device
            )


def encoder_flops(loader: FeatureLoader) -> float:
    """FLOPs of the matrix products of one clip."""
    # The fused kernels of CPUs are not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loader.shape()
    return counter.get_total_flops()


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """Of the second call; the first one warms up."""
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measured_flops(device: torch.device) -> float:
    return MEASURED_FLOPS["cpu" if device.type == "cpu" else "device"]


def encode_seconds(loader: FeatureLoader, flops: float) -> float:
    """Measured, per clip; in batches as they are encoded, on a CPU of few clips. flops: of a clip."""
    fitting = round(measured_flops(loader.device) / max(1.0, flops))
    clips = max(1, min(loader.examples_per_batch(1), fitting))
    return seconds_of(lambda: loader.shape(clips), loader.device) / clips


def training_seconds(
    protocol: TrainedHeadProtocol, shape: FeatureShape, task: Task, flops: HeadFlops, device: torch.device
) -> tuple[float, float]:
    """Seconds of training per example, measured: of one head, and of the heads of all settings."""
    settings = protocol.hyperparameters()
    source = RandomTokens(shape._replace(clips=protocol.clips_of_example), device)
    joint = only_cross_attend([protocol.make_head(source, task.num_outputs)])

    def measure(count: int, flops_of_example: float) -> float:
        examples = measured_flops(device) / flops_of_example
        batch = max(1, min(protocol.batch, round(examples)))
        samples = batch * max(1, min(MEASURED_BATCHES, round(examples / batch)))
        labels: list[Any] = [[0] if task.kind == "tags" else 0] * samples
        data = TrainingSet(source, list(range(samples)), labels, task.label_tensor(labels, device))
        short = replace(protocol, epochs=1, batch=batch, segments=protocol.clips_of_example, crops=1)
        heads = [protocol.make_head(source, task.num_outputs).to(device) for _ in range(count)]
        return seconds_of(lambda: short.fit(heads, task, data, settings[:count]), device) / samples

    one = measure(1, flops.training)
    if joint:
        return one, measure(len(settings), flops.grid_training)
    return one, one * len(settings)


class DeviceMemory(NamedTuple):
    """Bytes on the device of each process."""

    encoder: float
    encoding: float  # activations of a batch of clips
    heads: float  # weights, gradients and moments of all settings
    activations: float  # of heads, of the examples that they see at once
    at_once: int

    @property
    def peak(self) -> float:
        """Clips are encoded and heads trained in turn."""
        return self.encoder + self.heads + max(self.encoding, self.activations)


def device_memory(plan: FeaturePlan) -> DeviceMemory:
    protocol = plan.protocol
    loader = plan.loaders["train"]
    shape = plan.shapes["train"]
    view = loader.view
    token_bytes = shape.tokens * shape.width * ENCODE_BYTES[protocol.product_precision]
    pixel_bytes = 3 * view.frames * view.size**2 * 9  # u8, normalised f32 and its patches
    clips = loader.examples_per_batch(1)
    encoding = clips * (token_bytes + pixel_bytes)
    if not isinstance(protocol, Attentive):
        return DeviceMemory(plan.weight_bytes, encoding, 0, 0, 0)
    size = protocol.head_size(shape.width, shape.tokens * protocol.clips_of_example)
    at_once = protocol.examples_at_once(size.width, size.tokens)
    return DeviceMemory(
        plan.weight_bytes, encoding, size.state_bytes + size.cast_bytes, at_once * size.example_bytes, at_once
    )


class ProbePlan(NamedTuple):
    """What the rows of one control take."""

    features: FeaturePlan
    work: Work  # of heads, all rows together
    decoded_clips: int
    encoded_clips: int
    clip_flops: float
    head_flops: float
    memory: DeviceMemory
    encode_s: float  # device seconds of all processes together
    heads_s: float

    def lines(self) -> list[str]:
        """For people."""
        loader = self.features.loaders["train"]
        processes = loader.processes.number
        workers = loader.storage.workers
        workers = decoding_workers(loader.device) if workers is None else workers
        at_once = processes * max(1, workers)
        decode_s = self.decoded_clips * DECODE_S
        device_s = (self.encode_s + self.heads_s) / processes
        # decoding processes work beside the device
        wall_s = (
            max(decode_s / (processes * workers), device_s) if workers else decode_s / processes + device_s
        )
        memory = self.memory
        encode_flops = self.encoded_clips * self.clip_flops
        lines = [
            self.features.line,
            f"decoding: {self.decoded_clips} clips, {hours(decode_s)} of a core at {1e3 * DECODE_S:g} ms a "
            f"clip (not measured), {at_once} at once",
            f"encoding: {self.encoded_clips} clips of {self.clip_flops / GIGA:.4g} GFLOP: "
            f"{rate_text(encode_flops, self.encode_s)}",
            f"heads: {self.work.grid + self.work.single} examples in training: "
            f"{rate_text(self.head_flops, self.heads_s)}",
            f"device memory of a process: {memory.peak / GIGA:.3g} GB{of_device(loader.device)} "
            f"(encoder {memory.encoder / GIGA:.3g}, heads with moments {memory.heads / GIGA:.3g}, "
            f"activations of {memory.at_once} examples {memory.activations / GIGA:.3g}, "
            f"or of encoding {memory.encoding / GIGA:.3g})",
        ]
        if self.features.where == "disk":
            folder = Path(str(self.features.protocol.cache))
            needed = missing_gb(list(self.features.stores.values()))
            lines.append(f"disk: {needed:.3g} GB to write to {folder}, {free_gb(folder):.3g} GB free")
        return [*lines, f"in all: about {hours(wall_s)} with {processes} process{'es' * (processes > 1)}"]


def of_device(device: torch.device) -> str:
    """How much memory there is."""
    if device.type != "cuda":
        return ""
    return f" of {torch.cuda.get_device_properties(device).total_memory / GIGA:.3g}"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours" if seconds >= 3600 else f"{seconds:.3g} s"


def rate_text(flops: float, seconds: float) -> str:
    rate = f", at {flops / seconds / 1e12:.3g} TFLOP/s as measured here" if flops and seconds else ""
    return f"{flops / 1e15:.4g} PFLOP, {hours(seconds)} of a device{rate}"


def plan_probe(plan: FeaturePlan, runs: Sequence[ProbeRun], splits: ProbeSplits) -> ProbePlan:
    """Measures on this device for some seconds; decodes nothing. runs: of the plan's control."""
    protocol = plan.protocol
    loader = plan.loaders["train"]
    shape = plan.shapes["train"]
    clips = sum(split.samples * split.clips for split in plan.shapes.values())
    flops = heads_s = 0.0
    total = Work()
    for run in runs:
        if not isinstance(protocol, Attentive):
            break
        task = splits.label_sets[run.label].task
        work = work_of_run(run_size(run, splits, protocol), protocol)
        per_example = head_flops(protocol, shape, task.num_outputs)
        seconds, grid_seconds = training_seconds(protocol, shape, task, per_example, loader.device)
        training = work.single * per_example.training + work.grid * per_example.grid_training
        run_s = work.single * seconds + work.grid * grid_seconds
        # a forward pass runs at the rate of training
        heads_s += run_s * per_example.of(work) / training
        flops += per_example.of(work)
        total = total.plus(work)
    encoded = decoded = clips
    if plan.where == "recompute":
        pooled = min(MAX_TOKENS, shape.samples) * shape.clips
        passes = total.examples * protocol.clips_of_example if total.examples else clips
        encoded = pooled + passes
        decoded = clips + encoded  # all are tried once
    clip_flops = encoder_flops(loader)
    encode_s = encoded * encode_seconds(loader, clip_flops)
    memory = device_memory(plan)
    return ProbePlan(plan, total, decoded, encoded, clip_flops, flops, memory, encode_s, heads_s)


def print_plans(plans: Sequence[FeaturePlan], runs: Sequence[ProbeRun], splits: ProbeSplits) -> None:
    for plan in plans:
        own = [run for run in runs if run.control == plan.control]
        lines = [f"plan of {control_name(plan.control)}:", *plan_probe(plan, own, splits).lines()]
        print("\n  ".join(lines), flush=True)

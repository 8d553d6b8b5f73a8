"""Proposes how a checkpoint is adapted to a corpus: a configuration of train.py, and one reason a line."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vidssl.adaptation.corpus import CorpusFacts
from vidssl.adaptation.families import INFLATED_TUBELET, Continuation
from vidssl.core.errors import UserError

MIN_VIDEOS = 16  # to train on
LANES = 8
BATCH = 32
BATCH_ON_CPU = 8  # of an encoder of more than LARGE parameters
LARGE = 50e6
PASSES = 40  # over the videos
STEPS = (200, 5000)  # at least, at most
IMAGE_FRAMES = 8  # of a clip of an inflated encoder
RATE_SHARE = 0.25  # of the rate with which the checkpoint was trained
BOTTOM_RATE = 0.1  # of the embedding, relative to the last layer
MEMORY_SPAN = 0.25  # of the run, that the average of an EMA may reach back at most
WARMUP, FRESH_WARMUP = 0.05, 0.15  # of the steps
MIN_STEPS = 20  # of a run that is worth its start
EVALUATIONS = 20  # of the held-out error over a run
DEFAULT_STRIDE = 4  # frames, where the rate of the videos is not known


AUGMENT = {"kind": "random_crop", "scale": [0.5, 1.0], "ratio": [0.75, 1.35]}  # no flip: left may be a label


class Machine(NamedTuple):
    """What a budget depends on."""

    has_gpu: bool
    free_bytes: int | None


class Proposal(NamedTuple):
    """tree: sections of a configuration of train.py, beside configs/recipe/adapt.yaml; reasons: a line for
    each choice."""

    tree: dict[str, Any]
    reasons: list[str]


def propose(
    corpus: CorpusFacts,
    train_videos: int,
    model: Mapping[str, Any],
    parameters: float,
    source: Continuation,
    machine: Machine,
    given: Mapping[str, Any],
) -> Proposal:
    """train_videos: those that are left to train on; model: arguments of the checkpoint's Encoder;
    parameters: of it; given: sections that the user gives, which what is not given follows.

    Raises UserError if there are too few videos, or too short ones.
    """
    if train_videos < MIN_VIDEOS:
        raise UserError(
            f"--videos: {train_videos} videos are left to train on; at least {MIN_VIDEOS} are needed: "
            "with fewer, probe the checkpoint as it is (vidssl probe)"
        )
    run, data = given.get("run", {}), given.get("data", {})
    reasons = list(source.reasons)
    frames, timing = clip_of(corpus, model, source, data, reasons)
    size = size_of(corpus, model, given.get("augment", {}).get("size"), reasons)
    batch = batch_of(train_videos, parameters, machine, run.get("batch"), reasons)
    steps = steps_of(train_videos, batch, run.get("steps"), reasons)
    tree: dict[str, Any] = {
        "method": source.method,
        "model": inflated(source.model) if source.is_image else source.model,
        "data": {"frames": frames, **timing, **cache_of(corpus, size, machine, reasons)},
        "run": {"batch": batch, **schedule_of(steps)},
        "optim": rates_of(source, batch, steps, int(model["depth"]), reasons),
    }
    tree["augment"] = {**(source.augment or AUGMENT), "size": size}
    if tree["data"].get("cache") == "host" and not machine.has_gpu:
        tree["efficiency"] = {"workers": 0}
    momentum_of(tree["method"], source.batch, batch, steps, reasons)
    return Proposal(tree, reasons)


def inflated(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of an encoder of images after inflate_to_video."""
    has_table = model["positions"] in ("learned", "sincos_2d")
    positions = {"positions": "learned_separable"} if has_table else {}
    return {**model, "tubelet": INFLATED_TUBELET, **positions}


def clip_of(
    corpus: CorpusFacts,
    model: Mapping[str, Any],
    source: Continuation,
    data: Mapping[str, Any],
    reasons: list[str],
) -> tuple[int, dict[str, Any]]:
    """Frames of a clip, and data.stride or data.fps."""
    tubelet = INFLATED_TUBELET if source.is_image else int(model["tubelet"])
    native = IMAGE_FRAMES if source.is_image else int(model["frames"])
    frames = int(data.get("frames") or native)
    if corpus.frames and not data.get("frames"):
        frames = min(native, corpus.frames // tubelet * tubelet)
        if frames < tubelet:
            raise UserError(f"--videos: a quarter of them have {corpus.frames} frames; {tubelet} make a clip")
    if frames < native and not data.get("frames"):
        reasons.append(f"data.frames {frames}: a quarter of the videos have no {native} frames")
    elif source.is_image:
        reasons.append(f"data.frames {frames}: an encoder of images has no length; short clips cost least")
    elif not data.get("frames"):
        reasons.append(f"data.frames {frames}: the clip of the checkpoint")
    if data.get("stride") or data.get("fps"):
        return frames, {}
    return frames, rate_of(corpus, frames, source, reasons)


def rate_of(corpus: CorpusFacts, frames: int, source: Continuation, reasons: list[str]) -> dict[str, Any]:
    """data.stride or data.fps: the spacing of the checkpoint, or what fits into the videos."""
    wanted = source.stride
    why = "as the checkpoint was trained"
    if wanted is None and source.spacing_s is not None:
        if not corpus.fps:
            wanted = DEFAULT_STRIDE
            why = "the rate of the videos was not measured"
        elif not corpus.has_one_rate:
            fps = 1 / source.spacing_s
            span = (frames - 1) / fps
            if corpus.frames / corpus.fps > span:
                reasons.append(f"data.fps {fps:g}: the checkpoint's; the videos have several rates")
                return {"fps": round(fps, 3)}
            wanted = 1
        else:
            wanted = max(1, round(source.spacing_s * corpus.fps))
            why = f"{1000 * wanted / corpus.fps:.0f} ms apart, about as the checkpoint was trained"
    wanted = wanted or DEFAULT_STRIDE
    fitting = max(1, (corpus.frames - 1) // max(1, frames - 1)) if corpus.frames else wanted
    if fitting < wanted:
        why = f"{wanted} frames apart, as the checkpoint was trained, do not fit into a quarter of the videos"
    stride = min(wanted, fitting)
    reasons.append(f"data.stride {stride}: {why}")
    return {"stride": stride}


def size_of(corpus: CorpusFacts, model: Mapping[str, Any], given: int | None, reasons: list[str]) -> int:
    """Pixels of a clip's side."""
    native = int(model["height"])
    patch = int(model["patch"])
    if given:
        return given
    if not corpus.short_side or corpus.short_side >= native:
        reasons.append(f"augment.size {native}: the size of the checkpoint")
        return native
    size = max(2 * patch, corpus.short_side // patch * patch)
    reasons.append(
        f"augment.size {size}: the videos have {corpus.short_side} pixels; enlarged to {native} they would "
        "show no more"
    )
    return size


def batch_of(videos: int, parameters: float, machine: Machine, given: int | None, reasons: list[str]) -> int:
    """Clips a step."""
    if given:
        return given
    largest = BATCH if machine.has_gpu or parameters < LARGE else BATCH_ON_CPU
    batch = min(largest, videos // LANES * LANES)
    why = f"{videos} videos to train on" if batch < largest else "small batches make many steps of few videos"
    reasons.append(f"run.batch {batch}: {why}")
    return batch


def steps_of(videos: int, batch: int, given: int | None, reasons: list[str]) -> int:
    """Optimizer steps."""
    if given:
        return given
    steps = min(STEPS[1], max(STEPS[0], round(PASSES * videos / batch)))
    reasons.append(f"run.steps {steps}: {steps * batch / videos:.0f} passes over {videos:,} videos")
    return steps


def schedule_of(steps: int) -> dict[str, Any]:
    """Keys of `run` that follow from the number of steps."""
    every = max(1, steps // EVALUATIONS)
    return {"steps": steps, "save_every": every, "validate_every": every, "feature_stats_every": every}


def rates_of(source: Continuation, batch: int, steps: int, depth: int, reasons: list[str]) -> dict[str, Any]:
    """The `optim` section."""
    lr = adapted_rate(source, batch)
    decay = round(BOTTOM_RATE ** (1 / (depth + 1)), 3)
    fresh = not source.has_predictor
    warmup = max(1, round((FRESH_WARMUP if fresh else WARMUP) * steps))
    reasons.append(
        f"optim.lr {lr:g}: {RATE_SHARE:g} of the checkpoint's {source.rate:g} at {source.batch} clips, times "
        f"the root of {batch}/{source.batch}"
    )
    reasons.append(
        f"optim.layer_lr_decay {decay}: the embedding learns at {BOTTOM_RATE:g} of the last layer's rate"
    )
    reasons.append(f"optim.warmup {warmup}: {100 * warmup / steps:.0f} % of the steps")
    return {"lr": lr, "layer_lr_decay": decay, "warmup": warmup}


def adapted_rate(source: Continuation, batch: int) -> float:
    """Learning rate of an adaptation."""
    return float(f"{RATE_SHARE * scratch_rate(source.rate, source.batch, batch):.3g}")


def scratch_rate(rate: float, rate_batch: int, batch: int) -> float:
    """Learning rate of a run from fresh weights: AdamW's, scaled by the root of the batch."""
    return rate * math.sqrt(batch / rate_batch)


def momentum_of(method: dict[str, Any], old_batch: int, batch: int, steps: int, reasons: list[str]) -> None:
    """Sets the momentum of each average in `method`: the published one to the power batch / old batch
    (Busbridge et al. 2023, arXiv 2307.13813), unless it would then reach back over more than MEMORY_SPAN of
    the run: the average, which is evaluated, would stay what it was."""
    longest = max(1.0, MEMORY_SPAN * steps)
    for part in ("target", "score", "agree"):
        section = method.get(part) or {}
        if not section.get("momentum"):
            continue
        scaled = float(section["momentum"][0]) ** (batch / old_batch)
        momentum = round(min(scaled, 1 - 1 / longest), 6)
        section["momentum"] = [momentum, momentum]
        why = f"the published one at {batch} clips a step"
        if momentum < scaled:
            why = f"it reaches back over {MEMORY_SPAN:.0%} of the steps; scaled to the batch, over more"
        reasons.append(f"method.{part}.momentum {momentum}: {why}")


def cache_of(corpus: CorpusFacts, size: int, machine: Machine, reasons: list[str]) -> dict[str, Any]:
    """data.cache and data.short_side where all frames fit into a quarter of the free memory."""
    if not corpus.all_frames or machine.free_bytes is None or machine.has_gpu:
        return {}
    side = min(corpus.short_side, round(1.25 * size))
    scale = (side / max(1, corpus.short_side)) ** 2
    needed = 3 * corpus.all_frames * corpus.area * scale
    if needed > machine.free_bytes / 4:
        return {}
    reasons.append(f"data.cache host: all frames at {side} pixels take {needed / 1e9:.2f} GB")
    return {"cache": "host", "short_side": side}

"""What can be wrong with the configuration of a pre-training run as a whole, checked without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidssl.core.errors import UserError
from vidssl.core.io import check_no_shards, check_writable
from vidssl.core.suggestions import divisors_near, multiples_near

if TYPE_CHECKING:
    from vidssl.training.schema import RunConfig, TrainConfig


def surprising_keys(cfg: TrainConfig) -> list[str]:
    """A line for each pair of keys that has another effect than it seems to."""
    run = cfg.run
    optim = cfg.optim
    cases = (
        (
            optim.warmup > run.steps,
            f"optim.warmup {optim.warmup} is longer than run.steps {run.steps}: "
            "the rate never reaches optim.lr",
        ),
        (optim.warmup_lr > optim.lr, "optim.warmup_lr is above optim.lr: the rate falls in the warm-up"),
        (
            optim.final_lr > optim.lr and optim.lr_decay != "constant",
            "optim.final_lr is above optim.lr: the rate rises after the warm-up",
        ),
        (
            optim.clip_grad is None and (optim.clip_per_module or optim.clip_start > 0),
            "optim.clip_per_module and optim.clip_start do nothing without optim.clip_grad",
        ),
        (
            run.keep_every % run.save_every > 0,
            f"run.keep_every {run.keep_every} is no multiple of run.save_every {run.save_every}: "
            "only checkpoints at multiples of both are kept",
        ),
        (
            run.stop_on_collapse and run.feature_stats_every > run.steps,
            f"run.stop_on_collapse: run.feature_stats_every {run.feature_stats_every} is beyond "
            f"run.steps {run.steps}, so a collapse is not seen",
        ),
        (
            cfg.online_probe.train is not None and cfg.online_probe.every > run.steps,
            f"online_probe.every {cfg.online_probe.every} is beyond run.steps {run.steps}: no online probe",
        ),
    )
    return [text for is_so, text in cases if is_so]


def check_trackers(names: Sequence[str], option: str = "run.trackers") -> None:
    """Raises UserError if the package of a tracker is not installed. option: the key that names them."""
    for name in names:
        if not importlib.util.find_spec(name):
            raise UserError(f"{option}: {name} is not installed: pip install {name}")


def check_output(run: RunConfig) -> None:
    """Raises UserError if the folder cannot be written or holds shards, or a tracker is not installed."""
    check_writable(Path(run.out))
    check_no_shards(Path(run.out), "run.out")
    check_trackers(run.trackers)


def check_sizes(cfg: TrainConfig) -> None:
    """Raises UserError unless clips can be cut into tokens, and widths into heads."""
    model = cfg.model.arguments
    predictor = cfg.method.predictor.arguments
    keys = ["data.frames", *(f"data.extra_streams[{i}].frames" for i in range(len(cfg.data.extra_streams)))]
    units = [
        (key, stream.frames, "model.tubelet", model["tubelet"])
        for key, stream in zip(keys, cfg.data.streams(), strict=True)
        if not (stream.frames == 1 and model["image_tokenizer"])
    ]
    units.append(("augment.size", cfg.augment.arguments["size"], "model.patch", model["patch"]))
    for key, value, unit_key, unit in units:
        if value % unit:
            near = multiples_near(value, unit)
            raise UserError(f"{key} {value} is not a multiple of {unit_key} {unit}: give {near}")
    heads = [("model.heads", model.get("heads"), "model.dim", model.get("dim"))]
    heads.append(
        ("method.predictor.heads", predictor.get("heads"), "method.predictor.width", predictor.get("width"))
    )
    for key, count, width_key, width in heads:
        if count and width and width % count:
            near = divisors_near(width, count)
            raise UserError(f"{key} {count} does not divide {width_key} {width}: give {near}")


def check_augmentation(cfg: TrainConfig) -> None:
    """Raises UserError if augmentation makes clips of another length than those of a stream, or cannot be
    where data.cache=device needs it."""
    if cfg.augment.kind == "crop_pair":
        for stream in cfg.data.streams():
            if stream.clip_frames != 2:
                raise UserError(
                    f"augment.kind crop_pair makes clips of 2 frames, not {stream.clip_frames}: "
                    "give data.frames=2 data.windows=1"
                )
    if cfg.data.cache != "device":
        return
    if cfg.augment.arguments.get("randaugment"):
        raise UserError("augment.randaugment runs on the host alone: give data.cache=host instead of device")
    if cfg.data.augment_on == "host":
        raise UserError(
            "data.augment_on=host: the clips of data.cache=device are made there: give data.cache=host, "
            "or another data.augment_on"
        )


def check_validation(cfg: TrainConfig) -> None:
    """Raises UserError if a held-out error is asked for that cannot be measured, or its best step is not
    saved."""
    run = cfg.run
    if cfg.data.val is None:
        if run.patience is not None:
            raise UserError("run.patience: is counted in measurements on data.val: give data.val, too")
        return
    if cfg.validate_every % run.save_every:
        near = multiples_near(cfg.validate_every, run.save_every)
        raise UserError(
            f"run.validate_every {run.validate_every} is not a multiple of run.save_every {run.save_every}, "
            f"so that the best step would not be saved: give {near}"
        )
    if cfg.data.windows > 1:
        raise UserError("data.val: the held-out clips have one window: leave it out with data.windows")


def check_batch(cfg: TrainConfig, world: int) -> None:
    """Raises UserError if the clips of a step cannot be divided evenly over lanes, processes and
    micro-batches."""
    # imported here, so that --help is answered without NumPy
    from vidssl.data.order import check_split

    for stream, clips in enumerate(cfg.data.clips(cfg.run.batch)):
        name = f"data.extra_streams[{stream - 1}].clips"
        if stream == 0:
            name = "run.batch" + (" less data.extra_streams's clips:" if cfg.data.extra_streams else "")
        check_split(clips, cfg.run.lanes, world, name, cfg.data.repeat)
        share = clips // world
        if share % cfg.efficiency.micro_batches:
            raise UserError(
                f"efficiency.micro_batches {cfg.efficiency.micro_batches} "
                f"does not divide {share} clips a process: "
                f"give {divisors_near(share, cfg.efficiency.micro_batches)}"
            )

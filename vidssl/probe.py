r"""Frozen evaluation: encoder -> tokens -> head chosen on held-out train -> one look at test -> probe.json.

    accelerate launch vidssl/probe.py configs/probe/attentive.yaml encoder=RUN \
        data.train=SHARDS data.test=SHARDS out=DIR

encoder: a run folder, a file of ours, a public checkpoint, timm:NAME or hf:FOLDER_OR_NAME (see zoo/foreign.py).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from pydantic import BeforeValidator, Field
from torch import Tensor

from vidssl import config
from vidssl.config import Count, Names, Part, Positive, Size, Value
from vidssl.data.shards import Sample, Shards
from vidssl.errors import UserError, run_cli
from vidssl.evaluation.features import Encode, Feed, Source, make_features, place
from vidssl.evaluation.heads import Attentive, Linear
from vidssl.evaluation.judge import Asked, check_apart, check_readable, evaluate
from vidssl.evaluation.neighbours import Knn, Retrieval
from vidssl.evaluation.protocol import Protocol, label_free
from vidssl.evaluation.report import (
    Told,
    code_hash,
    low_shot_summary,
    weights_hash,
    write_lists,
    write_report,
    write_tables,
)
from vidssl.evaluation.subsets import list_text, low_shot
from vidssl.evaluation.tasks import class_of, make_task
from vidssl.evaluation.views import Control, Order, PatchMeans, View
from vidssl.files import check_out, make_folder
from vidssl.meter import keep_memory
from vidssl.objective.targets import normalise
from vidssl.zoo.foreign import open_encoder
from vidssl.zoo.native import Loaded

PROTOCOLS = {"attentive": Attentive, "linear": Linear, "knn": Knn, "retrieval": Retrieval}
FEATURE_CODE = ("data/", "model/", "zoo/", "evaluation/views.py")  # what decides features: a change asks for new ones
Portion = Annotated[float, Field(gt=0, lt=1)]
Shares = Annotated[tuple[Portion, ...], BeforeValidator(lambda v: v if isinstance(v, list | tuple) else [v])]


@dataclass(frozen=True)
class ProbeData:
    """The `data` section of a probe."""

    train: Names  # packed folders with labels
    test: Names
    labels: Names | None = None  # label sets to probe; None: all that the data have
    tags: tuple[str, ...] = ()  # of these, label sets whose classes are several, joined by "|" (multi-label)
    numbers: tuple[str, ...] = ()  # of these, label sets whose classes are numbers (regression)
    frames: Count | None = None  # of a clip; None: the encoder's own (an image model has none)
    size: Count | None = None  # pixels; None: the encoder's own
    stride: Count | None = None  # frames; None (and fps None): as the encoder was trained
    fps: Positive | None = None  # frames a second
    share: Shares = ()  # low-shot: parts of train, each drawn anew with each of `seeds`; (): all of train
    seeds: Annotated[tuple[Size, ...], Field(min_length=1)] = (0, 1, 2)
    cache_dir: str | None = None  # where remote shards are kept; None: the user's cache folder
    cache_gb: Positive = 100  # how much of them

    def __post_init__(self) -> None:
        if self.stride is not None and self.fps is not None:
            raise UserError("data: give stride (in frames) or fps (frames a second), not both")


SCHEMA: config.Schema = {
    "encoder": Value(str),
    "encoder_file": Value(str | None, None),  # weights of a timm model; None: timm downloads them
    "out": Value(str),
    "random_init": Value(bool, False),  # the same encoder untrained, for comparison
    "data": Part(ProbeData),
    "probe": Part(PROTOCOLS),
}


Open = Callable[[int | None], Loaded]  # a seed for the encoder untrained, or None


class Side(NamedTuple):
    """Train or test."""

    shards: Shards
    samples: list[Sample]  # that carry any of the labels; the others are not even read


class Eye(NamedTuple):
    """What looks at the videos: an encoder, and all that decides its features."""

    encode: Encode
    about: dict[str, Any]


def make_view(data: ProbeData, protocol: Protocol, loaded: Loaded, control: Control) -> View:
    """The clip the encoder was trained on, unless the configuration says otherwise."""
    model, trained = loaded.about["model"], loaded.about.get("config")
    if model["height"] != model["width"]:
        raise UserError(f"encoder: its clips are {model['height']} x {model['width']} px; a probe's are square")
    stride, fps, frames = data.stride, data.fps, data.frames or model["frames"]
    if stride is None and fps is None:
        if frames == 1:
            stride = 1
        elif trained is None:
            raise UserError(
                "a public checkpoint does not say how far apart its frames are: give data.stride or data.fps"
            )
        else:
            stride, fps = trained["data"]["stride"], trained["data"]["fps"]
    order: Order = "none" if control in ("random_init", "pixels") else control  # type: ignore[assignment]
    seen = None
    if control == "single":  # by the model's own embedding of images, or repeated to fill one patch
        if model.get("fixed"):
            raise UserError(f"{model['name']} sees clips of {frames} frames only: use the control 'still'")
        order, seen = "still", 1 if model.get("image_tokenizer") else model["tubelet"]
    return View(frames, stride, fps, protocol.segments, protocol.crops, data.size or model["height"], order, seen)


def make_eye(anew: Open, loaded: Loaded, control: Control, seed: int, accelerator: Accelerator) -> Eye:
    """The encoder, or what a control puts in its place; anew: opens it untrained, with a seed."""
    model, pixels = loaded.about["model"], loaded.about["pixels"]
    if control == "pixels":
        means = PatchMeans(model["tubelet"], model["patch"])
        about = {"encoder": "patch means", "tubelet": means.tubelet, "patch": means.patch}
        return Eye(lambda video: means(normalise(video, (pixels["mean"], pixels["std"]))), {**about, "pixels": pixels})
    encoder = loaded.encoder if control != "random_init" else anew(seed).encoder
    encoder.to(accelerator.device)

    def encode(video: Tensor) -> Tensor:
        with accelerator.autocast():
            return encoder(normalise(video, (pixels["mean"], pixels["std"]))).float()

    about = {"encoder": weights_hash(encoder), "model": model, "precision": accelerator.mixed_precision}
    return Eye(encode, {**about, "pixels": pixels})


def label_sets(train: Shards, test: Shards, wanted: list[str] | None) -> list[str]:
    """The label sets to probe; each must be in both data sets with the same classes."""
    have = [name for name in train.classes if name in test.classes]
    for name in wanted or have:
        if name not in have:
            raise UserError(f"data.labels: no label '{name}' in both data sets; there is {have or 'none'}")
        if train.classes[name] != test.classes[name]:
            raise UserError(f"label '{name}': the classes of train and test differ; pack both with one labels.csv")
    if not have:
        raise UserError("the data sets have no label in common: a probe needs labels (see data_prep.pack)")
    return wanted or have


def labelled(shards: Shards, labels: list[str]) -> list[Sample]:
    """The samples that carry any of the labels; the others are not even read."""
    return [s for s in shards.all() if any(class_of(s, name) is not None for name in labels)]


def look(
    protocol: Protocol, eye: Eye, view: View, sides: dict[str, Side], accelerator: Accelerator, control: Control
) -> tuple[dict[str, tuple[Source, dict[int, str]]], dict[str, float]]:
    """The features of train and test under a control: (what heads see of them, number -> why it could not be read); and
    scores of train's that need no labels."""
    feeds = {
        name: Feed(eye.encode, side.shards, side.samples, view, accelerator, protocol, f"features {name} ({control})")
        for name, side in sides.items()
    }
    shape = feeds["train"].shape()
    shapes = {name: shape._replace(samples=len(side.samples)) for name, side in sides.items()}
    code = code_hash(*FEATURE_CODE)
    keys = {n: hashlib.sha256("\n".join(s.key for s in side.samples).encode()).hexdigest() for n, side in sides.items()}
    abouts = {
        name: {**eye.about, "view": list(view), "data": side.shards.hash, "samples": keys[name], "code": code}
        for name, side in sides.items()
    }
    where, said = place([*shapes.values()], [*abouts.values()], protocol, accelerator.num_processes)
    accelerator.print(f"{control}: {said}")
    out, scores = {}, {}
    for name, side in sides.items():
        features = make_features(feeds[name], shapes[name], where, abouts[name])
        check_readable(features, side.samples, protocol.allow_unreadable, name)
        read = [n for n in range(len(side.samples)) if n not in features.unreadable]
        if accelerator.is_main_process:
            out[name] = protocol.look(features.source, read, accelerator.device), features.unreadable
            if name == "train":
                scores = label_free(features.source, read, protocol)
    return out, scores


def main(argv: list[str]) -> None:
    cfg = config.load(argv, SCHEMA)
    data, protocol = config.build(cfg["data"], ProbeData), config.build(cfg["probe"], PROTOCOLS)
    opened: Open = partial(open_encoder, cfg["encoder"], file=cfg["encoder_file"], frames=data.frames, size=data.size)
    loaded = opened(protocol.seed if cfg["random_init"] else None)
    shards = {n: Shards(d, data.cache_dir, data.cache_gb) for n, d in (("train", data.train), ("test", data.test))}
    labels = label_sets(shards["train"], shards["test"], data.labels)
    sides = {name: Side(part, labelled(part, labels)) for name, part in shards.items()}
    train, test = sides["train"].samples, sides["test"].samples
    shared_groups, keys = check_apart(train, test), [s.key for s in train]
    kinds = dict.fromkeys(data.tags, "tags") | dict.fromkeys(data.numbers, "number")
    tasks = {n: make_task(n, shards["train"].classes[n], train, test, kinds.get(n, "class")) for n in labels}
    out = Path(cfg["out"])
    if (out / "probe.json").exists():
        raise UserError(f"{out / 'probe.json'} exists: the test set was read for it; give another out=")
    check_out(out)
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while the first trains heads
    keep_memory()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])

    results: list[dict[str, Any]] = []
    told: list[Told] = []
    lists: dict[str, str] = {}
    scores: dict[str, dict[str, float]] = {}
    for control in protocol.controls:
        view = make_view(data, protocol, loaded, control)
        eye = make_eye(opened, loaded, control, protocol.seed, accelerator)
        seen, scores[control] = look(protocol, eye, view, sides, accelerator, control)
        if not accelerator.is_main_process:
            continue
        for label, (task, *truths) in tasks.items():
            first, second = (
                Asked(seen[name][0], side.samples, truth, seen[name][1])
                for (name, side), truth in zip(sides.items(), truths, strict=True)
            )
            for share, seed in [(s, seed) for s in data.share for seed in data.seeds] or [(None, None)]:
                about: dict[str, Any] = {"control": control, "protocol": cfg["probe"]["kind"]}
                among = None
                if share is not None:
                    among = low_shot(task, keys, truths[0], share, seed)
                    lists[name := f"{label}-{share:g}-seed{seed}.txt"] = text = list_text(keys, among)
                    sha256 = hashlib.sha256(text.encode()).hexdigest()
                    about |= {"share": share, "list_seed": seed, "list": f"lists/{name}", "list_sha256": sha256}
                row, lines = evaluate(protocol, task, first, second, among, accelerator.device)
                results.append({**about, **row})
                which = (label, control, "" if share is None else f"{share:g}", "" if seed is None else str(seed))
                told += [Told(*which, *line) for line in lines]
                low, high = row["ci95"]
                accelerator.print(f"{' '.join(which):22s} {row['metric']} {row['value']:6.2f}  [{low}, {high}]")
    if accelerator.is_main_process:
        make_folder(out)
        write_lists(out, lists)
        write_tables(out, told, {label for label, (task, *_) in tasks.items() if task.kind == "class"})
        report = {
            "results": results,
            "low_shot": low_shot_summary(results),
            "label_free": scores,
            "data": {name: part.hash for name, part in shards.items()},
            "test_samples_of_train_groups": shared_groups,
            "seed": protocol.seed,
        }
        write_report(out / "probe.json", cfg, loaded, report)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_cli(main, __doc__)

r"""Frozen evaluation: encoder -> tokens -> head chosen on held-out train -> one look at test -> probe.json.

    accelerate launch vidssl/probe.py configs/probe/attentive.yaml encoder=RUN \
        data.train=SHARDS data.test=SHARDS out=DIR

encoder: a run folder, a file of ours, a public checkpoint, timm:NAME or hf:FOLDER_OR_NAME (see pretrained/external.py).
"""

import hashlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from vidssl import config
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder
from vidssl.core.pixels import normalise
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.evaluate import LabelledFeatures, check_disjoint, check_readable, evaluate
from vidssl.evaluation.features import Encode, FeatureLoader, TokenSource, choose_storage, compute_features
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probe_data import make_view
from vidssl.evaluation.protocol import ProbeProtocol, label_free
from vidssl.evaluation.report import (
    PredictionRow,
    code_hash,
    low_shot_summary,
    weights_hash,
    write_lists,
    write_report,
    write_tables,
)
from vidssl.evaluation.splits import label_sets, labelled, list_text, low_shot
from vidssl.evaluation.tasks import make_task
from vidssl.evaluation.views import Control, PatchMeans, View
from vidssl.pretrained.external import open_encoder
from vidssl.pretrained.load import LoadedEncoder
from vidssl.training.malloc import tune_malloc

FEATURE_CODE = (
    "data/",
    "model/",
    "zoo/",
    "evaluation/views.py",
)  # what decides features: a change asks for new ones


OpenEncoder = Callable[[int | None], LoadedEncoder]  # a seed for the encoder untrained, or None


class Split(NamedTuple):
    """Train or test."""

    shards: Shards
    samples: list[Sample]  # that carry any of the labels; the others are not even read


class FeatureExtractor(NamedTuple):
    """What looks at the videos: an encoder, and all that decides its features."""

    encode: Encode
    about: dict[str, Any]


def make_extractor(
    anew: OpenEncoder, loaded: LoadedEncoder, control: Control, seed: int, accelerator: Accelerator
) -> FeatureExtractor:
    """The encoder, or what a control puts in its place; anew: opens it untrained, with a seed."""
    model, pixels = loaded.metadata["model"], loaded.metadata["pixels"]
    if control == "pixels":
        means = PatchMeans(model["tubelet"], model["patch"])
        about = {"encoder": "patch means", "tubelet": means.tubelet, "patch": means.patch}
        return FeatureExtractor(
            lambda video: means(normalise(video, (pixels["mean"], pixels["std"]))),
            {**about, "pixels": pixels},
        )
    encoder = loaded.encoder if control != "random_init" else anew(seed).encoder
    encoder.to(accelerator.device)

    def encode(video: Tensor) -> Tensor:
        with accelerator.autocast():
            return encoder(normalise(video, (pixels["mean"], pixels["std"]))).float()

    about = {"encoder": weights_hash(encoder), "model": model, "precision": accelerator.mixed_precision}
    return FeatureExtractor(encode, {**about, "pixels": pixels})


def extract_features(
    protocol: ProbeProtocol,
    eye: FeatureExtractor,
    view: View,
    sides: dict[str, Split],
    accelerator: Accelerator,
    control: Control,
) -> tuple[dict[str, tuple[TokenSource, dict[int, str]]], dict[str, float]]:
    """The features of train and test under a control: (what heads see of them, number -> why it could not be read); and
    scores of train's that need no labels."""
    feeds = {
        name: FeatureLoader(
            eye.encode, side.shards, side.samples, view, accelerator, protocol, f"features {name} ({control})"
        )
        for name, side in sides.items()
    }
    shape = feeds["train"].shape()
    shapes = {name: shape._replace(samples=len(side.samples)) for name, side in sides.items()}
    code = code_hash(*FEATURE_CODE)
    keys = {
        n: hashlib.sha256("\n".join(s.key for s in side.samples).encode()).hexdigest()
        for n, side in sides.items()
    }
    abouts = {
        name: {**eye.about, "view": list(view), "data": side.shards.hash, "samples": keys[name], "code": code}
        for name, side in sides.items()
    }
    where, said = choose_storage([*shapes.values()], [*abouts.values()], protocol, accelerator.num_processes)
    accelerator.print(f"{control}: {said}")
    out, scores = {}, {}
    for name, side in sides.items():
        features = compute_features(feeds[name], shapes[name], where, abouts[name])
        check_readable(features, side.samples, protocol.allow_unreadable, name)
        read = [n for n in range(len(side.samples)) if n not in features.unreadable]
        if accelerator.is_main_process:
            out[name] = protocol.look(features.source, read, accelerator.device), features.unreadable
            if name == "train":
                scores = label_free(features.source, read, protocol)
    return out, scores


def main(argv: list[str]) -> None:
    cfg = config.load_config(argv, ProbeConfig)
    data, protocol = cfg.data, cfg.probe.build()
    opened: OpenEncoder = partial(
        open_encoder, cfg.encoder, file=cfg.encoder_file, frames=data.frames, size=data.size
    )
    loaded = opened(protocol.seed if cfg.random_init else None)
    shards = {
        n: Shards(d, data.cache_dir, data.cache_gb) for n, d in (("train", data.train), ("test", data.test))
    }
    labels = label_sets(shards["train"], shards["test"], data.labels)
    sides = {name: Split(part, labelled(part, labels)) for name, part in shards.items()}
    train, test = sides["train"].samples, sides["test"].samples
    shared_groups, keys = check_disjoint(train, test), [s.key for s in train]
    kinds = dict.fromkeys(data.tags, "tags") | dict.fromkeys(data.numbers, "number")
    tasks = {n: make_task(n, shards["train"].classes[n], train, test, kinds.get(n, "class")) for n in labels}
    out = Path(cfg.out)
    if (out / "probe.json").exists():
        raise UserError(f"{out / 'probe.json'} exists: the test set was read for it; give another out=")
    check_writable(out)
    patience = InitProcessGroupKwargs(
        timeout=timedelta(days=1)
    )  # the others wait while the first trains heads
    tune_malloc()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])

    results: list[dict[str, Any]] = []
    told: list[PredictionRow] = []
    lists: dict[str, str] = {}
    scores: dict[str, dict[str, float]] = {}
    for control in protocol.controls:
        view = make_view(data, protocol, loaded, control)
        eye = make_extractor(opened, loaded, control, protocol.seed, accelerator)
        seen, scores[control] = extract_features(protocol, eye, view, sides, accelerator, control)
        if not accelerator.is_main_process:
            continue
        for label, (task, *truths) in tasks.items():
            first, second = (
                LabelledFeatures(seen[name][0], side.samples, truth, seen[name][1])
                for (name, side), truth in zip(sides.items(), truths, strict=True)
            )
            draws: list[tuple[float | None, int | None]]
            draws = [(share, seed) for share in data.train_fractions for seed in data.seeds]
            for share, seed in draws or [(None, None)]:
                about: dict[str, Any] = {"control": control, "protocol": cfg.probe.kind}
                among = None
                if share is not None and seed is not None:
                    among = low_shot(task, keys, truths[0], share, seed)
                    lists[name := f"{label}-{share:g}-seed{seed}.txt"] = text = list_text(keys, among)
                    sha256 = hashlib.sha256(text.encode()).hexdigest()
                    about |= {
                        "share": share,
                        "list_seed": seed,
                        "list": f"lists/{name}",
                        "list_sha256": sha256,
                    }
                row, lines = evaluate(protocol, task, first, second, among, accelerator.device)
                results.append({**about, **row})
                which = (
                    label,
                    control,
                    "" if share is None else f"{share:g}",
                    "" if seed is None else str(seed),
                )
                told += [PredictionRow(*which, *line) for line in lines]
                low, high = row["ci95"]
                accelerator.print(
                    f"{' '.join(which):22s} {row['metric']} {row['value']:6.2f}  [{low}, {high}]"
                )
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
        write_report(out / "probe.json", config.to_tree(cfg), loaded, report)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_cli(main, __doc__)

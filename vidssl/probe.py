r"""Frozen evaluation: encoder -> tokens -> head chosen on held-out train -> one look at test -> probe.json.

    accelerate launch vidssl/probe.py configs/probe/attentive.yaml encoder=RUN \
        data.train=SHARDS data.test=SHARDS out=DIR
"""

import csv
import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

import vidssl
from vidssl import config
from vidssl.config import Count, Names, Part, Positive, Value
from vidssl.data.shards import Sample, Shards
from vidssl.errors import UserError, run_cli
from vidssl.evaluation.features import Control, Features, View, extract
from vidssl.evaluation.heads import PROTOCOLS, Attentive, Labelled, fit, predict, standardiser
from vidssl.evaluation.metrics import accuracy, interval
from vidssl.files import check_out, make_folder, replace
from vidssl.objective.targets import normalise
from vidssl.zoo.native import Loaded, load_encoder


@dataclass(frozen=True)
class ProbeData:
    """The `data` section of a probe."""

    train: Names  # packed folders with labels
    test: Names
    labels: Names | None = None  # label sets to probe; None: all that the data have
    stride: Count | None = None  # frames; None (and fps None): as the encoder was trained
    fps: Positive | None = None  # frames a second

    def __post_init__(self) -> None:
        if self.stride is not None and self.fps is not None:
            raise UserError("data: give stride (in frames) or fps (frames a second), not both")


SCHEMA: config.Schema = {
    "encoder": Value(str),
    "out": Value(str),
    "random_init": Value(bool, False),  # the same encoder untrained, for comparison
    "data": Part(ProbeData),
    "probe": Part(PROTOCOLS),
}


def make_view(data: ProbeData, protocol: Attentive, loaded: Loaded, control: Control) -> View:
    """The clip the encoder was trained on, unless the configuration says otherwise."""
    model, trained = loaded.about["model"], loaded.about.get("config")
    if model["height"] != model["width"]:
        raise UserError(f"encoder: its clips are {model['height']} x {model['width']} px; a probe's are square")
    stride, fps = data.stride, data.fps
    if stride is None and fps is None:
        if model["frames"] == 1:
            stride = 1
        elif trained is None:
            raise UserError(
                "a public checkpoint does not say how far apart its frames are: give data.stride or data.fps"
            )
        else:
            stride, fps = trained["data"]["stride"], trained["data"]["fps"]
    return View(model["frames"], stride, fps, protocol.segments, model["height"], control)


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


def class_of(sample: Sample, label: str) -> int:
    """Number of the sample's class; -1: it does not carry the label."""
    return sample.meta["labels"].get(label, -1)


def labelled(shards: Shards, labels: list[str]) -> list[Sample]:
    """The samples that carry any of the labels; the others are not even read."""
    return [s for s in shards.all() if any(class_of(s, name) >= 0 for name in labels)]


def select(features: Features, samples: list[Sample], label: str, device: torch.device) -> tuple[Labelled, list[int]]:
    """The samples that were read and carry the label, and their numbers."""
    rows = [(i, n) for i, n in enumerate(features.read) if class_of(samples[n], label) >= 0]
    if not rows:
        raise UserError(f"no sample has a label of '{label}'")
    tokens = features.tokens[[i for i, _ in rows]].to(device)
    labels = torch.tensor([class_of(samples[n], label) for _, n in rows], device=device)
    return Labelled(tokens, labels), [n for _, n in rows]


def groups_of(samples: list[Sample], numbers: list[int]) -> list[str]:
    """A sample without a group is a group of its own."""
    return [samples[n].meta.get("group") or f"sample {samples[n].key}" for n in numbers]


def evaluate(
    protocol: Attentive,
    label: str,
    classes: list[str],
    sets: dict[str, tuple[list[Sample], Features]],
    device: torch.device,
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """One row of results, and (key, truth, predicted) of every labelled test sample; unreadable ones count as wrong."""
    (train_samples, train_features), (test_samples, test_features) = sets["train"], sets["test"]
    train, train_numbers = select(train_features, train_samples, label, device)
    prepare = standardiser(train.tokens) if protocol.standardise else lambda tokens: tokens
    train = train._replace(tokens=prepare(train.tokens))
    head, chosen = fit(protocol, train, groups_of(train_samples, train_numbers), len(classes))
    test, numbers = select(test_features, test_samples, label, device)
    predicted = predict(head, prepare(test.tokens), protocol.batch).argmax(1).tolist()
    guesses: dict[int, int] = dict(zip(numbers, predicted, strict=True))
    asked = [n for n, s in enumerate(test_samples) if class_of(s, label) >= 0]
    truth = [class_of(test_samples[n], label) for n in asked]
    right = np.array([guesses.get(n, -1) == t for n, t in zip(asked, truth, strict=True)])
    row = {
        "label": label,
        "accuracy": accuracy(right),
        "ci95": interval(right, groups_of(test_samples, asked), protocol.seed),
        "n_test": len(asked),
        "n_train": len(train.label),
        "chance": round(100 / len(classes), 2),
        "chosen": chosen,
        "unreadable": {test_samples[n].key: r for n, r in test_features.unreadable.items()},
    }
    names = [classes[guesses[n]] if n in guesses else "" for n in asked]
    return row, [(test_samples[n].key, classes[t], g) for n, t, g in zip(asked, truth, names, strict=True)]


def check_readable(features: Features, samples: list[Sample], allowed: bool, name: str) -> None:
    """Evaluation replaces nothing: a sample that cannot be read is an error unless it may be counted as wrong."""
    if features.unreadable and not allowed:
        listed = ", ".join(f"{samples[n].key} ({reason})" for n, reason in list(features.unreadable.items())[:3])
        raise UserError(
            f"{len(features.unreadable)} {name} sample(s) cannot be decoded: {listed}; mend the data, or set "
            f"probe.allow_unreadable=true (unreadable test samples then count as wrong and are listed)"
        )


def weights_hash(encoder: torch.nn.Module) -> str:
    """SHA-256 over the names and bytes of the weights: what was really evaluated."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_csv(path: Path, predictions: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([("label", "control", "key", "truth", "predicted"), *predictions])


def main(argv: list[str]) -> None:
    cfg = config.load(argv, SCHEMA)
    data, protocol = config.build(cfg["data"], ProbeData), config.build(cfg["probe"], PROTOCOLS)
    loaded = load_encoder(cfg["encoder"], protocol.seed if cfg["random_init"] else None)
    shards = {"train": Shards(data.train), "test": Shards(data.test)}
    labels = label_sets(shards["train"], shards["test"], data.labels)
    samples = {name: labelled(part, labels) for name, part in shards.items()}
    out = Path(cfg["out"])
    if (out / "probe.json").exists():
        raise UserError(f"{out / 'probe.json'} exists: the test set was read for it; give another out=")

    check_out(out)
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # the others wait while the first trains heads
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    encoder = loaded.encoder.to(accelerator.device)
    pixels = loaded.about["pixels"]["mean"], loaded.about["pixels"]["std"]

    def encode(video: torch.Tensor) -> torch.Tensor:
        return encoder(normalise(video, pixels))

    results: list[dict[str, Any]] = []
    predictions: list[tuple[str, ...]] = []
    for control in protocol.controls:
        view = make_view(data, protocol, loaded, control)
        sets = {}
        for name, part in shards.items():
            options = (protocol.encode_batch, protocol.workers, protocol.memory_gb)
            features = extract(
                lambda video: encoder(normalise(video, pixels)), part, samples[name], view, accelerator, *options
            )
            check_readable(features, samples[name], protocol.allow_unreadable, name)
            sets[name] = samples[name], features
        if not accelerator.is_main_process:
            continue
        for label in labels:
            row, told = evaluate(protocol, label, shards["train"].classes[label], sets, accelerator.device)
            results.append({"control": control, "protocol": cfg["probe"]["kind"], **row})
            predictions += [(label, control, *t) for t in told]
            accelerator.print(
                f"{label:12s} {control:9s} {row['accuracy']:6.2f} %  [{row['ci95'][0]}, {row['ci95'][1]}]"
            )
    if accelerator.is_main_process:
        make_folder(out)
        replace(out / "predictions.csv", lambda beside: write_csv(beside, predictions))
        report = {
            "results": results,
            "encoder": {"path": cfg["encoder"], "random_init": cfg["random_init"], "sha256": weights_hash(encoder)},
            "trained": {k: loaded.about.get(k) for k in ("step", "data", "source")},
            "data": {name: part.hash for name, part in shards.items()},
            "seed": protocol.seed,
            "versions": {"vidssl": vidssl.__version__, "torch": str(torch.__version__)},
            "config": cfg,
        }
        text = json.dumps(report, indent=1, allow_nan=False)
        replace(out / "probe.json", lambda beside: beside.write_text(text))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_cli(main, __doc__)

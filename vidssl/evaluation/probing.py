"""Runs a probe under a control for every label set and low-shot list, and writes the results."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vidssl import config
from vidssl.core.io import make_folder
from vidssl.evaluation.evaluate import LabelledFeatures, evaluate
from vidssl.evaluation.extractor import FeaturePlan
from vidssl.evaluation.features import Features
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probe_data import LabelSet, ProbeSplits
from vidssl.evaluation.report import (
    PredictionRow,
    low_shot_summary,
    write_json_report,
    write_lists,
    write_tables,
)
from vidssl.evaluation.splits import list_text, low_shot
from vidssl.pretrained.load import LoadedEncoder


class LowShotList(NamedTuple):
    """A subset of train."""

    fraction: float
    seed: int
    indices: list[int]
    text: str


@dataclass
class ProbeResults:
    """Everything that a probe writes, in the order in which it was computed."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[PredictionRow] = field(default_factory=list)
    lists: dict[str, str] = field(default_factory=dict)  # name -> text of each low-shot list
    label_free: dict[str, dict[str, float]] = field(default_factory=dict)  # control -> scores of train


def low_shot_lists(cfg: ProbeConfig, label_set: LabelSet, keys: list[str]) -> list[LowShotList | None]:
    """The low-shot lists of a label set, or [None] for all of train. keys: of the train samples."""
    lists: list[LowShotList | None] = []
    for fraction in cfg.data.train_fractions:
        for seed in cfg.data.seeds:
            indices = low_shot(label_set.task, keys, label_set.labels["train"], fraction, seed)
            lists.append(LowShotList(fraction, seed, indices, list_text(keys, indices)))
    return lists or [None]


def evaluate_control(
    results: ProbeResults,
    cfg: ProbeConfig,
    plan: FeaturePlan,
    probe_splits: ProbeSplits,
    features: dict[str, Features],
    device: torch.device,
) -> None:
    """Adds the rows and predictions of every label set and low-shot list to `results`, and prints a line for
    each."""
    control = plan.control
    keys = [sample.key for sample in probe_splits.splits["train"].samples]
    for name, label_set in probe_splits.label_sets.items():
        train, test = (
            LabelledFeatures(
                features[split].source,
                probe_splits.splits[split].samples,
                label_set.labels[split],
                features[split].unreadable,
            )
            for split in ("train", "test")
        )
        for subset in low_shot_lists(cfg, label_set, keys):
            facts: dict[str, Any] = {"control": control, "protocol": cfg.probe.kind}
            run = (name, control, "", "")
            if subset is not None:
                file = f"{name}-{subset.fraction:g}-seed{subset.seed}.txt"
                results.lists[file] = subset.text
                run = (name, control, f"{subset.fraction:g}", str(subset.seed))
                facts |= {
                    "train_fraction": subset.fraction,
                    "list_seed": subset.seed,
                    "list": f"lists/{file}",
                    "list_sha256": hashlib.sha256(subset.text.encode()).hexdigest(),
                }
            row, predictions = evaluate(
                plan.protocol, label_set.task, train, test, subset and subset.indices, device
            )
            results.rows.append({**facts, **row})
            results.predictions += [PredictionRow(*run, *prediction) for prediction in predictions]
            low, high = row["ci95"]
            print(f"{' '.join(run):22s} {row['metric']} {row['value']:6.2f}  [{low}, {high}]", flush=True)


def write_probe_results(
    out: Path,
    results: ProbeResults,
    cfg: ProbeConfig,
    probe_splits: ProbeSplits,
    loaded: LoadedEncoder,
    seed: int,
) -> None:
    """Writes probe.json and the tables and lists beside it."""
    make_folder(out)
    write_lists(out, results.lists)
    classes = {name for name, label_set in probe_splits.label_sets.items() if label_set.task.kind == "class"}
    write_tables(out, results.predictions, classes)
    report = {
        "results": results.rows,
        "low_shot": low_shot_summary(results.rows),
        "label_free": results.label_free,
        "data": {name: split.shards.hash for name, split in probe_splits.splits.items()},
        "test_samples_of_train_groups": probe_splits.shared_groups,
        "seed": seed,
    }
    write_json_report(out / "probe.json", config.to_tree(cfg), loaded, report)

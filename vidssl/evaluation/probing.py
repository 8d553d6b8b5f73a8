"""Runs a probe under a control for every label set and low-shot list, and writes the results."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from vidssl import config
from vidssl.core.io import make_folder
from vidssl.core.log import show
from vidssl.data.parts import distinct_keys
from vidssl.evaluation.controls import Control
from vidssl.evaluation.evaluate import LabelledFeatures, evaluate
from vidssl.evaluation.features import Features
from vidssl.evaluation.finished_rows import FinishedRows
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probe_data import LabelSet, ProbeSplits
from vidssl.evaluation.protocol import ProbeProtocol
from vidssl.evaluation.report import (
    PredictionRow,
    code_hash,
    encoder_facts,
    low_shot_summary,
    write_json_report,
    write_lists,
    write_tables,
)
from vidssl.evaluation.saved_heads import save_head
from vidssl.evaluation.splits import list_text, low_shot
from vidssl.pretrained.load import LoadedEncoder


class LowShotList(NamedTuple):
    """A subset of train."""

    fraction: float
    seed: int
    indices: list[int]
    text: str


class ProbeRun(NamedTuple):
    """One row of the results."""

    label: str  # label set
    control: Control
    subset: LowShotList | None  # None: all of train
    protocol: str  # kind

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Label set, control, fraction and seed, as in predictions.csv."""
        if self.subset is None:
            return (self.label, self.control, "", "")
        return (self.label, self.control, f"{self.subset.fraction:g}", str(self.subset.seed))

    @property
    def list_name(self) -> str:
        assert self.subset is not None
        return f"{self.label}-{self.subset.fraction:g}-seed{self.subset.seed}.txt"

    def facts(self) -> dict[str, Any]:
        """What a row says about its condition."""
        condition = {"control": self.control, "protocol": self.protocol}
        if self.subset is None:
            return condition
        return {
            **condition,
            "train_fraction": self.subset.fraction,
            "list_seed": self.subset.seed,
            "list": f"lists/{self.list_name}",
            "list_sha256": hashlib.sha256(self.subset.text.encode()).hexdigest(),
        }


def probe_runs(cfg: ProbeConfig, splits: ProbeSplits, controls: Sequence[Control]) -> list[ProbeRun]:
    """The rows of a probe, in the order in which they are computed."""
    keys = distinct_keys(splits.splits["train"].samples)
    lists = {name: low_shot_lists(cfg, label_set, keys) for name, label_set in splits.label_sets.items()}
    return [
        ProbeRun(name, control, subset, str(cfg.probe.kind))
        for control in controls
        for name, subsets in lists.items()
        for subset in subsets
    ]


# Options of the `probe` section that change no row.
RESUME_MUTABLE = {
    *("cache", "cache_gb", "memory_gb", "recompute", "encode_batch", "workers"),
    *("decode_timeout_s", "decode_memory_mb", "head_memory_gb"),
}


def probe_fingerprint(cfg: ProbeConfig, splits: ProbeSplits, loaded: LoadedEncoder, precision: str) -> str:
    """SHA-256 of everything that decides the rows of a probe. precision: resolved."""
    tree = config.to_tree(cfg)
    tree.pop("out")
    for name in ("cache_dir", "cache_gb"):
        tree["data"].pop(name)
    tree["probe"] = {name: value for name, value in tree["probe"].items() if name not in RESUME_MUTABLE}
    hashes = [split.shards.hash for split in splits.splits.values()]
    facts = [tree, precision, hashes, encoder_facts(loaded.encoder, loaded.metadata), code_hash()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def low_shot_lists(cfg: ProbeConfig, label_set: LabelSet, keys: list[str]) -> list[LowShotList | None]:
    """The low-shot lists of a label set, or [None] for all of train. keys: distinct ones of the train
    samples."""
    lists: list[LowShotList | None] = []
    for fraction in cfg.data.train_fractions:
        for seed in cfg.data.seeds:
            indices = low_shot(label_set.task, keys, label_set.labels["train"], fraction, seed)
            lists.append(LowShotList(fraction, seed, indices, list_text(keys, indices)))
    return lists or [None]


def evaluate_run(
    run: ProbeRun,
    protocol: ProbeProtocol,
    probe_splits: ProbeSplits,
    features: dict[str, Features],
    finished: FinishedRows,
    accelerator: Accelerator,
) -> None:
    """Trains and tests the head of a row. The first process adds the row and its predictions to `finished`,
    and prints a line.

    protocol: fitted to the features."""
    label_set = probe_splits.label_sets[run.label]
    train, test = (
        LabelledFeatures(
            features[split].source,
            probe_splits.splits[split].samples,
            label_set.labels[split],
            features[split].unreadable,
        )
        for split in ("train", "test")
    )
    subset = None if run.subset is None else run.subset.indices
    # one head for each label set: those of controls and of low-shot lists answer no further question
    is_kept = accelerator.is_main_process and run.control == "none" and run.subset is None
    keep = partial(save_head, finished.path.parent) if is_kept else None
    row, predictions = evaluate(protocol, label_set.task, train, test, subset, accelerator.device, keep)
    if not accelerator.is_main_process:
        return
    rows = [PredictionRow(*run.key, *prediction) for prediction in predictions]
    finished.add(run.key, {**run.facts(), **row}, rows)
    low, high = row["ci95"]
    name = " ".join(part for part in run.key if part not in ("", "none"))
    show(f"{name:22s} {row['metric']} {row['value']:6.2f}  [{low}, {high}]")


def write_probe_results(
    out: Path,
    runs: list[ProbeRun],
    finished: FinishedRows,
    cfg: ProbeConfig,
    probe_splits: ProbeSplits,
    loaded: LoadedEncoder,
    protocol: ProbeProtocol,
) -> None:
    """Writes probe.json and the tables and lists beside it."""
    make_folder(out)
    rows = [finished.rows[run.key] for run in runs]
    predictions = [prediction for run in runs for prediction in finished.predictions[run.key]]
    write_lists(out, {run.list_name: run.subset.text for run in runs if run.subset is not None})
    classes = {name for name, label_set in probe_splits.label_sets.items() if label_set.task.kind == "class"}
    write_tables(out, predictions, classes)
    report = {
        "results": rows,
        "low_shot": low_shot_summary(rows),
        "label_free": finished.scores,
        "data": {name: split.shards.hash for name, split in probe_splits.splits.items()},
        "test_samples_of_train_groups": probe_splits.shared_groups,
        "seed": protocol.seed,
        "precision": protocol.precision,
    }
    write_json_report(out / "probe.json", config.to_tree(cfg), loaded, report)
    finished.remove()

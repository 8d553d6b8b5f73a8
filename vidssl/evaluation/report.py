"""Files of a finished evaluation: the JSON report, predictions, tables of classes, low-shot lists; and
hashes."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import vidssl
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, check_writable, make_folder
from vidssl.core.tables import write_csv
from vidssl.pretrained.load import LoadedEncoder


class PredictionRow(NamedTuple):
    """A row of predictions.csv: a test sample and the prediction of a head for it."""

    label: str
    control: str
    train_fraction: str  # low-shot; "": all of train
    seed: str  # of the low-shot list
    key: str
    group: str  # "": the sample is a group of its own
    truth: str
    predicted: str  # "": the sample cannot be decoded
    outputs: str  # probabilities in the order of the classes, or the number


RUN_COLUMNS = PredictionRow._fields[:4]


def new_report_folder(out: Path, name: str) -> Path:
    """Checks that the report OUT/NAME can be written and does not exist, so that no test set is evaluated
    twice into one place. Returns the folder."""
    if (out / name).exists():
        raise UserError(
            f"{out / name} already exists; choose another out= (a test set is evaluated once per report)"
        )
    check_writable(out)
    return out


def write_tables(out: Path, predictions: list[PredictionRow], class_labels: set[str]) -> None:
    """Writes predictions.csv, and for the label sets `class_labels` (one class per sample) per_class.csv and
    confusion.csv, of the classes that occur."""
    write_csv(out / "predictions.csv", PredictionRow._fields, predictions)
    pairs = Counter((*p[:4], p.truth, p.predicted) for p in predictions if p.label in class_labels)
    confusion = ((*pair, count) for pair, count in pairs.items())
    write_csv(out / "confusion.csv", (*RUN_COLUMNS, "truth", "predicted", "n"), confusion)
    sizes: Counter[tuple] = Counter()
    for (*run, truth, _), count in pairs.items():
        sizes[(*run, truth)] += count
    per_class = []
    for key, count in sizes.items():
        correct = pairs[(*key, key[-1])]
        per_class.append((*key, count, correct, round(100 * correct / count, 2)))
    write_csv(out / "per_class.csv", (*RUN_COLUMNS, "class", "n", "right", "accuracy"), per_class)


def write_lists(out: Path, lists: dict[str, str]) -> None:
    """Writes the low-shot lists (name -> text) into OUT/lists."""
    if lists:
        make_folder(out / "lists")
    for name, text in lists.items():
        atomic_write_text(out / "lists" / name, text)


def low_shot_summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation (n - 1) over the lists of each label, control and fraction of train."""
    runs: dict[tuple, list[dict[str, Any]]] = {}
    for row in results:
        if "train_fraction" in row:
            runs.setdefault((row["label"], row["control"], row["train_fraction"]), []).append(row)
    summary = []
    for (label, control, fraction), rows in runs.items():
        values = np.array([row["value"] for row in rows])
        summary.append(
            {
                "label": label,
                "control": control,
                "train_fraction": fraction,
                "metric": rows[0]["metric"],
                "mean": round(float(values.mean()), 4),
                "deviation": round(float(values.std(ddof=1)), 4) if len(rows) > 1 else None,
                "lists": {str(row["list_seed"]): row["list_sha256"] for row in rows},
            }
        )
    return summary


def weights_hash(encoder: nn.Module) -> str:
    """SHA-256 over the names and bytes of the weights: which encoder was evaluated."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_facts(encoder: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the features of an encoder: hash of its weights, arguments of its model, mean and std of
    its pixels. Heads, epsilons and fixed positions leave no trace in the weights. metadata: of LoadedEncoder;
    where a model of another library is from decides nothing."""
    model = {name: value for name, value in metadata["model"].items() if name not in ("name", "library")}
    return {"sha256": weights_hash(encoder), "model": model, "pixels": metadata["pixels"]}


def is_same_encoder(stored: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the encoder of a file is that of `now`, its encoder_facts. Files of earlier versions have only
    the hash of the weights; what a file lacks is not compared."""
    known = json.loads(json.dumps(now))  # tuples are lists in a file
    return all(stored[key] == value for key, value in known.items() if key == "sha256" or key in stored)


def code_hash(*prefixes: str) -> str:
    """SHA-256 over the names and text of vidssl's modules (only those whose path starts with one of
    `prefixes`)."""
    root = Path(vidssl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not prefixes or name.startswith(prefixes):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_json_report(
    path: Path, config: dict[str, Any], loaded: LoadedEncoder, contents: dict[str, Any]
) -> None:
    """Writes probe.json or dense.json: its own contents, and facts about the encoder, the code and the
    options.

    config: the resolved tree.
    """
    options = {k: config[k] for k in ("random_init", "encoder_file") if k in config}
    report: dict[str, Any] = {
        **contents,
        "encoder": {"path": config["encoder"], **options, **encoder_facts(loaded.encoder, loaded.metadata)},
        "trained": {k: loaded.metadata.get(k) for k in ("step", "data", "source")},
        "versions": {"vidssl": vidssl.__version__, "torch": str(torch.__version__), "code": code_hash()},
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "config": config,
    }
    text = json.dumps(report, indent=1, allow_nan=False)
    atomic_write_text(path, text)

"""What a probe leaves behind beside probe.json: predictions, tables of classes, the low-shot lists; and hashes."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import vidssl
from vidssl.core.io import atomic_write, make_folder
from vidssl.pretrained.load import LoadedEncoder


class PredictionRow(NamedTuple):
    """A test sample, and what a head says of it: a line of predictions.csv."""

    label: str
    control: str
    share: str  # of train (low-shot), or nothing
    seed: str  # of the list
    key: str
    group: str  # nothing: the sample is its own
    truth: str
    predicted: str  # nothing: it could not be read
    outputs: str  # probabilities in the order of the classes, or the number


def outputs_text(output: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in output)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    def write(beside: Path) -> None:
        with open(beside, "w", newline="") as f:
            csv.writer(f).writerows([header, *rows])

    atomic_write(path, write)


def write_tables(out: Path, told: list[PredictionRow], class_labels: set[str]) -> None:
    """predictions.csv; and of labels with one class a sample per_class.csv and confusion.csv (what occurs)."""
    write_csv(out / "predictions.csv", PredictionRow._fields, told)
    pairs = Counter((*t[:4], t.truth, t.predicted) for t in told if t.label in class_labels)
    write_csv(
        out / "confusion.csv",
        (*PredictionRow._fields[:4], "truth", "predicted", "n"),
        ((*k, n) for k, n in pairs.items()),
    )
    sizes: Counter[tuple] = Counter()
    for (*run, truth, _), n in pairs.items():
        sizes[(*run, truth)] += n
    rows = [(*k, n, pairs[(*k, k[-1])], round(100 * pairs[(*k, k[-1])] / n, 2)) for k, n in sizes.items()]
    write_csv(out / "per_class.csv", (*PredictionRow._fields[:4], "class", "n", "right", "accuracy"), rows)


def write_lists(out: Path, lists: dict[str, str]) -> None:
    """Name -> text of each low-shot list, into OUT/lists."""
    if lists:
        make_folder(out / "lists")
    for name, text in lists.items():
        atomic_write(out / "lists" / name, partial(Path.write_text, data=text))


def low_shot_summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation (n - 1) over the lists of each label, control and share."""
    parts: dict[tuple, list[dict[str, Any]]] = {}
    for row in results:
        if "share" in row:
            parts.setdefault((row["label"], row["control"], row["share"]), []).append(row)
    out = []
    for (label, control, share), rows in parts.items():
        values = np.array([row["value"] for row in rows])
        deviation = round(float(values.std(ddof=1)), 4) if len(rows) > 1 else None
        told = {"metric": rows[0]["metric"], "mean": round(float(values.mean()), 4), "deviation": deviation}
        lists = {str(row["list_seed"]): row["list_sha256"] for row in rows}
        out.append({"label": label, "control": control, "share": share, **told, "lists": lists})
    return out


def weights_hash(encoder: nn.Module) -> str:
    """SHA-256 over the names and bytes of the weights: what was really evaluated."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def code_hash(*parts: str) -> str:
    """SHA-256 over the names and text of vidssl's modules (under `parts`, if given)."""
    root, digest = Path(vidssl.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not parts or name.startswith(parts):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_report(path: Path, cfg: dict[str, Any], loaded: LoadedEncoder, own: dict[str, Any]) -> None:
    """probe.json or dense.json: its own part, and what every report says of the encoder, the code and the options."""
    encoder: dict[str, Any] = {k: cfg[k] for k in ("random_init", "encoder_file") if k in cfg}
    report = {
        **own,
        "encoder": {"path": cfg["encoder"], **encoder, "sha256": weights_hash(loaded.encoder)},
        "trained": {k: loaded.metadata.get(k) for k in ("step", "data", "source")},
        "versions": {"vidssl": vidssl.__version__, "torch": str(torch.__version__), "code": code_hash()},
        "config_sha256": hashlib.sha256(json.dumps(cfg, sort_keys=True).encode()).hexdigest(),
        "config": cfg,
    }
    text = json.dumps(report, indent=1, allow_nan=False)
    atomic_write(path, lambda beside: beside.write_text(text))

"""The chosen heads of a probe, kept beside its report: OUT/heads/LABEL.safetensors, with the statistics of
train that its tokens are standardised with."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.io import make_folder, read_json_object
from vidssl.evaluation.protocol import Standardisation, TrainedProbe
from vidssl.model.heads import AttentiveHead
from vidssl.pretrained.content import content_hash
from vidssl.pretrained.files import load_weights, save_weights

FOLDER = "heads"


class SavedHead(NamedTuple):
    """An attentive head and what it needs of train."""

    head: AttentiveHead
    mean: Tensor | None  # f32 [clips * N, D]; None: tokens are not standardised
    std: Tensor | None  # f32 [D]
    label: str  # label set
    kind: str  # of the task
    names: list[str]  # of its classes

    def standardise(self, tokens: Tensor) -> Tensor:
        """Tokens f32 [B, N, D] of a clip as the head sees them; of several clips those of the first."""
        if self.mean is None or self.std is None:
            return tokens
        return (tokens - self.mean[: tokens.shape[1]]) / self.std


def save_head(out: Path, probe: TrainedProbe) -> dict[str, Any]:
    """Writes an attentive head into OUT/heads. Returns the entry `head` of its row; none for other models."""
    head = probe.model
    if not isinstance(head, AttentiveHead):
        return {}
    task = probe.task
    weights = {f"head.{name}": value for name, value in head.state_dict().items()}
    standardise = probe.apply_standardisation
    if isinstance(standardise, Standardisation):
        weights |= {"mean": standardise.mean, "std": standardise.std}
    size = {
        "dim": head.query_tokens.shape[-1],
        "heads": head.xattn.heads,
        "classes": head.linear.out_features,
        "depth": len(head.blocks) + 1,
    }
    make_folder(out / FOLDER)
    file = out / FOLDER / f"{task.label}.safetensors"
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_weights(file, weights, {"head": size, "label": task.label, "kind": task.kind, "names": task.names})
    return {"head": {"file": f"{FOLDER}/{file.name}", "sha256": content_hash(weights)}}


def load_saved_head(probe: Path, label: str | None = None) -> tuple[SavedHead, dict[str, Any]]:
    """Reads the head of a label set (None: the first that has one) of a probe's folder, and its probe.json.
    Raises UserError if it has none, or one with another hash than the report says."""
    report = read_json_object(probe / "probe.json", "run the probe again")
    entries = {row["label"]: row["head"] for row in report.get("results", []) if "head" in row}
    if not entries:
        raise UserError(
            f"{probe}: has no saved head: attentive probes save them, of control none and of all of train"
        )
    if label is not None and label not in entries:
        raise UserError(f"{probe}: no head for label set '{label}'; it has {', '.join(entries)}")
    entry = entries[label or next(iter(entries))]
    file = probe / entry["file"]
    weights, header = load_weights(file)
    if content_hash(weights) != entry["sha256"]:
        raise UserError(f"{file}: is not the head that probe.json names; run the probe again")
    head = AttentiveHead(**header["head"])
    own = {name.removeprefix("head."): value for name, value in weights.items() if name.startswith("head.")}
    head.load_state_dict(own)
    head.eval().requires_grad_(False)
    saved = SavedHead(
        head, weights.get("mean"), weights.get("std"), header["label"], header["kind"], header["names"]
    )
    return saved, report

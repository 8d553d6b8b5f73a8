"""Which objective continues a checkpoint, and the schedule it was trained with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vidssl.config import from_tree, merge
from vidssl.data.timing import middle_rate
from vidssl.model.schema import NATIVE_SIZE_KEYS
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.training.schema import TrainConfig

VIDEO_RATE = 30.0  # frames per second of the corpora of published models
INFLATED_TUBELET = 2
FRESH_PREDICTOR = {"kind": "joint", "depth": 4}


class Published(NamedTuple):
    """How a family of published checkpoints was trained (configs/method, configs/data)."""

    method: str  # its file
    batch: int  # clips a step that its rate refers to
    spacing_s: float  # seconds between two frames of a clip


PUBLISHED = {
    "V-JEPA": Published("vjepa", 3072, 4 / VIDEO_RATE),
    "V-JEPA 2": Published("vjepa2", 3072, 1 / 4),
    "V-JEPA 2.1": Published("vjepa2_1", 3072, 1 / 4),
    "VideoMAE": Published("videomae", 2048, 4 / VIDEO_RATE),
    "MAE-ST": Published("mae_st", 256, 4 / VIDEO_RATE),
}
OF_IMAGES = {"I-JEPA": "V-JEPA", "MAE": "VideoMAE"}  # what continues encoders of images
PLAIN = "VideoMAE"  # what continues all others


class Continuation(NamedTuple):
    """The objective that goes on from a checkpoint, and how it was trained."""

    method: dict[str, Any]  # section of the configuration
    model: dict[str, Any]
    augment: dict[str, Any] | None  # of an own run; None: that of configs/recipe/adapt.yaml
    rate: float  # learning rate at `batch`
    batch: int
    stride: int | None  # frames between those of a clip; None: spacing_s
    spacing_s: float | None  # seconds between those
    is_image: bool
    has_predictor: bool  # whether its weights are taken
    reasons: list[str]


def continuation_of(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> Continuation:
    """metadata: header of a file of ours, as read_checkpoint_file returns it."""
    stored = metadata.get("config", {})
    if "method" in stored:
        return _of_own_run(checkpoint, stored)
    return _of_published(checkpoint, str(metadata.get("source", checkpoint.format)))


def _of_own_run(checkpoint: Checkpoint, stored: dict[str, Any]) -> Continuation:
    cfg = from_tree(stored, TrainConfig, "--from")
    stride, rate = middle_rate(cfg.data.stride, cfg.data.fps)
    joint = (cfg.method.predictor.kind, cfg.method.query.kind) == ("joint", "token")
    has_predictor = joint and checkpoint.predictor is not None
    kind = cfg.method.target.kind if cfg.method.predicts else "agreement or pretext"
    reasons = [f"method: that of its own run (target {kind}), for which its features were made"]
    reasons += _predictor_reasons(cfg.method.predicts, has_predictor)
    return Continuation(
        stored["method"],
        stored["model"],
        stored["augment"],
        cfg.optim.scaled(cfg.run.batch).lr,
        cfg.run.batch,
        stride,
        None if rate is None else 1 / rate,
        checkpoint.model["tubelet"] == 1,
        has_predictor,
        reasons,
    )


def _of_published(checkpoint: Checkpoint, family: str) -> Continuation:
    is_image = checkpoint.model["tubelet"] == 1
    continues = OF_IMAGES.get(family, PLAIN) if is_image else family
    known = PUBLISHED.get(continues, PUBLISHED[PLAIN])
    tree = merge([f"configs/method/{known.method}.yaml"])[0]
    method = tree["method"]
    reasons = _family_reasons(family, known.method, is_image)
    if method["mask"].get("truncate_over"):
        method["mask"]["truncate_over"] = None
    has_predictor = checkpoint.predictor is not None and not is_image
    if checkpoint.predictor is not None and has_predictor:
        options = {k: v for k, v in checkpoint.predictor.items() if k != "out"}
        method["predictor"] = {"kind": "joint", **options}
    else:
        method["predictor"] = fresh_predictor(method["predictor"], checkpoint.model)
    reasons += _predictor_reasons(True, has_predictor)
    model = {k: v for k, v in checkpoint.model.items() if k not in NATIVE_SIZE_KEYS}
    model = {"kind": "vit", **{k: list(v) if isinstance(v, tuple) else v for k, v in model.items()}}
    return Continuation(
        method,
        model,
        None,
        float(tree["optim"]["lr"]),
        known.batch,
        None,
        known.spacing_s,
        is_image,
        has_predictor,
        reasons,
    )


def fresh_predictor(published: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """A predictor for an encoder whose file has none: half its width, four layers."""
    heads = max(1, model["heads"] // 2)
    width = max(heads * 8, model["dim"] // 2 // heads * heads)
    kept = {k: v for k, v in published.items() if k not in ("class_token", "rope_grid")}
    positions = "rope" if str(model["positions"]).startswith("rope") else "sincos_uniform"
    return {**kept, **FRESH_PREDICTOR, "width": width, "heads": heads, "positions": positions}


def _family_reasons(family: str, method: str, is_image: bool) -> list[str]:
    if not is_image and family in PUBLISHED:
        return [f"method: {method}, with which {family} was trained"]
    if family == "I-JEPA":
        return ["method: vjepa, since I-JEPA predicts features, too; its kernel is inflated to two frames"]
    if family == "MAE":
        return ["method: videomae, since MAE predicts pixels, too; its kernel is inflated to two frames"]
    how = "; its kernel is inflated to two frames" if is_image else ""
    why = "pixels need no second encoder and cannot collapse, and the file does not say how it was trained"
    return [f"method: videomae for a plain ViT: {why}{how}"]


def _predictor_reasons(predicts: bool, has_predictor: bool) -> list[str]:
    if has_predictor:
        return ["predictor: from the file"]
    if predicts:
        return ["predictor: drawn anew, since the file has none that fits: the warm-up is longer"]
    return ["projector: drawn anew: the files of an encoder have none"]

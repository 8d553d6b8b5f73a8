"""Results of fine-tuning: the classifier as weight files, probe.json and the tables beside it."""

from pathlib import Path
from typing import Any

import numpy as np

from vidssl.config import to_tree
from vidssl.core.log import show
from vidssl.evaluation.evaluate import LabelledFeatures, score_predictions
from vidssl.evaluation.report import PredictionRow, write_json_report, write_tables
from vidssl.model.heads import HEAD_EPS, AttentiveHead
from vidssl.model.vit import LAYER_NORM_EPS
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.load import LoadedEncoder
from vidssl.training.finetune_schema import FinetuneConfig
from vidssl.training.finetuning import Classifier, FinetuneSplits


def mean_over_clips(predictions: LabelledFeatures) -> np.ndarray:
    """Outputs f64 [n, C], averaged over the clips of each sample; NaN where the sample could not be
    decoded."""
    n, clips = predictions.source.shape[:2]
    (outputs,) = predictions.source.batches(clips, [list(range(n))])
    means = outputs.mean(1).double().cpu().numpy()
    means[list(predictions.unreadable)] = np.nan
    return means


def export_classifier(
    out: Path, classifier: Classifier, loaded: LoadedEncoder, metadata: dict[str, Any]
) -> None:
    """Writes encoder.safetensors and head.safetensors, for a probe, another fine-tuning or a conversion.

    loaded: the encoder that was fine-tuned.
    """
    weights = classifier.encoder.state_dict()
    checkpoint = Checkpoint("vidssl", classifier.arguments, weights, loaded.metadata["pixels"])
    checkpoint.head = classifier.head.state_dict()
    checkpoint.head_eps = LAYER_NORM_EPS
    if isinstance(classifier.head, AttentiveHead):
        checkpoint.head_heads = classifier.head.xattn.heads
        checkpoint.head_eps = HEAD_EPS
    save_native(out, checkpoint, metadata)


def write_finetune_results(
    out: Path,
    cfg: FinetuneConfig,
    loaded: LoadedEncoder,
    splits: FinetuneSplits,
    predictions: LabelledFeatures,
    chosen: dict[str, Any],
    libraries: dict[str, str],
) -> None:
    """Writes probe.json and the tables beside it, in the format of a probe, and prints the main result."""
    label_set = splits.task.label
    row, lines = score_predictions(splits.task, predictions, mean_over_clips(predictions), cfg.tune.seed)
    row |= {"n_train": len(splits.train_places), "chosen": chosen}
    write_tables(out, [PredictionRow(label_set, "none", "", "", *line) for line in lines], {label_set})
    report = {
        "results": [{"control": "none", "protocol": "finetune", **row}],
        "low_shot": [],
        "data": {name: shards.hash for name, shards in splits.shards.items()},
        "test_samples_of_train_groups": splits.shared_groups,
        "seed": cfg.tune.seed,
        "libraries": libraries,
    }
    write_json_report(out / "probe.json", to_tree(cfg), loaded, report)
    show(f"{row['label']} {row['metric']} {row['value']:.2f}  {row['ci95']}")

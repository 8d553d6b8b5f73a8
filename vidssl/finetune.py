r"""Fine-tuning: trains encoder and head end to end on labelled shards; one evaluation on test -> probe.json.

    accelerate launch vidssl/finetune.py configs/finetune/videomae_k400.yaml encoder=RUN \
        data.train=SHARDS data.test=SHARDS out=DIR

The epoch is selected on a part of train that is held out by groups. The same command resumes after a kill
from the end of the last epoch, and after SIGTERM (exit status 75) from the step after which it was requested.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vidssl.config import load_config, to_tree
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, os_errors_as_user_errors
from vidssl.core.log import set_log_level
from vidssl.evaluation.evaluate import LabelledFeatures, score_predictions
from vidssl.evaluation.probe_data import encoder_view
from vidssl.evaluation.report import PredictionRow, weights_hash, write_report, write_tables
from vidssl.pretrained.load import LoadedEncoder, load_encoder
from vidssl.training.checkpoint import provenance
from vidssl.training.distributed import Strategy
from vidssl.training.finetune_loop import Finetuner, build_finetuner, mean_over_clips
from vidssl.training.finetuning import (
    RESUME_MUTABLE,
    FinetuneConfig,
    FinetuneSplits,
    check_divisible,
    export_classifier,
    open_splits,
)
from vidssl.training.loss_guard import LossGuard
from vidssl.training.malloc import tune_malloc
from vidssl.training.metrics_log import check_trackers
from vidssl.training.preemption import exit_on_lost_peer
from vidssl.training.run_folder import RunFolder
from vidssl.training.state import RunState


def write_results(
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
    write_report(out / "probe.json", to_tree(cfg), loaded, report)
    print(f"{row['label']} {row['metric']} {row['value']:.2f}  {row['ci95']}")


def train(finetuner: Finetuner, state: RunState) -> None:
    """Trains to the end of the last epoch. Raises Preempted after SIGTERM, with the last step saved."""
    start = state.restore()
    tracks = bool(finetuner.config.tune.trackers)
    tree = state.provenance["config"]
    with RunFolder(state.out, tree, start, finetuner.steps, state.strategy, tracks) as folder:
        done = finetuner.train(state, start, folder)
    if done < finetuner.steps:
        state.strategy.close()
    folder.finish(done, False, state.writer)


@exit_on_lost_peer()
def main(argv: list[str]) -> None:
    cfg = load_config(argv, FinetuneConfig)
    tune = cfg.tune
    out = Path(cfg.out)
    if (out / "probe.json").exists():
        raise UserError(f"{out / 'probe.json'} exists: the test set was read for it; give another out=")
    check_writable(out)
    check_trackers(tune.trackers)
    if cfg.efficiency.threads:
        torch.set_num_threads(cfg.efficiency.threads)
    if cfg.efficiency.tune_malloc:
        tune_malloc()
    loaded = load_encoder(cfg.encoder, tune.seed if cfg.random_init else None)
    splits = open_splits(cfg.data, tune)
    view = encoder_view(loaded, tune.segments, tune.crops, stride=cfg.data.stride, fps=cfg.data.fps)
    cfg = replace(cfg, data=replace(cfg.data, stride=view.stride, fps=view.fps))
    hashes = [shards.hash for shards in splits.shards.values()]
    hashes.append(weights_hash(loaded.encoder))
    run_provenance = provenance(to_tree(cfg), hashlib.sha256(" ".join(hashes).encode()).hexdigest())

    strategy = Strategy.from_env(
        cfg.efficiency,
        unused_parameters=loaded.encoder.patch_embed_img is not None or len(loaded.encoder.level_norms) > 0,
        allow_sharding=False,
        log_with=list(tune.trackers) or None,
        project_dir=out,
    )
    set_log_level(strategy.is_main)
    check_divisible(tune, cfg.efficiency, strategy.world)
    finetuner = build_finetuner(cfg, strategy, loaded, splits, view)
    guard = LossGuard(
        tune.max_consecutive_skips,
        tune.max_rollbacks,
        tune.loss_spike_std,
        scaled=strategy.scaler is not None,
    )
    state = RunState(
        strategy,
        finetuner.selection,
        finetuner.optimizer,
        guard,
        out,
        run_provenance,
        FinetuneConfig,
        finetuner.steps,
        RESUME_MUTABLE,
        keep_last=1,
        selection=finetuner.selection,
    )
    train(finetuner, state)

    chosen = finetuner.selection.select(len(splits.held_out[0]))
    predictions = finetuner.predict(splits.shards["test"], *splits.test, view, "test")
    if strategy.is_main:
        with os_errors_as_user_errors(out):
            metadata = {**run_provenance, "step": chosen["step"]}
            export_classifier(out, finetuner.selection.now, loaded, metadata)
            write_results(out, cfg, loaded, splits, predictions, chosen, run_provenance["libraries"])
    strategy.close()


if __name__ == "__main__":
    run_cli(main, __doc__)

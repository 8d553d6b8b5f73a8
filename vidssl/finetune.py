r"""Fine-tuning: trains encoder and head end to end on labelled shards; one evaluation on test -> probe.json.

    vidssl finetune configs/finetune/videomae_k400.yaml encoder=RUN \
        data.train=SHARDS data.test=SHARDS out=DIR

The epoch is selected on a part of train that is held out by groups. The same command resumes after a kill
from the end of the last epoch, and after SIGTERM (exit status 75) from the step after which it was requested.
"""

from vidssl.config.command_line import check_command_line, without_dry_run
from vidssl.training.finetune_schema import FinetuneConfig

if __name__ == "__main__":
    # Importing torch takes seconds: --help and mistakes in the configuration are answered before.
    check_command_line(FinetuneConfig, __doc__, ("finetune",))

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from vidssl.config import load_config, to_tree
from vidssl.core.errors import run_cli
from vidssl.core.io import check_no_shards, os_errors_as_user_errors
from vidssl.core.log import set_log_level
from vidssl.evaluation.evaluate import warn_of_shared_groups
from vidssl.evaluation.probe_data import encoder_view
from vidssl.evaluation.report import encoder_facts, new_report_folder
from vidssl.pretrained.load import load_encoder
from vidssl.training.checkpoint import provenance
from vidssl.training.config_checks import check_trackers
from vidssl.training.distributed import Strategy
from vidssl.training.finetune_loop import build_finetuner
from vidssl.training.finetune_report import export_classifier, write_finetune_results
from vidssl.training.finetune_schema import RESUME_MUTABLE, check_divisible
from vidssl.training.finetuning import has_unread_parameters, open_splits
from vidssl.training.loss_guard import LossGuard
from vidssl.training.malloc import configure_process
from vidssl.training.preemption import exit_on_lost_peer, exit_on_sigterm, limited_requeues
from vidssl.training.run_folder import claim_run
from vidssl.training.run_summary import RunEnd, log_dry_run, start_finetuning
from vidssl.training.state import RunState


def main(argv: list[str]) -> None:
    argv, dry_run = without_dry_run(argv)
    cfg = load_config(argv, FinetuneConfig)
    out = Path(cfg.out)
    end = RunEnd(out)
    with limited_requeues(out), exit_on_lost_peer(), exit_on_sigterm():
        finetune(cfg, dry_run)
    if not dry_run:
        end.log_training(f"accuracy on test: {out / 'probe.json'}")


def finetune(cfg: FinetuneConfig, dry_run: bool = False) -> None:
    tune = cfg.tune
    out = Path(cfg.out)
    check_no_shards(out, "out")
    new_report_folder(out, "probe.json")
    check_trackers(tune.trackers, "tune.trackers")
    configure_process(cfg.efficiency.threads, cfg.efficiency.tune_malloc)
    loaded = load_encoder(cfg.encoder, tune.seed if cfg.random_init else None)
    splits = open_splits(cfg.data, tune)
    view = encoder_view(loaded, tune.segments, tune.crops, stride=cfg.data.stride, fps=cfg.data.fps)
    data = replace(cfg.data, stride=view.stride, fps=view.fps)
    cfg = replace(cfg, data=data, efficiency=cfg.efficiency.resolved())
    hashes = [shards.hash for shards in splits.shards.values()]
    facts = encoder_facts(loaded.encoder, loaded.metadata)
    hashes.append(facts.pop("sha256"))
    run_provenance = provenance(to_tree(cfg), hashlib.sha256(" ".join(hashes).encode()).hexdigest())
    # beside "data", so that fine-tunings that were started before this was stored go on
    model = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    run_provenance["networks"] = {cfg.encoder: model}

    strategy = Strategy.from_env(
        cfg.efficiency,
        unused_parameters=has_unread_parameters(loaded.encoder),
        allow_sharding=False,
        log_with=list(tune.trackers) or None,
        project_dir=out,
    )
    set_log_level(strategy.is_main)
    warn_of_shared_groups(splits.shared_groups, len(splits.test[0]), "data.test", "data.train")
    check_divisible(tune, cfg.efficiency, strategy.world)
    finetuner = build_finetuner(cfg, strategy, loaded, splits, view)
    guard = LossGuard(
        tune.max_consecutive_skips,
        tune.max_rollbacks,
        tune.loss_spike_std,
        has_grad_scaler=strategy.scaler is not None,
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
    if dry_run:
        state.restore()
        start_finetuning(cfg, finetuner)
        log_dry_run(out, "config.yaml, log.jsonl, checkpoints, the classifier and probe.json")
        strategy.close()
        return
    with claim_run(out, "finetune", strategy):
        start_finetuning(cfg, finetuner)
        finetuner.train(state)

        chosen = finetuner.selection.select(len(splits.held_out[0]))
        predictions = finetuner.predict(splits.shards["test"], *splits.test, view, "test")
        if strategy.is_main:
            with os_errors_as_user_errors(out):
                metadata = {**run_provenance, "step": chosen["step"]}
                export_classifier(out, finetuner.selection.now, loaded, metadata)
                libraries = run_provenance["libraries"]
                write_finetune_results(out, cfg, loaded, splits, predictions, chosen, libraries)
    strategy.close()


if __name__ == "__main__":
    run_cli(main)

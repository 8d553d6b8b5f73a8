r"""Frozen evaluation: trains heads on frozen features of train, selects on held-out train, evaluates once on
test.

    vidssl probe configs/probe/attentive.yaml encoder=RUN \
        data.train=SHARDS data.test=SHARDS out=DIR

encoder: a run folder, a file of ours, a public checkpoint, timm:NAME or hf:FOLDER_OR_NAME (see
pretrained/external.py). Writes DIR/probe.json, predictions.csv, per_class.csv, confusion.csv and the low-shot
lists. Until then finished rows are in DIR/finished.jsonl, from which the same command goes on after SIGTERM
(exit status 75), Ctrl-C (130), a full disk (2) or a kill.

With --dry-run it only prints what it would take: features, decoding, encoding, heads (FLOPs, and hours at the
rate measured here), device memory and disk space.
"""

from vidssl.config.command_line import check_command_line, without_dry_run
from vidssl.evaluation.probe_config import ProbeConfig

if __name__ == "__main__":
    # Importing torch takes seconds: --help and mistakes in the configuration are answered before.
    check_command_line(ProbeConfig, __doc__, ("probe",))

import shlex
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

from vidssl.config import load_config
from vidssl.core.errors import run_cli
from vidssl.core.log import set_log_level, show
from vidssl.evaluation.controls import control_name
from vidssl.evaluation.evaluate import warn_of_shared_groups
from vidssl.evaluation.extractor import (
    FeaturePlan,
    OpenEncoder,
    extract_features,
    make_extractor,
    plan_features,
)
from vidssl.evaluation.finished_rows import FinishedRows, keeps
from vidssl.evaluation.plan import print_plans
from vidssl.evaluation.probe_checks import check_label_sets
from vidssl.evaluation.probe_data import make_view, open_probe_splits
from vidssl.evaluation.probing import evaluate_run, probe_fingerprint, probe_runs, write_probe_results
from vidssl.evaluation.processes import processes_of
from vidssl.evaluation.report import new_report_folder
from vidssl.pretrained.external import open_encoder
from vidssl.training.malloc import tune_malloc
from vidssl.training.peers import Peers, claim_for_all
from vidssl.training.preemption import exit_on_lost_peer, exit_on_sigterm
from vidssl.training.run_summary import RunEnd, start_probe

# Seconds that a process waits for another one in a collective; longer waits are those of Peers.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@exit_on_lost_peer()
@exit_on_sigterm("SIGTERM")
def main(argv: list[str]) -> None:
    # Everything that can be known is checked before any video is decoded.
    argv, dry_run = without_dry_run(argv)
    cfg = load_config(argv, ProbeConfig)
    data = cfg.data
    protocol = cfg.probe.build().resolved()
    end = RunEnd(Path(cfg.out))
    out = new_report_folder(Path(cfg.out), "probe.json")
    splits = open_probe_splits(data)
    check_label_sets(data, protocol, splits)
    open_with_seed: OpenEncoder = partial(
        open_encoder, cfg.encoder, file=cfg.encoder_file, frames=data.frames, size=data.size
    )
    loaded = open_with_seed(protocol.seed if cfg.random_init else None)
    views = {control: make_view(data, protocol, loaded, control) for control in protocol.controls}
    runs = probe_runs(cfg, splits, protocol.controls)
    fingerprint = probe_fingerprint(cfg, splits, loaded, protocol.precision)
    tune_malloc()
    accelerator = Accelerator(
        mixed_precision="bf16" if protocol.precision == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    set_log_level(accelerator.is_main_process)
    tested = len(splits.splits["test"].samples)
    warn_of_shared_groups(splits.shared_groups, tested, "data.test", "data.train")
    cached = f"computed features in {protocol.cache}"
    also = cached if protocol.cache else "no features (probe.cache=DIR keeps them)"
    with (
        claim_for_all(out, "probe", processes_of(accelerator)),
        # read when no other program adds rows any more
        keeps(FinishedRows(out, fingerprint), f"; {also}") as finished,
        Peers(accelerator) as peers,
    ):
        # The first process alone writes to the folder, and decides what is left to do.
        (missing,) = broadcast_object_list([[run for run in runs if run.key not in finished.rows]])
        start_probe(cfg, accelerator, protocol.precision, splits, loaded.encoder, (len(missing), len(runs)))
        plans: list[FeaturePlan] = []
        for control in dict.fromkeys(run.control for run in missing):
            encoding = (protocol.seed, accelerator, protocol.tokens)
            extractor = make_extractor(open_with_seed, loaded, control, *encoding)
            arguments = (protocol, extractor, views[control], splits.splits, accelerator, control)
            heads = loaded.metadata["model"].get("heads")
            plans.append(plan_features(*arguments, heads, peers.wait, plans))
        if dry_run:
            if accelerator.is_main_process:
                print_plans(plans, missing, splits)
            plans = []
        for plan in plans:
            show(f"{control_name(plan.control)}: {plan.line}")
            features, scores = extract_features(plan)
            if accelerator.is_main_process:
                finished.add_scores(plan.control, scores)
            if accelerator.is_main_process or plan.protocol.uses_all_processes:
                for run in missing:
                    if run.control == plan.control:
                        evaluate_run(run, plan.protocol, splits, features, finished, accelerator)
            # Freed before those of the next control are computed
            del features
            peers.wait()
        if accelerator.is_main_process and not dry_run:
            write_probe_results(out, runs, finished, cfg, splits, loaded, protocol)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if not dry_run:
        compare = ["vidssl", "compare", str(out), "OTHER_PROBE", "--plot", str(out / "compare.png")]
        end.log(f"{len(runs)} rows in probe.json", f"next: {shlex.join(compare)}")


if __name__ == "__main__":
    run_cli(main)

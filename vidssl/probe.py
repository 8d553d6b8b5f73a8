r"""Frozen evaluation: trains heads on frozen features of train, selects on held-out train, evaluates once on
test.

    accelerate launch vidssl/probe.py configs/probe/attentive.yaml encoder=RUN \
        data.train=SHARDS data.test=SHARDS out=DIR

encoder: a run folder, a file of ours, a public checkpoint, timm:NAME or hf:FOLDER_OR_NAME (see
pretrained/external.py). Writes DIR/probe.json, predictions.csv, per_class.csv, confusion.csv and the low-shot
lists. """

from vidssl.config.command_line import check_command_line
from vidssl.evaluation.probe_config import ProbeConfig

if __name__ == "__main__":
    # Importing torch takes seconds: --help and mistakes in the configuration are answered before.
    check_command_line(ProbeConfig, __doc__, ("probe",))

from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from vidssl.config import load_config
from vidssl.core.errors import run_cli
from vidssl.evaluation.extractor import OpenEncoder, extract_features, make_extractor, plan_features
from vidssl.evaluation.probe_checks import check_label_sets
from vidssl.evaluation.probe_data import make_view, open_probe_splits
from vidssl.evaluation.probing import ProbeResults, evaluate_control, write_probe_results
from vidssl.evaluation.report import new_report_folder
from vidssl.pretrained.external import open_encoder
from vidssl.training.malloc import tune_malloc

HEADS_TIMEOUT = timedelta(days=1)  # the other processes wait while the first one trains heads


def main(argv: list[str]) -> None:
    # Everything that can be known is checked before any video is decoded.
    cfg = load_config(argv, ProbeConfig)
    data = cfg.data
    protocol = cfg.probe.build()
    out = new_report_folder(Path(cfg.out), "probe.json")
    probe_splits = open_probe_splits(data)
    check_label_sets(data, protocol, probe_splits)
    open_with_seed: OpenEncoder = partial(
        open_encoder, cfg.encoder, file=cfg.encoder_file, frames=data.frames, size=data.size
    )
    loaded = open_with_seed(protocol.seed if cfg.random_init else None)
    views = {control: make_view(data, protocol, loaded, control) for control in protocol.controls}
    tune_malloc()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=HEADS_TIMEOUT)]
    )
    heads = loaded.metadata["model"].get("heads")
    plans = []
    for control, view in views.items():
        extractor = make_extractor(open_with_seed, loaded, control, protocol.seed, accelerator)
        plans.append(
            plan_features(protocol, extractor, view, probe_splits.splits, accelerator, control, heads)
        )
    results = ProbeResults()
    for plan in plans:
        accelerator.print(f"{plan.control}: {plan.line}")
        features, scores = extract_features(plan)
        if accelerator.is_main_process:
            results.label_free[plan.control] = scores
            evaluate_control(results, cfg, plan, probe_splits, features, accelerator.device)
    if accelerator.is_main_process:
        write_probe_results(out, results, cfg, probe_splits, loaded, protocol.seed)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_cli(main)

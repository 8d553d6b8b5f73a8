r"""Dense frozen evaluation: depth, mask or key point prediction from frozen tokens of frames, evaluated once
on test.

    vidssl dense configs/dense/propagation.yaml encoder=RUN data.test=DAVIS out=DIR

encoder: as in vidssl/probe.py. data.test: the folder of a data set, with its lists of train and test. Writes
DIR/dense.json and sequences.csv. Finished controls are in DIR/finished.jsonl until then: after a kill the
same command goes on.
"""

from vidssl.config.command_line import check_command_line, without_dry_run
from vidssl.evaluation.dense.schema import DenseConfig

if __name__ == "__main__":
    # Importing torch takes seconds: --help and mistakes in the configuration are answered before.
    check_command_line(DenseConfig, __doc__, ("dense",), shares_work=False)

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vidssl.config import load_config, to_tree
from vidssl.core.errors import run_cli
from vidssl.core.io import check_no_shards, claim_folder
from vidssl.core.log import logger, show
from vidssl.core.progress import track
from vidssl.core.tables import write_csv
from vidssl.evaluation.controls import control_name
from vidssl.evaluation.dense.frames import check_fits, make_frame_encoder
from vidssl.evaluation.dense.isolated_samples import Splits, isolated
from vidssl.evaluation.dense.splits import read_sequences, split_hashes
from vidssl.evaluation.extractor import OpenEncoder
from vidssl.evaluation.finished_rows import FinishedRows, keeps
from vidssl.evaluation.report import code_hash, encoder_facts, new_report_folder, write_json_report
from vidssl.pretrained.external import open_encoder
from vidssl.pretrained.load import LoadedEncoder
from vidssl.training.malloc import tune_malloc
from vidssl.training.preemption import exit_on_sigterm
from vidssl.training.run_summary import RunEnd, log_dry_run, model_line


@exit_on_sigterm("SIGTERM")
def main(argv: list[str]) -> None:
    # Everything that can be known is checked before any sequence is decoded.
    argv, dry_run = without_dry_run(argv)
    cfg = load_config(argv, DenseConfig)
    data = cfg.data
    end = RunEnd(Path(cfg.out))
    out = new_report_folder(Path(cfg.out), "dense.json")
    check_no_shards(out, "out")
    task = cfg.task.build()
    listed = read_sequences(data, task.label)
    task.check_train([sample.group for sample in listed["train"]])
    if dry_run:
        plan_controls(cfg, task, {name: len(samples) for name, samples in listed.items()})
        return
    with (
        claim_folder(out, "dense"),
        # before the encoder starts threads
        isolated(listed, data.decode_timeout_s, data.decode_memory_mb) as splits,
    ):
        evaluate_controls(cfg, task, splits, out)
    end.log(f"{len(task.controls)} rows in dense.json")


def plan_controls(cfg: DenseConfig, task: Any, sequences: dict[str, int]) -> None:
    """Checks the encoder, and says what would be evaluated. sequences: their numbers by split."""
    loaded = open_frame_encoder(cfg, task)(None)
    check_fits(loaded, task)
    logger.info(model_line(loaded.encoder))
    numbers = ", ".join(f"{number:,} sequences of {name}" for name, number in sequences.items())
    logger.info(f"data: {numbers}; controls: {', '.join(task.controls)}")
    log_dry_run(Path(cfg.out), "dense.json and sequences.csv")


def open_frame_encoder(cfg: DenseConfig, task: Any) -> OpenEncoder:
    """Opens the encoder for the frames of a task: with its weights, or untrained by a seed."""
    return partial(
        open_encoder, cfg.encoder, file=cfg.encoder_file, frames=task.frames, size=task.size, default_frames=1
    )


def evaluate_controls(cfg: DenseConfig, task: Any, splits: Splits, out: Path) -> None:
    """Evaluates the encoder under each control that has not been yet, and writes the report."""
    open_with_seed = open_frame_encoder(cfg, task)
    loaded = open_with_seed(None)
    check_fits(loaded, task)
    tune_malloc()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hashes = split_hashes(cfg.data, splits)
    finished = FinishedRows(out, dense_fingerprint(cfg, hashes, loaded))
    results: list[dict[str, Any]] = []
    table: list[list[Any]] = []
    with keeps(finished):
        for control in task.controls:
            if (control,) not in finished.rows:
                encoder, name = make_frame_encoder(open_with_seed, loaded, control, task, device)
                result, rows = evaluate_control(task, encoder, splits, control)
                result |= {"control": control, "task": cfg.task.kind, "encoder": name}
                finished.add((control,), {"result": result, "table": rows}, [])
            row = finished.rows[(control,)]
            result = row["result"]
            results.append(result)
            table += row["table"]
            show(f"{control_name(control):15s} {result['metric']} {result['value']:.4g}  {result['ci95']}")
        write_csv(out / "sequences.csv", ("control", "sequence", "group", "row", *task.columns), table)
        report = {"results": results, "data": hashes, "seed": task.seed}
        write_json_report(out / "dense.json", to_tree(cfg), loaded, report)
    finished.remove()


def evaluate_control(
    task: Any, encoder: Any, splits: Splits, control: str
) -> tuple[dict[str, Any], list[list[Any]]]:
    """Selects a model on train and evaluates it on test. Returns the result, and the rows of the table of
    sequences."""
    train, test = splits["train"], splits["test"]
    model, selection = task.select_model(encoder, train)
    samples = track(test, f"test ({control})", "sequences")
    rows = [task.evaluate(encoder, model, sample) for sample in samples]
    result = task.summarise(rows, [sample.group for sample in test])
    table = [
        [control, sample.name, sample.group, number, *(f"{value:.6g}" for value in row)]
        for sample, sample_rows in zip(test, rows, strict=True)
        for number, row in enumerate(sample_rows)
    ]
    return {**result, "n_test": len(test), "n_train": len(train), "chosen": selection}, table


def dense_fingerprint(cfg: DenseConfig, data: dict[str, str], loaded: LoadedEncoder) -> str:
    """SHA-256 of everything that decides the rows of a dense evaluation. data: hashes of train and test."""
    tree = to_tree(cfg)
    tree.pop("out")
    for name in ("decode_timeout_s", "decode_memory_mb"):
        tree["data"].pop(name)
    facts = [tree, data, encoder_facts(loaded.encoder, loaded.metadata), code_hash()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    run_cli(main)

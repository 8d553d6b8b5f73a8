r"""Dense frozen evaluation: depth, mask or key point prediction from frozen tokens of frames, evaluated once
on test.

    python vidssl/dense.py configs/dense/propagation.yaml encoder=RUN data.test=DAVIS out=DIR

encoder: as in vidssl/probe.py. data.test: the folder of a data set, with its lists of train and test. Writes
DIR/dense.json and sequences.csv.
"""

from vidssl.config.command_line import check_command_line
from vidssl.evaluation.dense.schema import DenseConfig

if __name__ == "__main__":
    # Importing torch takes seconds: --help and mistakes in the configuration are answered before.
    check_command_line(DenseConfig, __doc__, ("dense",))

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vidssl.config import load_config, to_tree
from vidssl.core.errors import run_cli
from vidssl.core.io import make_folder
from vidssl.evaluation.dense.frames import make_frame_encoder
from vidssl.evaluation.dense.splits import read_sequences, split_hashes
from vidssl.evaluation.report import new_report_folder, write_csv, write_json_report
from vidssl.pretrained.external import open_encoder
from vidssl.training.malloc import tune_malloc


def main(argv: list[str]) -> None:
    cfg = load_config(argv, DenseConfig)
    task = cfg.task.build()
    open_with_seed = partial(
        open_encoder, cfg.encoder, file=cfg.encoder_file, frames=task.frames, size=task.size, default_frames=1
    )
    loaded = open_with_seed(None)
    splits = read_sequences(cfg.data, task.label)
    train, test = splits["train"], splits["test"]
    out = new_report_folder(Path(cfg.out), "dense.json")
    tune_malloc()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hashes = split_hashes(cfg.data, splits)

    results: list[dict[str, Any]] = []
    table: list[tuple[Any, ...]] = []
    for control in task.controls:
        encoder, encoder_name = make_frame_encoder(open_with_seed, loaded, control, task, device)
        model, selection = task.select_model(encoder, train)
        rows = [task.evaluate(encoder, model, sample) for sample in tqdm(test, desc=f"test ({control})")]
        result = task.summarise(rows, [sample.group for sample in test])
        facts = {"n_test": len(test), "n_train": len(train), "chosen": selection, "encoder": encoder_name}
        results.append({"control": control, "task": cfg.task.kind, **result, **facts})
        for sample, sample_rows in zip(test, rows, strict=True):
            for number, row in enumerate(sample_rows):
                figures = [f"{value:.6g}" for value in row]
                table.append((control, sample.name, sample.group, number, *figures))
        print(f"{control:12s} {result['metric']} {result['value']:.4g}  {result['ci95']}")

    make_folder(out)
    write_csv(out / "sequences.csv", ("control", "sequence", "group", "row", *task.columns), table)
    report = {"results": results, "data": hashes, "seed": task.seed}
    write_json_report(out / "dense.json", to_tree(cfg), loaded, report)


if __name__ == "__main__":
    run_cli(main)

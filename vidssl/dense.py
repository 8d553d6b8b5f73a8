r"""Dense frozen evaluation: encoder -> tokens of frames -> depth, masks, key points -> one look at test -> dense.json.

    python vidssl/dense.py configs/dense/propagation.yaml encoder=RUN data.test=DAVIS out=DIR

encoder: as vidssl/probe.py takes it. data.test: the folder of a data set, which has its train list, too.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vidssl import config
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder
from vidssl.evaluation.dense.datasets import READERS, DenseSample, data_hash
from vidssl.evaluation.dense.frames import make_frame_encoder
from vidssl.evaluation.dense.schema import DenseConfig, DenseData
from vidssl.evaluation.report import write_csv, write_report
from vidssl.pretrained.external import open_encoder
from vidssl.training.malloc import tune_malloc


def read_items(data: DenseData, truth: str) -> dict[str, list[DenseSample]]:
    """Train and test, which have nothing in common."""
    readers = READERS[truth]
    if data.format not in readers:
        raise UserError(f"data.format: no '{data.format}' with {truth}; there is {', '.join(readers)}")
    folders = {"train": Path(data.train or data.test), "test": Path(data.test)}
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    items = {}
    for side, folder in folders.items():
        try:
            items[side] = readers[data.format](folder, side)
        except (ValueError, KeyError, OSError) as e:
            said = f"{type(e).__name__}: {e}"
            raise UserError(f"{folder}: its {side} list is not one of {data.format} ({said})") from None
    for side, some in items.items():
        if not some:
            raise UserError(f"{folders[side]}: its {side} list is empty")
    files = {side: {file.resolve() for item in some for file in item.files} for side, some in items.items()}
    if both := files["train"] & files["test"]:
        raise UserError(
            f"{min(both)} and {len(both) - 1} more files are in train and in test: the test must be new"
        )
    if data.limit is not None and data.limit < len(items["train"]):
        count = len(items["train"])
        items["train"] = [items["train"][n * count // data.limit] for n in range(data.limit)]
    return items


def main(argv: list[str]) -> None:
    cfg = config.load_config(argv, DenseConfig)
    data, task = cfg.data, cfg.task.build()
    anew = partial(
        open_encoder, cfg.encoder, file=cfg.encoder_file, frames=task.frames, size=task.size, alone=1
    )
    loaded = anew(None)
    items, out = read_items(data, task.truth), Path(cfg.out)
    if (out / "dense.json").exists():
        raise UserError(f"{out / 'dense.json'} exists: the test set was read for it; give another out=")
    check_writable(out)
    tune_malloc()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = {"train": Path(data.train or data.test), "test": Path(data.test)}
    hashes = {side: data_hash(folders[side], some) for side, some in items.items()}

    results: list[dict[str, Any]] = []
    told: list[tuple[Any, ...]] = []
    for control in task.controls:
        look, eye = make_frame_encoder(anew, loaded, control, task, device)
        model, chosen = task.fit(look, items["train"])
        rows = [task.measure(look, model, item) for item in tqdm(items["test"], desc=f"test ({control})")]
        row = task.figures(rows, [item.group for item in items["test"]])
        counts = {"n_test": len(items["test"]), "n_train": len(items["train"])}
        results.append(
            {"control": control, "task": cfg.task.kind, **row, **counts, "chosen": chosen, "eye": eye}
        )
        for item, figures in zip(items["test"], rows, strict=True):
            told += [
                (control, item.name, item.group, n, *map("{:.6g}".format, f)) for n, f in enumerate(figures)
            ]
        print(f"{control:12s} {row['metric']} {row['value']:.4g}  {row['ci95']}")

    make_folder(out)
    write_csv(out / "sequences.csv", ("control", "sequence", "group", "row", *task.columns), told)
    report = {"results": results, "data": hashes, "seed": task.seed}
    write_report(out / "dense.json", config.to_tree(cfg), loaded, report)


if __name__ == "__main__":
    run_cli(main, __doc__)

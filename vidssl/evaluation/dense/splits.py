"""The train and test sequences that a configuration names."""

from pathlib import Path

from vidssl.core.errors import UserError
from vidssl.evaluation.dense.datasets import READERS, DenseSample, LabelKind, data_hash
from vidssl.evaluation.dense.schema import DenseData


def split_folders(data: DenseData) -> dict[str, Path]:
    return {"train": Path(data.train or data.test), "test": Path(data.test)}


def read_sequences(data: DenseData, label: LabelKind) -> dict[str, list[DenseSample]]:
    """Train and test sequences. Raises UserError if a list cannot be read or is empty, or if both share a
    file."""
    readers = READERS[label]
    if data.format not in readers:
        raise UserError(f"data.format: no '{data.format}' with {label}; there is {', '.join(readers)}")
    folders = split_folders(data)
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    splits = {}
    for name, folder in folders.items():
        try:
            splits[name] = readers[data.format](folder, name)
        except (ValueError, KeyError, OSError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise UserError(f"{folder}: its {name} list is not one of {data.format} ({reason})") from None
        if not splits[name]:
            raise UserError(f"{folder}: its {name} list is empty")
    files = {name: {f.resolve() for sample in split for f in sample.files} for name, split in splits.items()}
    if shared := files["train"] & files["test"]:
        raise UserError(
            f"{min(shared)} and {len(shared) - 1} more files are in train and in test: they must be disjoint"
        )
    limit = data.max_train_sequences
    train = splits["train"]
    if limit is not None and limit < len(train):
        splits["train"] = [train[n * len(train) // limit] for n in range(limit)]
    return splits


def split_hashes(data: DenseData, splits: dict[str, list[DenseSample]]) -> dict[str, str]:
    folders = split_folders(data)
    return {name: data_hash(folders[name], samples) for name, samples in splits.items()}

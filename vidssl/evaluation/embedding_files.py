"""The files of a finished embedding: features as .npy, Parquet or Zarr, rows.csv, rejected.jsonl and
embedding.json, which is written last."""

import csv
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write, atomic_write_text, read_json_object
from vidssl.core.tables import read_table

Format = Literal["npy", "parquet", "zarr"]
PACKAGES = {"parquet": "pyarrow", "zarr": "zarr"}
ROWS_AT_ONCE = 1024
AGAIN = "run vidssl embed again into a new folder"


class StoredRows(NamedTuple):
    """An embedding that was read back."""

    facts: dict[str, Any]  # embedding.json
    keys: list[str]
    start: np.ndarray  # f64 [n], seconds
    end: np.ndarray
    features: np.ndarray  # f16 or f32 [n, ...]


def check_format(fmt: str, option: str = "--format") -> None:
    """Raises UserError if the package that a format needs is not installed."""
    package = PACKAGES.get(fmt)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"{option} {fmt}: {package} is not installed; pip install 'vidssl[{fmt}]'")


def write_embedding_files(
    out: Path,
    fmt: Format,
    features: np.ndarray,
    kept: list[int],
    rows: Sequence[tuple[str, float, float]],
    rejected: list[dict[str, Any]],
    facts: dict[str, Any],
) -> None:
    """features [n, ...], rows (key, start, end): of the whole plan, of which those numbered in `kept` are
    written."""
    kept_rows = [rows[number] for number in kept]
    shape = (len(kept), *features.shape[1:])
    {"npy": write_npy, "parquet": write_parquet, "zarr": write_zarr}[fmt](
        out, shape, features, kept, kept_rows
    )
    atomic_write(out / "rows.csv", partial(write_rows, rows=kept_rows))
    lines = "".join(json.dumps(record) + "\n" for record in rejected)
    atomic_write_text(out / "rejected.jsonl", lines)
    facts = {
        **facts,
        "format": fmt,
        "shape": list(shape),
        "dtype": str(features.dtype),
        "rejected": len(rejected),
    }
    text = json.dumps(facts, indent=1)
    atomic_write_text(out / "embedding.json", text)


def write_rows(path: Path, rows: list[tuple[str, float, float]]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        csv.writer(f).writerows([("key", "start", "end"), *rows])


def pieces(features: np.ndarray, kept: list[int]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (place among the kept rows, these rows), some at a time."""
    for first in range(0, len(kept), ROWS_AT_ONCE):
        numbers = kept[first : first + ROWS_AT_ONCE]
        yield slice(first, first + len(numbers)), features[numbers]


def write_npy(
    out: Path, shape: tuple[int, ...], features: np.ndarray, kept: list[int], rows: list[Any]
) -> None:
    def write(path: Path) -> None:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=features.dtype, shape=shape)
        for place, values in pieces(features, kept):
            array[place] = values
        array.flush()

    atomic_write(out / "features.npy", write)


def write_parquet(
    out: Path, shape: tuple[int, ...], features: np.ndarray, kept: list[int], rows: list[Any]
) -> None:
    """Columns key, start, end, features: lists of the numbers of a row, whose shape is in the metadata of the
    schema."""
    import pyarrow as pa
    from pyarrow import parquet

    size = int(np.prod(shape[1:]))
    number = pa.from_numpy_dtype(features.dtype)
    fields = [("key", pa.string()), ("start", pa.float64()), ("end", pa.float64())]
    schema = pa.schema([*fields, ("features", pa.list_(number, size))], {"shape": json.dumps(shape[1:])})

    def write(path: Path) -> None:
        with parquet.ParquetWriter(path, schema) as writer:
            for place, values in pieces(features, kept):
                keys, starts, ends = zip(*rows[place], strict=True)
                # Names of files need not be UTF-8
                names = [key.encode(errors="backslashreplace").decode() for key in keys]
                columns = [pa.array(column) for column in (names, starts, ends)]
                flat = pa.array(np.ascontiguousarray(values).ravel(), number)
                columns.append(pa.FixedSizeListArray.from_arrays(flat, size))
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    atomic_write(out / "features.parquet", write)


def write_zarr(
    out: Path, shape: tuple[int, ...], features: np.ndarray, kept: list[int], rows: list[Any]
) -> None:
    """A group with the arrays features, start and end; key is in rows.csv, in the same order."""
    import zarr

    temporary = out / "features.zarr.tmp"
    final = out / "features.zarr"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    group: Any = zarr.open_group(str(temporary), mode="w")
    chunk = min(len(kept), ROWS_AT_ONCE)
    array = group.create_array("features", shape=shape, dtype=features.dtype, chunks=(chunk, *shape[1:]))
    for place, values in pieces(features, kept):
        array[place] = values
    for name, column in (("start", 1), ("end", 2)):
        times = np.array([row[column] for row in rows])
        group.create_array(name, shape=times.shape, dtype=times.dtype, chunks=times.shape)[:] = times
    os.replace(temporary, final)


def read_features(out: Path, fmt: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    check_format(fmt, f"{out}: its format is")
    if fmt == "npy":
        return np.load(out / "features.npy", mmap_mode="r", allow_pickle=False)
    if fmt == "zarr":
        import zarr

        group: Any = zarr.open_group(str(out / "features.zarr"), mode="r")
        return group["features"][:]
    from pyarrow import parquet

    table = parquet.read_table(out / "features.parquet", columns=["features"])
    flat = table["features"].combine_chunks().flatten()
    return flat.to_numpy(zero_copy_only=False).astype(dtype, copy=False).reshape(shape)


def read_embedding(out: Path) -> StoredRows:
    """Reads what `vidssl embed` wrote. Raises UserError for a folder without a finished embedding."""
    try:
        facts = read_json_object(out / "embedding.json", AGAIN)
        with open(out / "rows.csv", newline="", encoding="utf-8", errors="surrogateescape") as f:
            rows = list(read_table(f))
        features = read_features(out, facts["format"], tuple(facts["shape"]), facts["dtype"])
    except FileNotFoundError as e:
        missing = Path(str(e.filename)).name
        raise UserError(f"{out}: no {missing}: no finished output of vidssl embed") from None
    except (ValueError, KeyError, TypeError, EOFError, csv.Error) as e:
        raise UserError(f"{out}: damaged ({e}); {AGAIN}") from None
    if len(rows) != len(features):
        raise UserError(f"{out}: rows.csv has {len(rows)} rows, the features {len(features)}")
    try:
        start, end = (np.array([float(row[name]) for row in rows]) for name in ("start", "end"))
        keys = [row["key"] for row in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{out / 'rows.csv'}: damaged ({e}); {AGAIN}") from None
    return StoredRows(facts, keys, start, end, features)

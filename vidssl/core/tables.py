"""Reads and writes tables with a header line (csv), of cells of any length."""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidssl.core.io import atomic_write

# Python's limit of 131,072 characters is less than the outputs of 21,000 classes.
MAX_CELL = min(sys.maxsize, 2**31 - 1)  # characters; a C long


def read_table(lines: Iterable[str], strict: bool = False) -> "csv.DictReader[Any]":
    """The rows of an open file (newline=""), column -> text. The iterator raises csv.Error for lines that are
    no table."""
    csv.field_size_limit(MAX_CELL)
    return csv.DictReader(lines, strict=strict)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Writes the table, whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as f:
            csv.writer(f).writerows([header, *rows])

    atomic_write(path, write)

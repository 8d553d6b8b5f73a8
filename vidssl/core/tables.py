"""Reads tables with a header line (csv), of cells of any length."""

import csv
import sys
from collections.abc import Iterable
from typing import Any

# Python's limit of 131,072 characters is less than the outputs of 21,000 classes.
MAX_CELL = min(sys.maxsize, 2**31 - 1)  # characters; a C long


def read_table(lines: Iterable[str], strict: bool = False) -> "csv.DictReader[Any]":
    """The rows of an open file (newline=""), column -> text. The iterator raises csv.Error for lines that are
    no table."""
    csv.field_size_limit(MAX_CELL)
    return csv.DictReader(lines, strict=strict)

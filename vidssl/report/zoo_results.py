"""A zoo's results.csv and table.md as plain data."""

import csv
from pathlib import Path
from typing import Any

from vidssl.core.tables import read_table

NUMBERS = ("step", "clips", "flops", "accuracy", "low", "high", "chance", "n_test", "rankme", "alpha")


def read_zoo(folder: Path) -> dict[str, Any]:
    """The rows of results.csv, and the tables of table.md."""
    missing: list[str] = []
    return {
        "name": folder.resolve().name,
        "path": str(folder),
        "rows": read_rows(folder / "results.csv", missing),
        "tables": read_tables(folder / "table.md", missing),
        "missing": missing,
    }


def read_rows(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The rows of results.csv with numbers as such."""
    try:
        with open(path, newline="") as file:
            rows = list(read_table(file))
    except FileNotFoundError:
        missing.append("There is no results.csv yet; it is written when the zoo ends.")
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        missing.append(f"{path} cannot be read: {e}.")
        return []
    return [{key: as_number(key, text) for key, text in row.items() if key is not None} for row in rows]


def as_number(key: str, text: str | None) -> Any:
    if key not in NUMBERS:
        return text or ""
    try:
        return float(text or "")
    except ValueError:
        return None


def read_tables(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The tables of a Markdown file: {"title", "head", "rows"}, under the heading before each."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        missing.append("There is no table.md yet.")
        return []
    except (OSError, UnicodeDecodeError) as e:
        missing.append(f"{path} cannot be read: {e}.")
        return []
    tables: list[dict[str, Any]] = []
    title = ""
    table: dict[str, Any] | None = None
    for line in lines:
        if line.startswith("#"):
            title = line.lstrip("# ")
        if not line.startswith("|"):
            table = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if table is None:
            table = {"title": title, "head": cells, "rows": []}
            tables.append(table)
        elif not all(set(cell) <= set("-: ") for cell in cells):
            table["rows"].append(cells)
    return tables

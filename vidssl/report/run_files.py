"""What a run folder holds, read without torch. What is missing or damaged is named and passed over."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from vidssl.core.io import native_description
from vidssl.core.suggestions import counted

Row = dict[str, Any]


@dataclass
class RunFiles:
    """A run folder as it is now."""

    name: str
    folder: Path
    config: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)  # of log.jsonl, ascending steps
    header: Row = field(default_factory=dict)  # of encoder.safetensors: versions, data, step
    missing: list[str] = field(default_factory=list)  # sentences
    written: datetime | None = None  # when the log was last written

    @property
    def last_step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None: the configuration does not say."""
        steps = self.section("run").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def batch(self) -> int | None:
        """Clips of a step."""
        batch = self.section("run").get("batch") or self.section("tune").get("batch")
        return batch if isinstance(batch, int) else None

    @property
    def is_fine_tuning(self) -> bool:
        return bool(self.section("tune"))

    def section(self, name: str) -> Row:
        """A section of the configuration; {} where there is none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}


def read_run(folder: Path, name: str) -> RunFiles:
    """Reads configuration, log and the header of the encoder."""
    run = RunFiles(name, folder)
    run.config = read_config(folder / "config.yaml", run.missing)
    log = folder / "log.jsonl"
    if log.is_file():
        run.rows = read_log(log, run.missing)
        run.written = datetime.fromtimestamp(log.stat().st_mtime)
    else:
        run.missing.append("There is no log.jsonl, so there are no curves.")
    encoder = folder / "encoder.safetensors"
    if encoder.is_file():
        run.header = native_description(encoder)
        if not run.header:
            run.missing.append(f"{encoder.name} has no description of ours in its header.")
    else:
        when = "after the last epoch" if run.is_fine_tuning else "when the run saves (run.save_every)"
        run.missing.append(f"There is no encoder.safetensors yet; it is written {when}.")
    return run


def read_config(path: Path, missing: list[str]) -> Row:
    """The tree of a config.yaml; {} if it cannot be read."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        missing.append(f"There is no {path.name}.")
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        missing.append(f"{path.name} cannot be read: {first_line(e)}.")
        return {}
    return tree if isinstance(tree, dict) else {}


def read_log(path: Path, missing: list[str]) -> list[Row]:
    """The rows of a log.jsonl. A row that repeats a step or goes back takes the place of those from that step
    on; the last line of a log that is being written may be cut."""
    rows: list[Row] = []
    damaged = 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        row = row_of(line)
        if row is None:
            damaged += number < len(lines) - 1
            continue
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    if damaged:
        missing.append(f"{counted(damaged, 'line')} of log.jsonl cannot be read and {are(damaged)} left out.")
    if not rows:
        missing.append("log.jsonl has no row yet.")
    return rows


def are(count: int) -> str:
    return "is" if count == 1 else "are"


def row_of(line: bytes) -> Row | None:
    """A row of the log; None if the line is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row


def read_json(path: Path) -> Row | None:
    """A JSON object; None if the file is not one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def flatten(tree: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections as dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(value: Any) -> float | None:
    """A finite number; None for anything else. True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def numbers(rows: list[Row], column: str) -> list[float]:
    """The finite values of a column."""
    return [value for row in rows if (value := number(row.get(column))) is not None]


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

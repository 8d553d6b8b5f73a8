"""log.jsonl: a JSON object a step, always; one live line of progress; and trackers that were asked for."""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write, print_stderr


def hash_keys(keys: list[str]) -> Tensor:
    """i64 [B]: 63 bits of each key's SHA-256."""
    return torch.tensor([int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") >> 1 for k in keys])


def batch_hash(positions: Tensor, hashes: Tensor) -> str:
    """Positions and key hashes i64 [B] of the global batch, in any order -> what `keys` is in the log."""
    in_order = hashes[positions.argsort()].cpu().numpy().astype(">i8")
    return hashlib.sha256(in_order.tobytes()).hexdigest()[:16]


class JsonlWriter:
    """A file of JSON objects, one a line, that is only added to. What a full disk does not take is kept and tried
    again with the next."""

    def __init__(self, path: Path):
        self.path, self.left, self.number = path, b"", -1

    def add(self, *rows: dict[str, Any]) -> str | None:
        """Write the rows and what is left of earlier ones; why that did not work, if it did not."""
        self.left += "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            if self.left and self.number < 0:
                self.number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            while self.left:
                self.left = self.left[os.write(self.number, self.left) :]
        except OSError as e:
            return e.strerror or str(e)
        return None

    def sync(self) -> None:
        """All of it is on the disk; OSError if it is not."""
        if why := self.add():
            raise OSError(f"{self.path.name}: {why}")
        if self.number >= 0:
            os.fsync(self.number)

    def close(self) -> None:
        """Try what is left a last time."""
        if why := self.add():
            print_stderr(f"warning: {self.path}: its last lines are lost: {why}")
        if self.number >= 0:
            os.close(self.number)
            self.number = -1


Tracker = Literal["tensorboard", "wandb", "trackio"]


def check_trackers(names: tuple[Tracker, ...]) -> None:
    """An error that says what to install."""
    for name in names:
        if not importlib.util.find_spec(name):
            raise UserError(f"run.trackers: {name} is not installed: pip install {name}")


def start_trackers(accelerator: Accelerator, cfg: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """-> what passes a row of the log on to the trackers."""
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in _flat(cfg).items()}
    accelerator.init_trackers("vidssl", plain)

    def track(row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        accelerator.log(numbers, step=row["step"])

    return track


def _flat(tree: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    return {
        k: v
        for key, value in tree.items()
        for k, v in (
            _flat(value, f"{at}{key}.").items() if isinstance(value, dict) else [(f"{at}{key}", value)]
        )
    }


class MetricsLog:
    """Writes log.jsonl and the progress line; made on the main process only."""

    def __init__(
        self, out: Path, start: int, steps: int, track: Callable[[dict[str, Any]], None] | None = None
    ):
        """Lines after step `start` are of a run that was cut off and are dropped: they will be written again. While it
        is open, no other process can open the log of this folder."""
        self.out, self.track, self.full = out, track, False
        self.lock = open(out / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{out}: another process is training in this folder; wait for it, or end it"
            ) from None
        for path in (out / "log.jsonl", out / "bad_samples.jsonl"):
            if path.exists():
                kept = [line + "\n" for line in path.read_text().splitlines() if _step(line) <= start]
                atomic_write(path, partial(Path.write_text, data="".join(kept)))
        self.lines = JsonlWriter(out / "log.jsonl")
        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc=out.name,
            unit="step",
            mininterval=0.2 if live else 20,
            delay=0.1,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt}{postfix} | {elapsed}, {remaining} left, ends {eta:%d %b %H:%M}",
        )

    def write(self, row: dict[str, Any]) -> None:
        """A step's row into the file, to the trackers and onto the line."""
        why = self.lines.add(row)
        if bool(why) != self.full:
            self.full = bool(why)
            self.info(
                f"warning: log.jsonl: {why}; its lines are kept" if why else "log.jsonl is written again"
            )
        if self.track:
            try:
                self.track(row)
            except OSError as e:
                self.info(f"warning: a tracker did not take step {row['step']}: {e}")
        shown = {
            "loss": f"{row['loss']:.4f}",
            "clips/s": f"{row['clips_per_s']:.0f}",
            "wait": f"{row['wait']:.0%}",
        }
        shown |= {"GB": f"{row['memory'] / 1e9:.1f}"} if "memory" in row else {}
        shown |= {"mfu": f"{row['mfu']:.0%}"} if "mfu" in row else {}
        shown |= {"skipped": row["skipped"]} if row.get("skipped") else {}
        with contextlib.suppress(OSError):  # stderr may be a file on a full disk
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def info(self, text: str) -> None:
        """A line beside the progress line."""
        with contextlib.suppress(OSError):
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.lines.close()
        with contextlib.suppress(OSError):
            self.bar.close()
        self.lock.close()


def _step(line: str) -> float:
    """The step of a log line; infinity for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")

"""log.jsonl: a JSON object a step, always; and one live line of progress."""

import fcntl
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vidssl.errors import UserError
from vidssl.files import replace


def hash_keys(keys: list[str]) -> Tensor:
    """i64 [B]: 63 bits of each key's SHA-256."""
    return torch.tensor([int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") >> 1 for k in keys])


def batch_hash(positions: Tensor, hashes: Tensor) -> str:
    """Positions and key hashes i64 [B] of the global batch, in any order -> what `keys` is in the log."""
    in_order = hashes[positions.argsort()].cpu().numpy().astype(">i8")
    return hashlib.sha256(in_order.tobytes()).hexdigest()[:16]


def note_bad(path: Path, step: int, bad: list[tuple[str, str]]) -> None:
    """Append (key, reason) of samples that were replaced at this step; every process writes its own lines."""
    if bad:
        with open(path, "a") as f:
            f.write("".join(json.dumps({"step": step, "key": key, "reason": why}) + "\n" for key, why in bad))


class Log:
    """Writes log.jsonl and the progress line; made on the main process only."""

    def __init__(self, out: Path, start: int, steps: int):
        """Lines after step `start` are of a run that was cut off and are dropped: they will be written again. While it
        is open, no other process can open the log of this folder."""
        self.lock = open(out / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another process is training in this folder; wait for it, or end it") from None
        for path in (out / "log.jsonl", out / "bad_samples.jsonl"):
            if path.exists():
                kept = [line + "\n" for line in path.read_text().splitlines() if _step(line) <= start]
                replace(path, partial(Path.write_text, data="".join(kept)))
        self.file = open(out / "log.jsonl", "a", buffering=1)  # noqa: SIM115
        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=start, desc=out.name, unit="step", mininterval=0.2 if live else 20, ncols=100
        )

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        shown = {"loss": f"{row['loss']:.4f}", "clips/s": f"{row['clips_per_s']:.0f}", "wait": f"{row['wait']:.0%}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.bar.close()
        self.lock.close()


def _step(line: str) -> float:
    """The step of a log line; infinity for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")

"""log.jsonl: a JSON object a step, always; and one live line of progress."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm


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

    def __init__(self, path: Path, start: int, steps: int, name: str):
        """Lines after step `start` are of a run that was cut off and are dropped: they will be written again."""
        kept = [line for line in path.read_text().splitlines() if _step(line) <= start] if path.exists() else []
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(line + "\n" for line in kept))
        os.replace(beside, path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        live = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, desc=name, unit="step", mininterval=0.2 if live else 20, ncols=100)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        shown = {"loss": f"{row['loss']:.4f}", "clips/s": f"{row['clips_per_s']:.0f}", "wait": f"{row['wait']:.0%}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.file.close()
        self.bar.close()


def _step(line: str) -> float:
    """The step of a log line; infinity for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")

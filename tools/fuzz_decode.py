"""Damages real files in many ways and decodes them as training does, in a child process.

python tools/fuzz_decode.py FOLDER [count=5000] [seed=0] [deadline=20]      prints a table of outcomes
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.encode import EncodedSample
from data_prep.inspect_file import FileInspector
from vidssl.core.errors import DecodeError, UserError, run_cli
from vidssl.data.dataset import DecodeFailure, Example
from vidssl.data.decoding import open_video
from vidssl.data.extensions import VIDEO_EXTENSIONS
from vidssl.data.isolated_dataset import IsolatedDataset
from vidssl.data.sampling import sample_indices

MUTATIONS = ("flip", "flip_header", "cut_end", "cut_out", "zeros", "swap_header", "repeat", "noise")
MAX_FILE_BYTES = 8 << 20  # larger files are left out


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Returns (kind of damage, damaged bytes). other: a second file whose header may replace this one's."""
    kind = str(rng.choice(MUTATIONS))
    out = bytearray(data)
    n = len(data)
    at = int(rng.integers(n))
    length = int(rng.integers(1, max(2, n // 8)))
    if kind in ("flip", "flip_header"):
        for _ in range(int(2 ** rng.uniform(0, 8))):
            out[int(rng.integers(min(n, 4096) if kind == "flip_header" else n))] ^= int(rng.integers(1, 256))
    elif kind == "cut_end":
        del out[at:]
    elif kind == "cut_out":
        del out[at : at + length]
    elif kind == "zeros":
        out[at : at + length] = bytes(len(out[at : at + length]))
    elif kind == "noise":
        out[at : at + length] = rng.bytes(len(out[at : at + length]))
    elif kind == "repeat":
        out[at:at] = out[at : at + length]
    else:
        size = int(2 ** rng.uniform(3, 12))
        out[:size] = other[:size]
    return kind, bytes(out)


class Damaged:
    """A data set of damaged files; every second one is opened with the metadata that pack has for the intact
    file."""

    def __init__(self, files: list[Path], metas: list[dict[str, Any]], seed: int):
        self.files = files
        self.metas = metas
        self.seed = seed
        self.on_decode = lambda: None

    def key(self, position: int, attempt: int) -> str:
        return str(self.files[position % len(self.files)])

    def try_position(self, position: int, attempt: int) -> Example | DecodeFailure:
        rng = np.random.default_rng((self.seed, position))
        number = position % len(self.files)
        file = self.files[number]
        other = self.files[int(rng.integers(len(self.files)))]
        kind, data = mutate(file.read_bytes(), other.read_bytes(), rng)
        meta = self.metas[number] if rng.uniform() < 0.5 else None
        self.on_decode()
        try:
            with open_video(data, file.suffix[1:], meta) as video:
                frames = video.get(sample_indices(video.times, 8, stride=2, start=rng.uniform()))
        except DecodeError as e:
            return DecodeFailure(kind, e.reason)
        return Example(position, kind, -1, torch.from_numpy(frames), [])


def run(files: list[Path], count: int, seed: int, deadline: float) -> tuple[Counter[str], list[float]]:
    """Returns the number of files for each outcome, and the seconds of each file."""
    inspector = FileInspector("auto", 60.0)
    found = [(f, inspector(f, f.suffix[1:].lower())[0]) for f in files]
    known = [(f, sample.meta) for f, sample in found if isinstance(sample, EncodedSample)]
    inspector.close()
    isolated = IsolatedDataset(
        Damaged([f for f, _ in known], [m for _, m in known], seed), deadline, memory_bytes=2 << 30
    )
    outcomes = Counter[str]()
    seconds = []
    for position in range(count):
        start = time.perf_counter()
        result = isolated.try_position(position, 0)
        seconds.append(time.perf_counter() - start)
        outcomes["decoded" if isinstance(result, Example) else result.reason] += 1
        if isinstance(result, DecodeFailure) and result.reason in ("hang", "crash", "memory"):
            print(f"{result.reason}: position {position}, from {result.key}", flush=True)
    isolated.close()
    return outcomes, seconds


def main(argv: list[str]) -> None:
    settings = dict(a.split("=", 1) for a in argv[1:])
    if not argv or settings.keys() - {"count", "seed", "deadline"}:
        raise UserError("expected: FOLDER [count=5000] [seed=0] [deadline=20]")
    files = [f for f in sorted(Path(argv[0]).rglob("*")) if f.suffix[1:].lower() in VIDEO_EXTENSIONS]
    files = [f for f in files if 0 < f.stat().st_size <= MAX_FILE_BYTES]
    count, seed = int(settings.get("count", 5000)), int(settings.get("seed", 0))
    outcomes, seconds = run(files, count, seed, float(settings.get("deadline", 20)))
    for outcome, n in outcomes.most_common():
        print(f"{outcome:20} {n:6}")
    print(
        f"{count} damaged files made of {len(files)}; mean {np.mean(seconds):.3f} s, longest "
        f"{max(seconds):.1f} s"
    )


if __name__ == "__main__":
    run_cli(main, __doc__)

"""Reads the compact vectors: read_compact("vectors/NAME.json") returns (about, tensors). See
vectors/README.md.

Weights and inputs are not stored. Every value is a function of its tensor's name, shape and index, so that no
random generator is involved.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {"bool": torch.bool, "int64": torch.int64, "float32": torch.float32}


def uniform(name: str, shape: Sequence[int]) -> np.ndarray:
    """float64 [*shape] in [-1, 1), multiples of 2**-23: splitmix64 seeded with the first 8 bytes of
    SHA-256(name)."""
    seed = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    index = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    z = index * np.uint64(0x9E3779B97F4A7C15) + seed  # all arithmetic is modulo 2**64
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1).reshape(shape)


def default_range(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """(offset, scale) of a weight for which the case gives none."""
    kind = name.rsplit(".", 1)[-1]
    if kind in ("running_var", "weight_g") or (kind == "weight" and len(shape) == 1):
        return 1.0, 0.2
    if kind in ("weight", "weight_v"):
        return 0.0, 1.5 / math.sqrt(math.prod(shape[1:]))
    return 0.0, 0.1 if len(shape) == 1 else 0.5  # a bias; a token or a table


def expand(pattern: str) -> list[str]:
    """All names of a pattern: {a,b} stands for one of the words, {0..3} for a number."""
    choices: list[list[str]] = []
    for i, part in enumerate(re.split(r"\{([^}]*)\}", pattern)):
        if i % 2 == 0:
            choices.append([part])
        elif span := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            choices.append([str(n) for n in range(int(span[1]), int(span[2]) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(words) for words in itertools.product(*choices)]


def named_shapes(entries: list[list[Any]]) -> Iterator[tuple[str, list[int], list[float]]]:
    """(name, shape, [offset, scale, step] or fewer) for every name of the patterns."""
    for pattern, shape, *values in entries:
        for name in expand(pattern):
            yield name, shape, values


def recreate(name: str, shape: Sequence[int], values: Sequence[float]) -> Tensor:
    """The tensor of this name, f32 [*shape]. values: offset, scale and, optionally, the step to which it is
    rounded."""
    offset, scale, *step = values or default_range(name, shape)
    x = offset + scale * uniform(name, shape)
    if step:
        x = np.floor(x / step[0]) * step[0]
    return torch.from_numpy(x.astype(np.float32))


def read_compact(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """tensors: weights `state.*`, inputs, masks and ids, and the stored outputs. about["gradients"] has the
    names of the rows of `grad`, about["shapes"] the shape of every weight."""
    about = json.loads(path.read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    about["stored"] = list(tensors)
    for prefix, part in (("state.", "state"), ("", "inputs")):
        for name, shape, values in named_shapes(about.get(part, [])):
            tensors[prefix + name.split("#")[0]] = recreate(
                name, shape, values
            )  # "#..." only changes the values
    for name, (dtype, values) in about.get("given", {}).items():
        tensors[name] = torch.tensor(values, dtype=DTYPES[dtype])
    tensors |= {name: tensors[source] for name, source in about.get("same", {}).items()}
    shapes = {name: shape for name, shape, _ in named_shapes(about.get("state", []))}
    without = tuple(about.get("no_gradient", []))
    about["shapes"] = shapes
    about["gradients"] = sorted(name for name in shapes if not name.startswith(without))
    return about, tensors

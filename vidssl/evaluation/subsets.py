"""Low-shot: class-balanced lists of train that are functions of the keys and a seed alone."""

import hashlib
from typing import Any

from vidssl.evaluation.tasks import Task


def low_shot(task: Task, keys: list[str], truths: list[Any], share: float, seed: int) -> list[int]:
    """Numbers of the chosen samples, in order: of each class equally many, `share` of all together (a class with fewer
    gives all it has); without classes, `share` of all.

    The order of a class is that of sha256("SEED KEY"), so no library decides it, and a smaller share is part of a
    larger one.
    """
    parts: dict[Any, list[int]] = {}
    for number, truth in enumerate(truths):
        if truth is not None:
            parts.setdefault(truth if task.kind == "class" else None, []).append(number)
    each = max(1, round(share * sum(map(len, parts.values())) / max(1, len(parts))))
    drawn = [sorted(part, key=lambda n: _draw(seed, keys[n]))[:each] for part in parts.values()]
    return sorted(n for part in drawn for n in part)


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed} {key}".encode()).digest()


def list_text(keys: list[str], numbers: list[int]) -> str:
    """A list as it is written and hashed: the keys, sorted, a line each."""
    return "".join(f"{key}\n" for key in sorted(keys[n] for n in numbers))

"""Nearest clips among embedded videos, by the cosine of their features."""

from typing import NamedTuple

import numpy as np

from vidssl.evaluation.embedding_files import StoredRows

ROWS_AT_ONCE = 65536
EPS = 1e-12


class Hit(NamedTuple):
    """A row that is near a query."""

    key: str
    start: float  # seconds
    end: float
    similarity: float


def pooled(features: np.ndarray) -> np.ndarray:
    """Rows [n, ..., D] -> f32 [n, D], the mean over slices and places."""
    rows = np.asarray(features, np.float32)
    return rows.reshape(len(rows), -1, rows.shape[-1]).mean(1)


def mean_row(features: np.ndarray) -> np.ndarray:
    """Mean f32 [D] of all rows."""
    total = np.zeros(features.shape[-1])
    for first in range(0, len(features), ROWS_AT_ONCE):
        total += pooled(features[first : first + ROWS_AT_ONCE]).sum(0, dtype=np.float64)
    return (total / len(features)).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), EPS)


def nearest(
    stored: StoredRows, query: np.ndarray, top: int, without: str | None = None, centre: bool = False
) -> list[Hit]:
    """The `top` rows whose cosine with any row of the query, f32 [q, D], is largest; of equal ones the first.

    without: a key whose rows are left out. centre: subtracts the mean of all rows before."""
    mean = mean_row(stored.features) if centre else np.float32(0)
    directions = unit(query - mean)
    similarity = np.concatenate(
        [
            (unit(pooled(stored.features[first : first + ROWS_AT_ONCE]) - mean) @ directions.T).max(1)
            for first in range(0, len(stored.keys), ROWS_AT_ONCE)
        ]
    )
    allowed = np.array([key != without for key in stored.keys])
    order = np.argsort(np.where(allowed, -similarity, np.inf), kind="stable")[: min(top, allowed.sum())]
    return [
        Hit(stored.keys[i], float(stored.start[i]), float(stored.end[i]), float(similarity[i])) for i in order
    ]

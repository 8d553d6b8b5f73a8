"""What a packed corpus holds, as far as a proposal depends on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vidssl.core.errors import UserError
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.format import Sample
from vidssl.data.parts import groups_of
from vidssl.evaluation.tasks import class_of

SHORT_QUANTILE = 0.25  # of the videos may be shorter than a clip


class CorpusFacts(NamedTuple):
    """Numbers of a corpus. Those of frames are 0 where they were not measured, as with images."""

    videos: int
    seconds: float  # of all videos
    frames: int  # that all but SHORT_QUANTILE of the videos have
    fps: float  # median, frames per second
    has_one_rate: bool  # nearly all videos have that rate
    short_side: int  # median, pixels
    area: float  # mean of width x height, pixels
    all_frames: int
    groups: int
    labels: dict[str, int]  # label set -> classes that occur

    def lines(self) -> list[str]:
        """What was found, for the user."""
        found = f"{self.videos:,} videos in {self.groups:,} groups, {self.seconds / 60:.1f} minutes"
        rate = f"{self.fps:g} frames a second" if self.has_one_rate else f"about {self.fps:g} frames a second"
        size = f"{rate}, {self.short_side} pixels on the short side"
        sets = ", ".join(f"{name} ({classes} classes)" for name, classes in self.labels.items())
        return [f"corpus: {found}; {size}; labels: {sets or 'none'}"]


def corpus_facts(samples: Sequence[Sample], classes: dict[str, list[str]]) -> CorpusFacts:
    """Raises UserError if the samples are images."""
    if samples and all(sample.ext in IMAGE_EXTENSIONS for sample in samples):
        raise UserError("--videos: all files are images: nothing moves in them; give videos")
    metas = [s.meta for s in samples if s.meta.get("frames", 0) > 1]
    labels = {}
    for name in classes:
        occurring = {str(c) for s in samples if (c := class_of(s, name)) is not None}
        if len(occurring) > 1:
            labels[name] = len(occurring)
    counts = np.array([m["frames"] for m in metas] or [0])
    seconds = np.array([m.get("duration", 0.0) for m in metas] or [0.0])
    rates = np.array([m.get("fps") or m["frames"] / max(m.get("duration", 0), 1e-3) for m in metas] or [0.0])
    sizes = np.array([(m.get("height", 0), m.get("width", 0)) for m in metas] or [(0, 0)])
    low, high = np.quantile(rates, [0.05, 0.95])
    return CorpusFacts(
        videos=len(samples),
        seconds=float(seconds.sum()),
        frames=int(np.quantile(counts, SHORT_QUANTILE, method="lower")),
        fps=round(float(np.median(rates)), 2),
        has_one_rate=bool(high <= 1.1 * low),
        short_side=int(np.median(sizes.min(1))),
        area=float(sizes.prod(1).mean()),
        all_frames=int(counts.sum()),
        groups=len(set(groups_of(samples))),
        labels=labels,
    )


class Folders(NamedTuple):
    """Packed folders of a corpus."""

    train: str
    test: str | None


def packed_folders(folder: Path) -> Folders | None:
    """The packed folders at a path: itself, or its train and test; None if it is a folder of videos.
    Raises UserError for a pack that was cut off."""
    if (folder / "index.json").is_file():
        return Folders(str(folder), None)
    if (folder / "train" / "index.json").is_file():
        has_test = (folder / "test" / "index.json").is_file()
        return Folders(str(folder / "train"), str(folder / "test") if has_test else None)
    if (folder / "plan.json").is_file():
        raise UserError(f"--videos {folder}: a pack that is not complete: start its vidssl pack again")
    return None

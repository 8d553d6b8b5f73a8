"""The clips of a run's page: the middles of some videos of its data."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from einops import rearrange
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.data.shards import Sample, Shards
from vidssl.data.timing import middle_rate
from vidssl.evaluation.views import EvalClips, View
from vidssl.pictures.strips import short_name
from vidssl.report.contents import resolve_data
from vidssl.report.run_files import RunFiles
from vidssl.training.schema import TrainConfig


class ReportClip(NamedTuple):
    """A clip that is shown."""

    key: str
    name: str  # of its file, short
    label: str  # its classes
    clip: Tensor  # u8 [3, T, S, S]

    @property
    def frames(self) -> np.ndarray:
        """u8 [T, S, S, 3]"""
        return rearrange(self.clip, "c t h w -> t h w c").numpy()


def open_data(run: RunFiles) -> tuple[Shards, Shards]:
    """The shards of train, and those of test beside them (else the same)."""
    named = run.section("data").get("train") or []
    first = str(named if isinstance(named, str) else named[0]) if named else ""
    folder = resolve_data(run, first)
    if folder is None:
        raise UserError(f"data.train {first}: no shards there, so no pictures of clips")
    test = folder.with_name("test")
    has_test = folder.name == "train" and (test / "index.json").is_file()
    train_shards = Shards([str(folder)])
    return train_shards, Shards([str(test)]) if has_test else train_shards


def spread_samples(shards: Shards, count: int) -> list[Sample]:
    """At most `count` samples, evenly spaced."""
    return spread_of(shards.list_samples(), count)


def spread_of(samples: Sequence[Sample], count: int) -> list[Sample]:
    numbers = np.unique(np.linspace(0, len(samples) - 1, count).round().astype(int))
    return [samples[i] for i in numbers] if samples else []


def clip_view(cfg: TrainConfig) -> View:
    """A clip of a video as a run's encoder sees it."""
    stride, fps = middle_rate(cfg.data.stride, cfg.data.fps)
    arguments = cfg.encoder_arguments()
    return View(arguments["frames"], stride, fps, segments=1, crops=1, size=arguments["height"])


def read_clips(view: View, shards: Shards, samples: list[Sample]) -> list[ReportClip]:
    """The middle clips of the samples that decode."""
    clips = EvalClips(shards, samples, view, 1)
    found = (clips[i] for i in range(len(samples)))
    return [
        ReportClip(samples[i].key, file_name(samples[i]), classes_text(samples[i], shards.classes), clip[0])
        for i, clip in found
        if isinstance(clip, Tensor)
    ]


def file_name(sample: Sample) -> str:
    """The name of the file that a sample was packed from, short."""
    return short_name(PurePath(str(sample.meta.get("source") or sample.key)).name)


def classes_text(sample: Sample, classes: dict[str, list[str]]) -> str:
    """The classes of a sample by their names."""
    found = []
    for label_set, number in (sample.meta.get("labels") or {}).items():
        names = classes.get(label_set, [])
        if isinstance(number, int) and 0 <= number < len(names):
            found.append(names[number])
    return ", ".join(found)

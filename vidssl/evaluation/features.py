"""Frozen features of a data set: kept in memory or on disk, or, where they do not fit, computed whenever asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vidssl.config import Count, Positive, Size
from vidssl.core.errors import UserError
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.feature_cache import FeatureShape, FeatureStore, used_gb
from vidssl.evaluation.views import EvalClips, View

Encode = Callable[[Tensor], Tensor]  # video u8 [B, 3, T, S, S] -> f32 [B, N, D]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class FeatureStorage:
    """How features are computed and kept; of these only `cache_dtype` changes results."""

    cache: str | None = (
        None  # a folder where features stay for other heads, protocols and calls; None: in memory
    )
    cache_gb: Positive = 100.0  # that the folder may hold
    cache_dtype: Literal["fp32", "bf16"] = "fp32"  # on disk
    memory_gb: Positive = 8.0  # that features may take without a cache
    stream: Literal["auto", "never", "always"] = (
        "auto"  # decode and encode in every epoch: auto, where they do not fit
    )
    allow_unreadable: bool = False  # a test video that cannot be read: an error, or counted wrong and listed
    encode_batch: Count = 16  # videos
    workers: Size = 2  # processes that decode


class TokenSource(Protocol):
    """Features by the numbers of examples. An example is `per` clips of a sample, numbered as in EvalClips."""

    shape: FeatureShape

    def batches(self, per: int, lists: list[list[int]]) -> Iterator[Tensor]:
        """f32 [b, per * N, D] on the device for each list of examples, to do with as one likes."""


class StoredFeatures:
    """Features [n, C, N, D], in memory or mapped from the disk."""

    def __init__(self, tokens: Tensor, device: torch.device):
        self.tokens, self.device, self.shape = tokens, device, FeatureShape(*tokens.shape)

    def batches(self, per: int, lists: list[list[int]]) -> Iterator[Tensor]:
        s = self.shape
        examples = self.tokens.view(s.samples * s.clips // per, per * s.tokens, s.width)
        for numbers in lists:
            yield examples[numbers].to(self.device).float()


class StreamedFeatures:
    """Features that are computed anew whenever they are asked for, by all heads of a grid together."""

    def __init__(self, feed: "FeatureLoader", shape: FeatureShape):
        self.feed, self.shape = feed, shape

    def batches(self, per: int, lists: list[list[int]]) -> Iterator[Tensor]:
        found: list[Tensor] = []
        sizes = iter(map(len, lists))
        size = next(sizes, 0)
        for _, value in self.feed.examples(per, [e for numbers in lists for e in numbers], move=False):
            if isinstance(value, str):
                raise UserError(f"a sample that could be read before cannot be read now ({value})")
            found.append(value)
            if len(found) == size:
                yield torch.stack(found)
                found, size = [], next(sizes, 0)


class StandardisedFeatures:
    """Another source with the mean of train at each token taken off, and the deviation of train in each channel 1.

    After the encoder's LayerNorm, what is common to all clips (positions above all) can be much larger than what tells
    them apart, and differently so from encoder to encoder; a head at one learning rate then measures that ratio rather
    than the information. Statistics come from train alone.
    """

    def __init__(self, source: TokenSource, mean: Tensor, deviation: Tensor):
        self.source, self.mean, self.deviation, self.shape = source, mean, deviation, source.shape

    def batches(self, per: int, lists: list[list[int]]) -> Iterator[Tensor]:
        for tokens in self.source.batches(per, lists):
            yield tokens.sub_(self.mean).div_(self.deviation)  # a batch is a copy


def statistics(source: TokenSource, per: int, examples: list[int], batch: int) -> tuple[Tensor, Tensor]:
    """-> (mean [per * N, D] at each token, deviation [D] about those means) over examples; summed in f64."""
    first, second = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    lists = [examples[i : i + batch] for i in range(0, len(examples), batch)]
    for tokens in source.batches(per, lists):
        x = tokens.double()
        first, second = first.to(x.device) + x.sum(0), second.to(x.device) + x.square().sum(0)
    mean = first / len(examples)
    variance = (second / len(examples) - mean.square()).mean(0)
    return mean.float(), variance.clamp_min(0).sqrt().clamp_min(1e-6).float()


class FeatureLoader(NamedTuple):
    """What is needed to compute the features of a data set under a view."""

    encode: Encode
    shards: Shards
    samples: list[Sample]
    view: View
    accelerator: Accelerator
    reading: FeatureStorage
    name: str  # for the progress line

    @torch.no_grad()
    def examples(self, per: int, numbers: list[int], move: bool = True) -> Iterator[tuple[int, Tensor | str]]:
        """(number of an example, f32 [per * N, D] or why it cannot be read), in order; move: to the CPU."""
        r, per_video = self.reading, self.view.clips // per
        clips = EvalClips(self.shards, self.samples, self.view, per)
        batch = r.encode_batch * per_video  # examples: as many clips as in `encode_batch` videos
        loader = DataLoader(clips, batch, sampler=numbers, num_workers=r.workers, collate_fn=list)
        quiet = not move or not self.accelerator.is_main_process
        for items in tqdm(loader, desc=self.name, disable=quiet, mininterval=5):
            good = [clips for _, clips in items if isinstance(clips, Tensor)]
            tokens = iter(())
            if good:
                found = self.encode(torch.stack(good).to(self.accelerator.device).flatten(0, 1)).float()
                found = found.unflatten(0, (len(good), per)).flatten(1, 2)
                tokens = iter(found.cpu() if move else found)
            for number, clip in items:
                yield number, clip if isinstance(clip, str) else next(tokens)

    @torch.no_grad()
    def shape(self) -> FeatureShape:
        """From one black clip."""
        v = self.view
        clip = torch.zeros(
            1, 3, v.seen or v.frames, v.size, v.size, dtype=torch.uint8, device=self.accelerator.device
        )
        return FeatureShape(len(self.samples), v.clips, *self.encode(clip).shape[1:])

    def rows(self, numbers: list[int], shape: FeatureShape) -> Iterator[tuple[int, Tensor | str]]:
        """(number of a sample, f32 [C, N, D] or why it cannot be read)."""
        for number, value in self.examples(shape.clips, numbers):
            yield number, value if isinstance(value, str) else value.view(shape[1:])

    def unreadable(self) -> dict[int, str]:
        """Every sample decoded, none encoded."""
        clips = EvalClips(self.shards, self.samples, self.view, self.view.clips)
        numbers = list(range(len(self.samples)))
        loader = DataLoader(clips, 1, sampler=numbers, num_workers=self.reading.workers, collate_fn=_reasons)
        return {number: why for items in loader for number, why in items}


def _reasons(items: list[tuple[int, Tensor | str]]) -> list[tuple[int, str]]:
    return [(number, why) for number, why in items if isinstance(why, str)]


class Features(NamedTuple):
    source: TokenSource
    unreadable: dict[int, str]  # number of a sample -> reason


def choose_storage(
    shapes: list[FeatureShape], abouts: list[dict], reading: FeatureStorage, processes: int
) -> tuple[str, str]:
    """-> ("disk", "memory" or "stream": where the features of these data sets under one view go, and a line that says
    so before any work is done)."""
    if reading.cache is not None:
        where, limit, copies = "disk", reading.cache_gb, 1
        need = sum(s.gb(DTYPES[reading.cache_dtype]) for s in shapes)
        have, option = used_gb(Path(reading.cache), abouts), f"probe.cache_gb is {reading.cache_gb:g}"
    else:
        copies = 1 if processes == 1 else 3  # its own, those it is sent, and the whole
        need, have, limit = copies * sum(s.gb(torch.float32) for s in shapes), 0.0, reading.memory_gb
        where, option = "memory", f"probe.memory_gb is {reading.memory_gb:g}"
    s = shapes[0]
    what = f"{' + '.join(str(s.samples) for s in shapes)} videos x {s.clips} clips x {s.tokens} tokens x {s.width}"
    line = f"{what}: {need:.3g} GB of features"
    if reading.stream == "always":
        return "stream", f"{line}, computed in every epoch"
    if have + need <= limit:
        return where, f"{line}, kept {f'in {reading.cache}' if where == 'disk' else 'in memory'}"
    full = f"{line}, {option}" + (f" and {reading.cache} holds {have:.3g} GB already" if have else "")
    if reading.stream == "never":
        raise UserError(f"{full}: raise it, use fewer segments or samples, or set probe.stream=auto")
    return "stream", f"{full}: they are computed in every epoch, which is slow"


def compute_features(feed: FeatureLoader, shape: FeatureShape, where: str, about: dict[str, Any]) -> Features:
    """Computed by all processes, each its part; all get the whole. about: what decides the features, for the cache."""
    a, numbers = feed.accelerator, range(len(feed.samples))
    if where == "stream":
        found = Features(StreamedFeatures(feed, shape), feed.unreadable() if a.is_main_process else {})
    elif where == "disk":
        found = on_disk(feed, shape, about)
    else:
        mine = feed.rows(list(numbers[a.process_index :: a.num_processes]), shape)
        tokens, bad = torch.zeros(shape), {}
        for number, value in mine if a.num_processes == 1 else gather_object(list(mine)):
            if isinstance(value, str):
                bad[number] = value
            else:
                tokens[number] = value
        found = Features(StoredFeatures(tokens, a.device), dict(sorted(bad.items())))
    if len(found.unreadable) == len(feed.samples):
        why = next(iter(found.unreadable.values()))
        raise UserError(
            f"none of the {len(feed.samples)} samples can be decoded ({why}): run data_prep.verify"
        )
    return found


def on_disk(feed: FeatureLoader, shape: FeatureShape, about: dict[str, Any]) -> Features:
    """What is missing in the cache is computed; everything else is verified."""
    a = feed.accelerator
    assert feed.reading.cache is not None
    rows = FeatureStore(Path(feed.reading.cache), about, shape, DTYPES[feed.reading.cache_dtype])

    def fill() -> None:
        a.wait_for_everyone()  # the first has the lock and has made the file
        missing = [b for b in range(a.process_index, rows.blocks, a.num_processes) if not rows.whole(b)]
        rows.write(feed.rows([n for block in missing for n in rows.range(block)], shape))
        a.wait_for_everyone()

    if a.is_main_process:
        with rows.lock():
            fill()
    else:
        fill()
    tokens, bad = rows.read()
    return Features(StoredFeatures(tokens, a.device), bad)

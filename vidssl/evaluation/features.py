"""Frozen features of a data set: kept in memory or on disk, or computed in every pass where they do not
fit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vidssl.config import NonNegativeInt, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.data.dataset import do_nothing
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.feature_cache import FeatureShape, FeatureStore, used_gb
from vidssl.evaluation.isolated_clips import IsolatedEvalClips
from vidssl.evaluation.views import EvalClips, View

Encode = Callable[[Tensor], Tensor]  # video u8 [B, 3, T, S, S] -> f32 [B, N, D]
Location = Literal["disk", "memory", "recompute"]
CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class FeatureStorage:
    """How features are computed and kept; only `cache_dtype` changes results."""

    cache: str | None = None  # folder of features for other heads, protocols and runs; None: in memory
    cache_gb: PositiveFloat = 100.0  # size limit of the folder
    cache_dtype: Literal["fp32", "bf16"] = "fp32"  # on disk
    memory_gb: PositiveFloat = 8.0  # size limit of features in memory
    # decode and encode in every pass; auto: if the features are too large to keep
    recompute: Literal["auto", "never", "always"] = "auto"
    allow_unreadable: bool = False  # count test samples that cannot be decoded as wrong; false: an error
    encode_batch: PositiveInt = 16  # videos
    workers: NonNegativeInt = 2  # decoding processes
    decode_timeout_s: PositiveFloat = 60  # seconds; a sample that takes longer cannot be decoded
    decode_memory_mb: PositiveInt = 4096  # 2**20 bytes by which a sample may grow the decoding process


class TokenSource(Protocol):
    """Features of numbered examples. An example is `clips_per_example` clips of a sample, numbered as in
    EvalClips."""

    shape: FeatureShape

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        """Yields f32 [b, clips_per_example * N, D] on the device for each batch of examples. These are
        copies; callers may modify them in place."""


class StoredFeatures:
    """Features [n, C, N, D], in memory or mapped from the disk."""

    def __init__(self, tokens: Tensor, device: torch.device):
        self.tokens = tokens
        self.device = device
        self.shape = FeatureShape(*tokens.shape)

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        pattern = "n (e c) tokens d -> (n e) (c tokens) d"
        examples = rearrange(self.tokens, pattern, c=clips_per_example)  # a view
        for numbers in batches:
            yield examples[numbers].to(self.device).float()


class RecomputedFeatures:
    """Features that are computed anew in every pass, which all heads share."""

    def __init__(self, loader: "FeatureLoader", shape: FeatureShape):
        self.loader = loader
        self.shape = shape

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        tokens: list[Tensor] = []
        sizes = iter(map(len, batches))
        size = next(sizes, 0)
        for _, value in self.loader.examples(clips_per_example, list(chain(*batches)), to_cpu=False):
            if isinstance(value, str):
                raise UserError(f"a sample that was decoded before cannot be decoded now ({value})")
            tokens.append(value)
            if len(tokens) == size:
                yield torch.stack(tokens)
                tokens = []
                size = next(sizes, 0)


class UngatheredFeatures:
    """Placeholder on processes other than the first."""

    def __init__(self, shape: FeatureShape):
        self.shape = shape

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        raise RuntimeError("only the first process has the features")


class StandardisedFeatures:
    """Wraps a source: subtracts train's per-token mean, divides by train's per-channel deviation.

    After the encoder's LayerNorm, what all clips have in common (above all positions) can be much larger than
    what distinguishes them, and differently so from encoder to encoder; a head at one learning rate then
    measures that ratio rather than the information. The statistics come from train alone.
    """

    def __init__(self, source: TokenSource, mean: Tensor, std: Tensor):
        """mean f32 [clips_per_example * N, D], std f32 [D]; see `token_statistics`."""
        self.source = source
        self.mean = mean
        self.std = std
        self.shape = source.shape

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        for tokens in self.source.batches(clips_per_example, batches):
            yield tokens.sub_(self.mean).div_(self.std)


def token_statistics(
    source: TokenSource, clips_per_example: int, batches: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Mean f32 [clips_per_example * N, D] at each token, and standard deviation f32 [D] about those means,
    over examples; summed in f64."""
    total = torch.zeros((), dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for batch in source.batches(clips_per_example, batches):
        tokens = batch.double()
        total = total.to(tokens.device) + tokens.sum(0)
        squares = squares.to(tokens.device) + tokens.square().sum(0)
    count = sum(map(len, batches))
    mean = total / count
    variance = (squares / count - mean.square()).mean(0)
    return mean.float(), variance.clamp_min(0).sqrt().clamp_min(1e-6).float()


class FeatureLoader(NamedTuple):
    """Decodes and encodes the samples of a data set under a view."""

    encode: Encode
    shards: Shards
    samples: list[Sample]
    view: View
    accelerator: Accelerator
    storage: FeatureStorage
    name: str  # of the progress bar
    # called by every process before it meets the others in a collective, after work of any length
    wait: Callable[[], None] = do_nothing

    @torch.no_grad()
    def examples(
        self, clips_per_example: int, numbers: list[int], to_cpu: bool = True
    ) -> Iterator[tuple[int, Tensor | str]]:
        """Yields (number of an example, f32 [clips_per_example * N, D] or reason why it cannot be decoded),
        in order. With to_cpu they are moved to the CPU, and the first process shows a progress bar."""
        batch = self.storage.encode_batch * self.view.clips // clips_per_example  # of encode_batch videos
        quiet = not to_cpu or not self.accelerator.is_main_process
        with self._decoded(clips_per_example, numbers, batch) as loader:
            for items in tqdm(loader, desc=self.name, disable=quiet, mininterval=5):
                decoded = [value for _, value in items if isinstance(value, Tensor)]
                tokens = self._encode(decoded, to_cpu) if decoded else iter(())
                for number, value in items:
                    yield number, value if isinstance(value, str) else next(tokens)

    @contextmanager
    def _decoded(self, clips_per_example: int, numbers: list[int], batch: int) -> Iterator[DataLoader]:
        """A loader of examples, decoded in child processes: lists of items of EvalClips."""
        storage = self.storage
        clips = EvalClips(self.shards, self.samples, self.view, clips_per_example)
        isolated = IsolatedEvalClips(clips, storage.decode_timeout_s, storage.decode_memory_mb << 20)
        with closing(isolated):
            yield DataLoader(isolated, batch, sampler=numbers, num_workers=storage.workers, collate_fn=list)

    def _encode(self, decoded: list[Tensor], to_cpu: bool) -> Iterator[Tensor]:
        """Clips u8 [clips_per_example, 3, T, S, S] of each example -> its f32 [clips_per_example * N, D]."""
        video = torch.stack(decoded).to(self.accelerator.device)
        encoded = self.encode(rearrange(video, "b clips c t h w -> (b clips) c t h w")).float()
        encoded = rearrange(encoded, "(b clips) n d -> b (clips n) d", b=len(decoded))
        return iter(encoded.cpu() if to_cpu else encoded)

    @torch.no_grad()
    def shape(self) -> FeatureShape:
        """The shape of the features, from one black clip."""
        view = self.view
        clip = torch.zeros(1, 3, view.first_frames or view.frames, view.size, view.size, dtype=torch.uint8)
        tokens = self.encode(clip.to(self.accelerator.device))
        return FeatureShape(len(self.samples), view.clips, *tokens.shape[1:])

    def rows(self, numbers: list[int], shape: FeatureShape) -> Iterator[tuple[int, Tensor | str]]:
        """Yields (number of a sample, f32 [C, N, D] or reason why it cannot be decoded)."""
        for number, value in self.examples(shape.clips, numbers):
            yield number, value if isinstance(value, str) else value.view(shape[1:])

    def unreadable(self) -> dict[int, str]:
        """Decodes every sample and encodes none. Returns number of a sample -> reason."""
        numbers = list(range(len(self.samples)))
        with self._decoded(self.view.clips, numbers, 1) as loader:
            items = (item for batch in loader for item in batch)
            return {number: value for number, value in items if isinstance(value, str)}


class Features(NamedTuple):
    """The tokens of a set of samples, and the samples that could not be read."""

    source: TokenSource
    unreadable: dict[int, str]  # number of a sample -> reason


def choose_storage(
    shapes: list[FeatureShape],
    storage: FeatureStorage,
    processes: int,
    stores: Sequence[FeatureStore] = (),
) -> tuple[Location, str]:
    """Where the features of these data sets go, and a line for the log that states it before any work is
    done. stores: those of the data sets, if `storage.cache` is set."""
    where: Location
    if storage.cache is not None:
        where = "disk"
        where_text = f"in {storage.cache}"
        limit = storage.cache_gb
        needed = sum(store.shape.gigabytes(store.dtype) for store in stores)
        used = used_gb(Path(storage.cache), stores)
        option = f"probe.cache_gb is {limit:g}" + (
            f" and {storage.cache} holds {used:.3g} GB already" if used else ""
        )
    else:
        where = "memory"
        where_text = "in memory"
        limit = storage.memory_gb
        copies = 1 if processes == 1 else 3  # peak on rank 0: own rows + gathered rows + final tensor
        needed = copies * sum(shape.gigabytes(torch.float32) for shape in shapes)
        used = 0.0
        option = f"probe.memory_gb is {limit:g}"
    s = shapes[0]
    videos = " + ".join(str(shape.samples) for shape in shapes)
    line = f"{videos} videos x {s.clips} clips x {s.tokens} tokens x {s.width}: {needed:.3g} GB of features"
    if storage.recompute == "always":
        return "recompute", f"{line}, computed in every epoch"
    if used + needed <= limit:
        return where, f"{line}, kept {where_text}"
    if storage.recompute == "never":
        raise UserError(
            f"{line}, {option}: raise it, use fewer segments or samples, or set probe.recompute=auto"
        )
    return "recompute", f"{line}, {option}: they are computed in every epoch, which is slow"


def compute_features(
    loader: FeatureLoader,
    shape: FeatureShape,
    where: Location,
    store: FeatureStore | None = None,
) -> Features:
    """Computes the features, each process its share. The first process gets all of them; each
    process knows which samples cannot be decoded. store: for where="disk"."""
    accelerator = loader.accelerator
    if where == "recompute":
        unreadable = loader.unreadable() if accelerator.is_main_process else {}
        features = Features(RecomputedFeatures(loader, shape), unreadable)
    elif where == "disk":
        assert store is not None
        features = _compute_on_disk(loader, store)
    else:
        features = _compute_in_memory(loader, shape)
    loader.wait()
    (unreadable,) = broadcast_object_list([features.unreadable])
    if len(unreadable) == len(loader.samples):
        reason = next(iter(unreadable.values()))
        raise UserError(
            f"none of the {len(loader.samples)} samples can be decoded ({reason}): run data_prep.verify"
        )
    return features._replace(unreadable=unreadable)


def _compute_in_memory(loader: FeatureLoader, shape: FeatureShape) -> Features:
    accelerator = loader.accelerator
    share = range(accelerator.process_index, len(loader.samples), accelerator.num_processes)
    rows = _gather(loader, loader.rows(list(share), shape))
    if rows is None:
        return Features(UngatheredFeatures(shape), {})
    tokens = torch.zeros(shape)
    unreadable = {}
    for number, value in rows:
        if isinstance(value, str):
            unreadable[number] = value
        else:
            tokens[number] = value
    return Features(StoredFeatures(tokens, accelerator.device), dict(sorted(unreadable.items())))


def _gather(loader: FeatureLoader, rows: Iterator[Any]) -> Any:
    """The rows of all processes, on the first process; None on the others."""
    accelerator = loader.accelerator
    if accelerator.num_processes == 1:
        return rows
    gathered: Any = [None] * accelerator.num_processes if accelerator.is_main_process else None
    own = list(rows)
    loader.wait()
    torch.distributed.gather_object(own, gathered, dst=0)
    return None if gathered is None else chain.from_iterable(gathered)


def _compute_on_disk(loader: FeatureLoader, store: FeatureStore) -> Features:
    """Computes the blocks that are missing from the cache, and verifies the others."""
    accelerator = loader.accelerator

    def fill() -> None:
        loader.wait()  # the first process holds the lock and has created the file
        accelerator.wait_for_everyone()
        blocks = range(accelerator.process_index, store.num_blocks, accelerator.num_processes)
        missing = [block for block in blocks if not store.is_valid(block)]
        if missing:
            store.write(loader.rows([n for block in missing for n in store.block_rows(block)], store.shape))
        loader.wait()
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        with store.lock():
            fill()
    else:
        fill()
    tokens, unreadable = store.read()
    return Features(StoredFeatures(tokens, accelerator.device), unreadable)

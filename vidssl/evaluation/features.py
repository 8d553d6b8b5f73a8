"""Frozen features of a data set: kept in memory or on disk, or computed in every pass where they do not
fit."""

import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader

from vidssl.config import NonNegativeInt, PositiveFloat, PositiveInt
from vidssl.core.cpus import available_cpus
from vidssl.core.errors import UserError
from vidssl.core.progress import track
from vidssl.data.dataset import do_nothing
from vidssl.data.shards import Sample
from vidssl.evaluation.feature_cache import NOT_FINITE, FeatureShape, FeatureStore, used_gb
from vidssl.evaluation.isolated_clips import IsolatedEvalClips
from vidssl.evaluation.processes import ONE_PROCESS, Processes, processes_of
from vidssl.evaluation.transfers import downloads, in_order, uploads
from vidssl.evaluation.views import EvalClips, MediaSource, View

Encode = Callable[[Tensor], Tensor]  # video u8 [B, 3, T, S, S] -> f32 [B, N, D]
Location = Literal["disk", "memory", "recompute"]
CPU_BATCH = 16  # videos that are encoded at once
# The same elsewhere: of so many pixels in all their frames (64 clips of 16 frames of 224 x 224)
DEVICE_PIXELS = 64 * 16 * 224**2
MAX_BATCH = 256
MAX_WORKERS = 32
CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class FeatureStorage:
    """How features are computed and kept; only `cache_dtype` changes results."""

    cache: str | None = None  # folder of features for other heads, protocols and runs; None: in memory
    cache_gb: PositiveFloat = 100.0  # size limit of the folder
    cache_dtype: Literal["fp32", "bf16"] = "fp32"  # on disk
    memory_gb: PositiveFloat = 8.0  # size limit of features in the memory of each process
    # decode and encode in every pass; auto: if the features are too large to keep
    recompute: Literal["auto", "never", "always"] = "auto"
    # count test samples that cannot be decoded, or whose features are not finite, as wrong; false: an error
    allow_unreadable: bool = False
    encode_batch: PositiveInt | None = None  # videos; None: 16 on a CPU, what fills the device elsewhere
    # decoding processes; None: 2 on a CPU, elsewhere one for each core of a process but one
    workers: NonNegativeInt | None = None
    decode_timeout_s: PositiveFloat = 60  # seconds; a sample that takes longer cannot be decoded
    decode_memory_mb: PositiveInt = 4096  # 2**20 bytes by which a sample may grow the decoding process


class TokenSource(Protocol):
    """Features of numbered examples. An example is `clips_per_example` clips of a sample, numbered as in
    EvalClips."""

    shape: FeatureShape  # of all processes together
    processes: Processes  # that share each batch

    def positions(self, samples: Sequence[int]) -> list[int]:
        """Positions in `samples` of this process's part. The parts of all processes make up the whole."""

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        """Yields f32 [b, clips_per_example * N, D] on the device for each batch of examples of this process's
        part. These are copies; callers may modify them in place."""


class StoredFeatures:
    """Features [n, C, N, D], in memory or mapped from the disk."""

    def __init__(self, tokens: Tensor, device: torch.device, processes: Processes = ONE_PROCESS):
        self.tokens = tokens
        self.device = device
        self.shape = FeatureShape(*tokens.shape)
        self.processes = processes

    def positions(self, samples: Sequence[int]) -> list[int]:
        return list(self.processes.share(len(samples)))

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        pattern = "n (e c) tokens d -> (n e) (c tokens) d"
        examples = rearrange(self.tokens, pattern, c=clips_per_example)  # a view
        for tokens in in_order((examples[numbers] for numbers in batches), self.device):
            yield tokens.float()


class ShardedFeatures:
    """Features in memory: process r of n has those of samples r, r + n, r + 2 n, ..."""

    def __init__(self, tokens: Tensor, shape: FeatureShape, processes: Processes):
        """tokens [of this process's samples, C, N, D]; shape: of all samples."""
        self.stored = StoredFeatures(tokens, processes.device)
        self.shape = shape
        self.processes = processes

    def positions(self, samples: Sequence[int]) -> list[int]:
        rank, number = self.processes.rank, self.processes.number
        return [position for position, sample in enumerate(samples) if sample % number == rank]

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        per_sample = self.shape.clips // clips_per_example
        number = self.processes.number

        def local(example: int) -> int:
            sample, part = divmod(example, per_sample)
            return sample // number * per_sample + part

        own = [[local(example) for example in batch] for batch in batches]
        return self.stored.batches(clips_per_example, own)

    def gathered(self) -> StoredFeatures:
        """All features, on every process."""
        whole = torch.zeros(self.shape)
        whole[self.processes.rank :: self.processes.number] = self.stored.tokens
        return StoredFeatures(self.processes.sum(whole), self.processes.device)


class RecomputedFeatures:
    """Features that are computed anew in every pass, which all heads share."""

    def __init__(self, loader: "FeatureLoader", shape: FeatureShape):
        self.loader = loader
        self.shape = shape
        self.processes = loader.processes

    def positions(self, samples: Sequence[int]) -> list[int]:
        return list(self.processes.share(len(samples)))

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
        self.processes = source.processes
        self.positions = source.positions

    def batches(self, clips_per_example: int, batches: list[list[int]]) -> Iterator[Tensor]:
        for tokens in self.source.batches(clips_per_example, batches):
            yield tokens.sub_(self.mean).div_(self.std)


def token_statistics(
    source: TokenSource, clips_per_example: int, batches: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Mean f32 [clips_per_example * N, D] at each token, and standard deviation f32 [D] about those means,
    over the examples of all processes; summed in f64. batches: of this process's part."""
    shape = (clips_per_example * source.shape.tokens, source.shape.width)
    # There, also where this process has no examples
    device = source.processes.device
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    for batch in source.batches(clips_per_example, batches):
        tokens = batch.double()
        total = total.to(tokens.device) + tokens.sum(0)
        squares = squares.to(tokens.device) + tokens.square().sum(0)
    total, squares = source.processes.sum(torch.stack([total, squares]))
    count = int(source.processes.sum(torch.tensor(sum(map(len, batches)))))
    mean = total / count
    variance = (squares / count - mean.square()).mean(0)
    return mean.float(), variance.clamp_min(0).sqrt().clamp_min(1e-6).float()


def decoding_workers(device: torch.device) -> int:
    """Decoding processes where none are given."""
    if device.type == "cpu":
        return 2
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_WORKERS, max(1, available_cpus() // processes - 1))


class DecodedExamples(NamedTuple):
    """A batch of examples as a decoding process returns it."""

    numbers: list[int]
    reasons: dict[int, str]  # number of an example that cannot be decoded -> reason
    clips: Tensor  # u8 [b, clips_per_example, 3, T, S, S] of the others, in order


def stack_examples(items: list[tuple[int, Tensor | str]], with_clips: bool = True) -> DecodedExamples:
    """items: of EvalClips."""
    clips = [value for _, value in items if with_clips and isinstance(value, Tensor)]
    reasons = {number: value for number, value in items if isinstance(value, str)}
    stacked = torch.stack(clips) if clips else torch.empty(0, dtype=torch.uint8)
    return DecodedExamples([number for number, _ in items], reasons, stacked)


def videos_per_batch(view: View, device: torch.device, given: int | None = None) -> int:
    """Videos that are encoded at once; `given`, if it is set."""
    if given is not None:
        return given
    if device.type == "cpu":
        return CPU_BATCH
    return min(MAX_BATCH, max(1, DEVICE_PIXELS // (view.clips * view.frames * view.size**2)))


class FeatureLoader(NamedTuple):
    """Decodes and encodes the samples of a data set under a view."""

    encode: Encode
    shards: MediaSource
    samples: list[Sample]
    view: View
    accelerator: Accelerator
    storage: FeatureStorage
    name: str  # of the progress bar
    # called by every process before it meets the others in a collective, after work of any length
    wait: Callable[[], None] = do_nothing
    spans: Sequence[tuple[float, float]] | None = None  # of each sample, see EvalClips
    checks_finite: bool = True  # a sample whose features are not finite has none

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def processes(self) -> Processes:
        return processes_of(self.accelerator, self.wait)

    @torch.no_grad()
    def examples(
        self, clips_per_example: int, numbers: list[int], to_cpu: bool = True
    ) -> Iterator[tuple[int, Tensor | str]]:
        """Yields (number of an example, f32 [clips_per_example * N, D] or reason why there are none), in
        order. With to_cpu they are moved to the CPU and checked, and the first process shows a progress
        bar."""
        quiet = not to_cpu or not self.accelerator.is_main_process
        with self._decoded(clips_per_example, numbers) as loader:
            decoded = track(loader, self.name, "batches", quiet=quiet)
            encoded = self._encoded(decoded)
            batches = (
                ((copy.label, copy.on_host()) for copy in downloads(encoded, self.device))
                if to_cpu
                else encoded
            )
            for batch, tokens in batches:
                rows = iter(tokens)
                # as cheap as a sum: of what is not finite it is not, either
                is_finite = iter(
                    tokens.flatten(1).sum(1).isfinite().tolist() if to_cpu and len(tokens) else []
                )
                for number in batch.numbers:
                    if number in batch.reasons:
                        yield number, batch.reasons[number]
                        continue
                    row = next(rows)
                    has_features = next(is_finite, True) or not self.checks_finite
                    yield number, row if has_features else NOT_FINITE

    @contextmanager
    def _decoded(
        self, clips_per_example: int, numbers: list[int], with_clips: bool = True
    ) -> Iterator[DataLoader]:
        """A loader of batches of examples, decoded in child processes."""
        storage = self.storage
        clips = EvalClips(self.shards, self.samples, self.view, clips_per_example, self.spans)
        isolated = IsolatedEvalClips(clips, storage.decode_timeout_s, storage.decode_memory_mb << 20)
        with closing(isolated):
            yield DataLoader(
                isolated,
                self.examples_per_batch(clips_per_example),
                sampler=numbers,
                num_workers=decoding_workers(self.device) if storage.workers is None else storage.workers,
                collate_fn=partial(stack_examples, with_clips=with_clips),
                pin_memory=with_clips and self.device.type == "cuda",
            )

    def _encoded(self, batches: Iterable[DecodedExamples]) -> Iterator[tuple[DecodedExamples, Tensor]]:
        """The batches, each with the f32 [b, clips_per_example * N, D] of its decoded examples."""
        for copy in uploads(((batch, batch.clips) for batch in batches), self.device):
            video = copy.on_device()
            if len(video):
                tokens = self.encode(rearrange(video, "b clips c t h w -> (b clips) c t h w")).float()
                video = rearrange(tokens, "(b clips) n d -> b (clips n) d", b=len(video))
            yield copy.label, video

    def examples_per_batch(self, clips_per_example: int) -> int:
        """Examples that are encoded at once, of whole videos."""
        videos = videos_per_batch(self.view, self.device, self.storage.encode_batch)
        return videos * self.view.clips // clips_per_example

    @torch.no_grad()
    def shape(self, clips: int = 1) -> FeatureShape:
        """The shape of the features, from so many black clips."""
        view = self.view
        frames = view.first_frames or view.frames
        video = torch.zeros(clips, 3, frames, view.size, view.size, dtype=torch.uint8)
        tokens = self.encode(video.to(self.device))
        return FeatureShape(len(self.samples), view.clips, *tokens.shape[1:])

    def rows(self, numbers: list[int], shape: FeatureShape) -> Iterator[tuple[int, Tensor | str]]:
        """Yields (number of a sample, f32 [C, N, D] or reason why it cannot be decoded)."""
        for number, value in self.examples(shape.clips, numbers):
            yield number, value if isinstance(value, str) else value.view(shape[1:])

    def unreadable(self) -> dict[int, str]:
        """Decodes this process's part of the samples and encodes none. Returns number of a sample ->
        reason. The first process shows a progress bar."""
        numbers = list(self.processes.share(len(self.samples)))
        with self._decoded(self.view.clips, numbers, with_clips=False) as loader:
            batches = track(loader, self.name, "batches", quiet=not self.accelerator.is_main_process)
            return {number: reason for batch in batches for number, reason in batch.reasons.items()}


class Features(NamedTuple):
    """The tokens of a set of samples, and the samples that could not be read."""

    source: TokenSource
    unreadable: dict[int, str]  # number of a sample -> reason


def choose_storage(
    shapes: list[FeatureShape],
    storage: FeatureStorage,
    processes: int,
    stores: Sequence[FeatureStore] = (),
    planned: Sequence[FeatureStore] = (),
) -> tuple[Location, str]:
    """Where the features of these data sets go, and a line for the log that states it before any work is
    done. stores: those of the data sets, if `storage.cache` is set; planned: others that will be written
    before."""
    where: Location
    if storage.cache is not None:
        where = "disk"
        where_text = f"in {storage.cache}"
        limit = storage.cache_gb
        needed = sum(store.shape.gigabytes(store.dtype) for store in stores)
        used = used_gb(Path(storage.cache), stores, planned)
        holds = "will hold" if planned else "holds"
        option = f"probe.cache_gb is {limit:g}" + (
            f" and {storage.cache} {holds} {used:.3g} GB {'before' if planned else 'already'}" if used else ""
        )
    else:
        where = "memory"
        where_text = "in memory" if processes == 1 else f"in memory, a part in each of {processes} processes"
        limit = storage.memory_gb * processes
        needed = sum(shape.gigabytes(torch.float32) for shape in shapes)
        used = 0.0
        option = f"probe.memory_gb is {storage.memory_gb:g}"
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
    """Computes the features, each process its share: in memory it keeps these, on disk it can read all of
    them. Each process knows which samples cannot be decoded. store: for where="disk"."""
    if where == "recompute":
        features = Features(RecomputedFeatures(loader, shape), loader.unreadable())
    elif where == "disk":
        assert store is not None
        features = _compute_on_disk(loader, store)
    else:
        features = _compute_in_memory(loader, shape)
    found = loader.processes.gather(features.unreadable)
    unreadable = dict(sorted(ChainMap(*found).items()))
    if len(unreadable) == len(loader.samples):
        reason = next(iter(unreadable.values()))
        if reason == NOT_FINITE:
            raise UserError(
                f"the features of all {len(loader.samples)} samples are not finite: the encoder has "
                "diverged, or they overflow, and probe.precision=fp32 may help"
            )
        raise UserError(
            f"none of the {len(loader.samples)} samples can be decoded ({reason}): run vidssl verify"
        )
    return features._replace(unreadable=unreadable)


def _compute_in_memory(loader: FeatureLoader, shape: FeatureShape) -> Features:
    processes = loader.processes
    share = processes.share(shape.samples)
    tokens = torch.zeros(len(share), *shape[1:])
    unreadable = {}
    for number, value in loader.rows(list(share), shape):
        if isinstance(value, str):
            unreadable[number] = value
        else:
            tokens[share.index(number)] = value
    if processes.number == 1:
        return Features(StoredFeatures(tokens, loader.device, processes), unreadable)
    return Features(ShardedFeatures(tokens, shape, processes), unreadable)


def _compute_on_disk(loader: FeatureLoader, store: FeatureStore) -> Features:
    fill_store(store, lambda numbers: loader.rows(numbers, store.shape), loader.accelerator, loader.wait)
    tokens, unreadable = store.read()
    return Features(StoredFeatures(tokens, loader.device, loader.processes), unreadable)


def fill_store(
    store: FeatureStore,
    rows: Callable[[list[int]], Iterator[tuple[int, Tensor | str]]],
    accelerator: Accelerator,
    wait: Callable[[], None],
) -> None:
    """Computes the blocks that are missing from a store, each process its share, and verifies the others.
    rows: maps numbers of samples to their rows, see FeatureStore.write; wait: see FeatureLoader."""

    def fill() -> None:
        # The first process holds the lock and has created the file
        wait()
        accelerator.wait_for_everyone()
        blocks = range(accelerator.process_index, store.num_blocks, accelerator.num_processes)
        missing = [block for block in blocks if not store.is_valid(block)]
        if missing:
            store.write(rows([n for block in missing for n in store.block_rows(block)]))
        wait()
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        with store.lock():
            fill()
    else:
        fill()

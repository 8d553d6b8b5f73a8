"""Reads shards that have no index, with webdataset: `data.reader: stream`.

data.train lists tars: paths, folders of tars, brace patterns (shards-{000000..000099}.tar), http(s)://, s3://
and other fsspec addresses, or pipe: commands. webdataset shuffles the shards, splits them over processes and
loader workers, and shuffles samples in a buffer; decoding, frame sampling and augmentation are those of the
indexed reader. The order depends on the numbers of processes and workers, and a run that is continued starts
a new pass over newly shuffled shards.
"""

import copy
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from vidssl.core.errors import DecodeError, UserError
from vidssl.data.addresses import is_url, without_query
from vidssl.data.dataset import (
    MAX_ATTEMPTS,
    Decoded,
    DecodeFailure,
    Example,
    decode_clips,
    do_nothing,
    first_decodable,
    with_pyav_fallback,
)
from vidssl.data.decoding import open_video
from vidssl.data.decoding.base import MAX_BYTES
from vidssl.data.extensions import IMAGE_EXTENSIONS, MEDIA_EXTENSIONS
from vidssl.data.format import select_media
from vidssl.data.isolated_dataset import IsolatedDataset
from vidssl.data.metadata import MAX_JSON_BYTES, parse_meta
from vidssl.data.order import positions_per_step
from vidssl.data.remote import filesystem, network_errors
from vidssl.data.schema import DataConfig, Decoder
from vidssl.data.split_names import name_splits
from vidssl.data.tar_files import TarFiles, is_system_file, split_name
from vidssl.data.timing import choose_frames, draw_timing

DAMAGED_TAR = (tarfile.TarError, EOFError, ValueError, zlib.error)


class ShardUrls:
    """The tars that data.train names. `hash` covers their names, since nothing is known of their contents."""

    def __init__(self, data: DataConfig):
        self.urls = [url for entry in data.train for url in expand_entry(entry)]
        missing = [url for url in self.urls if is_path(url) and not Path(url).is_file()]
        if missing and data.on_missing == "error":
            raise UserError(f"{missing[0]}: no such shard ({len(missing)} of {len(self.urls)} are missing)")
        names = [without_query(url).rpartition("/")[2] for url in self.urls]
        self.hash = hashlib.sha256("\n".join(["stream", *names]).encode()).hexdigest()


def is_path(url: str) -> bool:
    return not (url.startswith("pipe:") or is_url(url))


def expand_entry(entry: str) -> list[str]:
    """Returns the tars of one entry of data.train."""
    if is_path(entry) and Path(entry).is_dir():
        tars = sorted(str(path) for path in Path(entry).glob("*.tar") if not is_system_file(path.name))
        if not tars:
            raise UserError(f"{entry}: no .tar file in it")
        if splits := name_splits(Path(tar).stem for tar in tars):
            raise UserError(
                f"{entry}: shards of several splits: {splits}; name those of one, by a pattern such as "
                "train-{000000..000099}.tar"
            )
        return tars
    return expand_urls(entry)


class StreamSettings(NamedTuple):
    """The steps start..stop-1 that a process reads, and its part of them."""

    start: int
    stop: int
    batch: int  # clips of a step, over all processes
    rank: int
    world: int  # number of processes
    isolate: bool  # decode in a child process


def small_members(sample: Mapping[str, Any], media_ext: str) -> dict[str, bytes]:
    """Returns the members of a streamed sample beside its media file."""
    return {ext: data for ext, data in sample.items() if ext != media_ext and not ext.startswith("__")}


class ClipDecoder:
    """Decodes streamed samples; an `AttemptDataset` whose positions are (position, sample) pairs."""

    def __init__(self, data: DataConfig, augment: Callable, seed: int):
        self.data = data
        self.augment: Any = augment  # with data.augment_on=device a TrainingCrop
        self.seed = seed
        self.on_decode: Callable[[], None] = do_nothing

    def key(self, job: tuple[int, dict[str, Any]], attempt: int = 0) -> str:
        return job[1]["__key__"]

    def try_position(self, job: tuple[int, dict[str, Any]], attempt: int = 0) -> Example | DecodeFailure:
        """job: (position, sample); sample: lower-case extension -> bytes, and "__key__".

        Clip and augmentation depend on (seed, position).
        """
        position, sample = job
        self.on_decode()
        d = self.data
        key = self.key(job)
        media = select_media(sample)
        if media is None:
            return DecodeFailure(key, "no_media")
        ext, payload = media
        rng = np.random.default_rng((self.seed, 3, position))
        augment = self.augment.for_clip(d.clip_frames, ext in IMAGE_EXTENSIONS)
        timing = draw_timing(d, rng)

        def decode(decoder: Decoder) -> Decoded:
            with open_video(payload, ext, meta, decoder, d.motion_vectors) as video:
                chosen = choose_frames(video.times, d, timing, augment.one_frame)[None]
                return decode_clips(video, chosen, d, augment, lambda: [copy.deepcopy(rng)])

        try:
            meta = parse_meta(key, small_members(sample, ext), len(payload))
            (clip,), (motion,) = with_pyav_fallback(decode, ext, meta, d.clip_decoder)
        except DecodeError as e:
            return DecodeFailure(key, e.reason)
        except UserError:  # of parse_meta
            return DecodeFailure(key, "bad_metadata")
        label = meta.get("label", -1)
        video = augment(clip, rng) if isinstance(clip, np.ndarray) else clip
        return Example(position, key, label if isinstance(label, int) else -1, video, [], motion)


class StreamingDataset(IterableDataset[list[Example]]):
    """Yields this process's clips of each step, in order; each loader worker its share of the steps."""

    def __init__(self, shards: ShardUrls, decoder: ClipDecoder, lanes: int):
        self.shards = shards
        self.decoder = decoder
        self.lanes = lanes
        self.settings = StreamSettings(0, 0, 0, 0, 1, False)

    def describe(self, workers: int) -> str:
        """Returns the line that is logged when a run starts or continues."""
        s = self.settings
        readers = s.world * max(1, workers)
        line = f"data.reader stream: {len(self.shards.urls)} shards, {readers} loader processes; "
        line += "the order of samples depends on the numbers of processes and workers"
        if s.start:
            line += f"; continued at step {s.start} with newly shuffled shards, "
            line += "not at the sample where it stopped"
        else:
            line += ", and a run that is continued starts a new pass over the shards"
        if len(self.shards.urls) < readers:
            line += "; fewer shards than loader processes: each draws shards at random, with replacement"
        return line

    def __iter__(self) -> Iterator[list[Example]]:
        s = self.settings
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        steps = positions_per_step(s.start, s.stop, s.batch, self.lanes, s.rank, s.world)
        samples = self.samples(s.rank * workers + worker_id, s.world * workers)
        data = self.decoder.data
        isolated = (
            IsolatedDataset(self.decoder, data.decode_timeout_s, data.memory_mb << 20) if s.isolate else None
        )
        try_position = (isolated or self.decoder).try_position

        def next_clip(position: int, _: int) -> Example | DecodeFailure:
            sample = next(samples)
            return sample if isinstance(sample, DecodeFailure) else try_position((position, sample), 0)

        try:
            for positions in islice(steps, worker_id, None, workers):
                yield [first_decodable(position, next_clip) for position in positions]
        finally:
            if isolated:
                isolated.close()

    def samples(self, reader: int, readers: int) -> Iterator[dict[str, Any] | DecodeFailure]:
        """Yields, without end, the samples of loader process `reader` of `readers` and its failures."""
        urls = self.shards.urls
        seed = Random(f"{self.decoder.seed} {self.settings.start}").getrandbits(32)
        failures = ShardFailures(self.decoder.data.on_missing == "error")
        if len(urls) < readers:
            shards = [wds.ResampledShards(urls, seed=seed, worker_seed=lambda: reader, deterministic=True)]
        else:  # all loader processes shuffle alike, and then each takes its part, another one in each epoch
            shards = [
                wds.SimpleShardList(urls),
                wds.detshuffle(len(urls), len(urls), seed=seed),
                lambda source: islice(source, reader, None, readers),
            ]
        buffer = self.decoder.data.shuffle_buffer
        pipeline = wds.DataPipeline(
            *shards,
            partial(open_tars, failures=failures),
            partial(read_samples, failures=failures),
            failures.watch,
            wds.shuffle(buffer, initial=buffer, rng=Random(seed + reader)),
        ).repeat()
        for sample in pipeline:
            yield from failures.pop()
            yield sample
        raise UserError(
            f"{without_query(urls[0])}: no sample can be read from this shard or the {len(urls) - 1} others"
        )


class ShardFailures:
    """Counts shards that cannot be read; the next one is read instead."""

    def __init__(self, strict: bool):
        """strict: a shard that cannot be opened is an error."""
        self.strict = strict
        self.shard = ""  # shard being read, for messages
        self._pending: list[DecodeFailure] = []
        self._in_a_row = 0

    def damaged(self, error: Exception) -> None:
        """The shard cannot be read to its end."""
        self._add("shard_damaged", error)

    def missing(self, error: Exception) -> None:
        """The shard cannot be opened."""
        if self.strict:
            raise UserError(f"{self.shard}: cannot be opened: {error}; data.on_missing=skip passes over it")
        self._add("shard_missing", error)

    def _add(self, reason: str, error: Exception) -> None:
        self._pending.append(DecodeFailure(self.shard, reason))
        self._in_a_row += 1
        if self._in_a_row > MAX_ATTEMPTS:
            raise UserError(f"{self.shard}: {error}; {self._in_a_row} shards in a row could not be read")

    def pop(self) -> list[DecodeFailure]:
        """Returns the failures since the last call."""
        pending, self._pending = self._pending, []
        return pending

    def watch(self, source: Iterable[Any]) -> Iterator[Any]:
        """A stage of the pipeline that passes samples on: a sample that was read ends a row of failures."""
        for sample in source:
            self._in_a_row = 0
            yield sample


def open_url(url: str) -> Any:
    """Opens a path or a pipe: command with webdataset, and any other address with fsspec."""
    if is_path(url) or url.startswith("pipe:"):
        return gopen(url)
    fs, path = filesystem(url)
    return fs.open(path, "rb")


def open_tars(source: Iterable[dict[str, str]], failures: ShardFailures) -> Iterator[dict[str, Any]]:
    """A stage of the pipeline: {"url"} -> {"url", "stream"}."""
    for url in (shard["url"] for shard in source):
        failures.shard = without_query(url)
        try:
            stream = open_url(url)
        except network_errors() as e:
            failures.missing(e)
            continue
        try:
            yield {"url": url, "stream": stream}
        finally:
            stream.close()


def read_samples(source: Iterable[dict[str, Any]], failures: ShardFailures) -> Iterator[dict[str, Any]]:
    """A stage of the pipeline: {"url", "stream"} -> samples (lower-case extension -> bytes, and "__key__").

    Raises UserError if the members of a sample do not follow each other.
    """
    damage: tuple[type[Exception], ...] = (*network_errors(), *DAMAGED_TAR)
    for shard in source:
        try:
            yield from tar_stream_samples(without_query(shard["url"]), shard["stream"])
        except damage as e:
            failures.damaged(e)


def tar_stream_samples(name: str, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yields the samples of a tar that is read from front to back."""
    sample: dict[str, Any] = {}
    seen = set()
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for info in TarFiles(archive):
            key, ext = split_name(info.name) or ("", "")
            if key != sample.get("__key__"):
                if sample:
                    yield sample
                sample = {"__key__": key, "__url__": name}
                if key in seen:
                    raise UserError(
                        f"{name}: the members of sample {key} do not follow each other, and a stream cannot "
                        "join them; run vidssl scan on the shards and use data.reader indexed"
                    )
                seen.add(key)
            if ext in sample:
                raise tarfile.ReadError(f"{info.name} occurs twice")
            if info.size > MAX_BYTES:
                raise tarfile.ReadError(f"{info.name} has {info.size} bytes")
            # Other large members, such as stored features, are not read.
            if ext in MEDIA_EXTENSIONS or info.size <= MAX_JSON_BYTES:
                file = archive.extractfile(info)
                sample[ext] = file.read() if file else b""
    if sample:
        yield sample

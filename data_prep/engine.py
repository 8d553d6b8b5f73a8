"""Makes shards: with a pool of processes on this machine, or one job per shard on a Ray cluster (see
core/cluster.py); the bytes are equal."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from data_prep.encode import EncodedSample
from data_prep.filters import Rejected
from data_prep.index import sample_key, tar_samples, write_lines
from data_prep.inspect_file import FileInspector
from data_prep.plan import Plan, ShardPlan
from data_prep.sources import SourceItem
from vidssl.core.cluster import check_seen_by_node, run_on_cluster
from vidssl.core.errors import UserError
from vidssl.core.io import make_folder, os_errors_as_user_errors
from vidssl.data.format import dumps, sample_record, select_media
from vidssl.data.metadata import packed_mark

Inspected = list[EncodedSample | Rejected]  # results of inspecting one source file
# Owner, time and mode are constant, so that the bytes of a shard are a function of its samples.
TAR_HEADER: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0}


def write_shard(shard: ShardPlan, inspected: Iterable[Inspected], plan: Plan, suffix: str = "") -> None:
    """Writes the tar, its .jsonl and the list of rejected files; the tar is renamed last.

    inspected: the result of each file of the shard, in order. suffix: makes the name of the unfinished tar
    unique.
    """
    unfinished = shard.tar.with_name(f"{shard.tar.name}{suffix}.tmp")
    try:
        with os_errors_as_user_errors(unfinished):
            _write_shard(shard, inspected, plan, unfinished)
    finally:
        # Half a shard holds no space on a full disk; a whole one has been renamed
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _write_shard(shard: ShardPlan, inspected: Iterable[Inspected], plan: Plan, unfinished: Path) -> None:
    metas: dict[str, dict] = {}
    rejected = []
    with open(unfinished, "wb") as file, TarWriter(file, encoder=False, **TAR_HEADER) as tar:
        for (path, items), results in zip(shard.files(), inspected, strict=True):
            for result in results:
                if isinstance(result, Rejected):
                    rejected.append({"path": path, **result.record()})
                    continue
                item = items[result.item]
                key = sample_key(path, result.start, result.end)
                data = read_original(plan.source / path) if result.data is None else result.data
                ext = item.ext if result.data is None else "mp4"
                metas[key] = sample_meta(item, result, plan) | {"packed": packed_mark(len(data))}
                # TarWriter sorts the members of one call; two calls put the media file first, whatever its
                # name.
                tar.write({"__key__": key, ext: data})
                tar.write({"__key__": key, "json": dumps(metas[key]).encode()})
    write_lines(shard.tar.with_suffix(".jsonl"), map(dumps, _records(unfinished, metas)))
    write_lines(shard.rejections, map(dumps, rejected))
    os.replace(unfinished, shard.tar)


def read_original(path: Path) -> bytes:
    """Returns the bytes of a source file that was inspected before."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read any more: {e.strerror} (call again: finished shards stay)"
        ) from e


def _records(tar: Path, metas: dict[str, dict]) -> Iterator[dict]:
    """The records of a written tar: byte offsets and sizes are read back from its headers."""
    for key, members in tar_samples(tar).samples.items():
        media = select_media(members)
        assert media is not None, key
        ext, (offset, size) = media
        yield sample_record(key, ext, offset, size, metas[key])


def sample_meta(item: SourceItem, encoded: EncodedSample, plan: Plan) -> dict:
    """Returns the contents of KEY.json."""
    first = plan.main_label_set or ""
    labels = {s: plan.classes[s].index(name) for s, name in item.labels.items()}
    is_clip = encoded.start is not None or encoded.end is not None  # others may be of the same file
    return {
        **encoded.meta,
        **{k: t for k, t in (("start", encoded.start), ("end", encoded.end)) if t is not None},
        "label": labels.get(first, -1),
        "class": item.labels.get(first),
        "labels": labels,
        # So that the shards alone say the names of all label sets
        **({"class_names": item.labels} if item.labels and len(plan.classes) > 1 else {}),
        "group": item.group or (item.path if is_clip else None),
        "source": item.path,
    }


def make_locally(
    plan: Plan, shards: list[ShardPlan], workers: int, timeout: float, on_items: Callable[[int], object]
) -> None:
    """Makes shards with a pool of processes, which inspect the files of one shard while the one before is
    written.
    """
    inspector = FileInspector(plan.options["decoder"], timeout, plan.recipe, plan.filters)
    # In this order: where the work ends early, the threads wait for children that are gone
    with ThreadPoolExecutor(workers) as pool, closing(inspector):
        submitted: list[tuple[ShardPlan, list[tuple[int, Future]]]] = []

        def submit(path: str, items: list[SourceItem]) -> tuple[int, Future]:
            spans = [item.span for item in items]
            return len(items), pool.submit(
                inspector, plan.source / path, items[0].ext, spans, items[0].frame_rate
            )

        def results(futures: list[tuple[int, Future]]) -> Iterator[Inspected]:
            while futures:
                items, future = futures.pop(0)  # releases the encoded bytes of files already written
                yield future.result()
                on_items(items)

        try:
            for shard in [*shards, None]:
                if shard is not None:
                    submitted.append((shard, [submit(path, items) for path, items in shard.files()]))
                if len(submitted) > (shard is not None):
                    ready, futures = submitted.pop(0)
                    write_shard(ready, results(futures), plan)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for queued files


def make_on_ray(
    plan: Plan, shards: list[ShardPlan], timeout: float, on_items: Callable[[int], object]
) -> None:
    """Makes each shard in a worker of a Ray cluster."""
    common = plan._replace(datasets={}, rejected={}, source=plan.source.resolve())
    run_on_cluster(
        shard_maker,
        (common, timeout),
        [shard._replace(tar=shard.tar.resolve()) for shard in shards],
        on_done=lambda shard, _: on_items(len(shard.items)),
        name=lambda shard: shard.tar.name,
    )


def shard_maker(plan_and_timeout: tuple[Plan, float]) -> Callable[[ShardPlan], None]:
    """The function that makes one shard in a worker of the cluster, whose inspector all shards share."""
    plan, timeout = plan_and_timeout
    inspector = FileInspector(plan.options["decoder"], timeout, plan.recipe, plan.filters)

    def make_shard(shard: ShardPlan) -> None:
        check_seen_by_node([plan.source, shard.tar.parent])
        if shard.is_finished():
            return
        inspected = (
            inspector(plan.source / path, items[0].ext, [item.span for item in items], items[0].frame_rate)
            for path, items in shard.files()
        )
        write_shard(shard, inspected, plan, suffix=f".{socket.gethostname()}-{os.getpid()}")

    return make_shard


def make(
    plan: Plan,
    shards: list[ShardPlan],
    engine: str,
    workers: int,
    timeout: float,
    on_items: Callable[[int], object],
) -> None:
    """Makes shards of the plan. engine: "local" or "ray"; on_items: called with numbers of finished items."""
    for folder in plan.datasets:
        make_folder(folder)
    if engine == "ray":
        make_on_ray(plan, shards, timeout, on_items)
    else:
        make_locally(plan, shards, workers, timeout, on_items)

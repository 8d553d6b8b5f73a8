"""Where shards are made: here by a pool of processes, or one a task on a Ray cluster. The bytes are the same.

On Ray, source and OUT must be on a file system that all nodes see under the same path. A shard that was in the making
on a worker or node that is lost is made again on another.
"""

import io
import os
import socket
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache
from itertools import islice
from typing import Any

from data_prep.encode import EncodedSample
from data_prep.filters import Rejected
from data_prep.index import Member, dumps, key_of, line_of, write_text
from data_prep.inspect_file import FileInspector
from data_prep.plan import Plan, ShardPlan, span_of
from data_prep.sources import SourceItem
from vidssl.core.errors import UserError
from vidssl.core.io import make_folder

Found = list[EncodedSample | Rejected]
TRIES = 20  # of a shard whose workers or nodes are lost


def write_shard(shard: ShardPlan, found: Iterable[Found], plan: Plan, mark: str = "") -> None:
    """The tar, its jsonl and the list of what was rejected; `found` is what each file gave, in order.

    mark: a name for the unfinished tar that no other process uses.
    """
    beside = shard.tar.with_name(f"{shard.tar.name}{mark}.tmp")
    lines, rejected = [], []
    with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as tar:
        for (path, items), pieces in zip(shard.files(), found, strict=True):
            for piece in pieces:
                if isinstance(piece, Rejected):
                    rejected.append({"path": path, **piece.line()})
                    continue
                item = items[piece.item]
                key, meta = key_of(path, piece.start, piece.end), sample_meta(item, piece, plan)
                data = (plan.source / path).read_bytes() if piece.data is None else piece.data
                ext = item.ext if piece.data is None else "mp4"
                media = _add(tar, f"{key}.{ext}", data, ext)
                _add(tar, f"{key}.json", dumps(meta).encode(), "json")
                lines.append(dumps(line_of(key, media, meta)))
    write_text(shard.tar.with_suffix(".jsonl"), lines)
    write_text(shard.rejections, map(dumps, rejected))
    os.replace(beside, shard.tar)


def _add(tar: tarfile.TarFile, name: str, data: bytes, ext: str) -> Member:
    """One member with a header that says nothing of time, user or machine."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    at = tar.offset + tarfile.BLOCKSIZE  # ustar: the header is one block
    tar.addfile(info, io.BytesIO(data))
    return Member(ext, at, len(data))


def sample_meta(item: SourceItem, piece: EncodedSample, plan: Plan) -> dict:
    """What KEY.json holds."""
    first = plan.first_set or ""
    labels = {s: plan.classes[s].index(name) for s, name in item.labels.items()}
    return {
        **piece.meta,
        **{k: t for k, t in (("start", piece.start), ("end", piece.end)) if t is not None},
        "label": labels.get(first, -1),
        "class": item.labels.get(first),
        "labels": labels,
        "group": item.group,
        "source": item.path,
    }


def local(
    plan: Plan, todo: list[ShardPlan], workers: int, timeout: float, done: Callable[[int], object]
) -> None:
    """A pool of processes over files; one shard is looked into while another is written. done: gets counts of items."""
    probers = FileInspector(plan.options["decoder"], timeout, plan.recipe, plan.filters)
    with closing(probers), ThreadPoolExecutor(workers) as pool:
        ahead: list[tuple[ShardPlan, list[tuple[int, Future]]]] = []

        def submit(path: str, items: list[SourceItem]) -> tuple[int, Future]:
            spans = [span_of(item) for item in items]
            return len(items), pool.submit(probers, plan.source / path, items[0].ext, spans)

        def results(futures: list[tuple[int, Future]]) -> Iterator[Found]:
            while futures:
                items, future = futures.pop(0)  # so that what was written is not kept
                yield future.result()
                done(items)

        try:
            for shard in [*todo, None]:
                if shard is not None:
                    ahead.append((shard, [submit(path, items) for path, items in shard.files()]))
                if len(ahead) > (shard is not None):
                    ready, futures = ahead.pop(0)
                    write_shard(ready, results(futures), plan)
        finally:
            pool.shutdown(
                wait=False, cancel_futures=True
            )  # when interrupted, do not first look into what is queued


def ray(plan: Plan, todo: list[ShardPlan], timeout: float, done: Callable[[int], object]) -> None:
    """A task a shard, on the cluster that RAY_ADDRESS names or that runs here; else on this machine alone."""
    try:
        import ray as cluster
        from ray.exceptions import RayError
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; pip install 'vidssl[ray]'") from None
    waiting: dict[Any, ShardPlan] = {}
    made = "the cluster"
    try:
        if not cluster.is_initialized():
            cluster.init(log_to_driver=False)
        task = cluster.remote(num_cpus=1, max_retries=TRIES)(make_on_node)
        common = cluster.put(plan._replace(sets={}, rejected={}, source=plan.source.resolve()))
        left = iter(todo)
        while True:
            room = 2 * max(1, int(cluster.cluster_resources().get("CPU", 1))) - len(waiting)
            for shard in islice(left, max(0, room)):
                waiting[task.remote(common, shard._replace(tar=shard.tar.resolve()), timeout)] = shard
            if not waiting:
                return
            for ready in cluster.wait(list(waiting), timeout=10)[0]:
                shard = waiting.pop(ready)
                made = shard.tar.name
                cluster.get(ready)
                done(len(shard.items))
    except (RayError, ConnectionError) as e:
        cause = getattr(e, "cause", None)
        said = str(cause if isinstance(cause, UserError) else e).strip().splitlines()[-1]
        raise UserError(f"{made}: {said} (call again: finished shards stay)") from e
    finally:
        for ref in waiting:
            cluster.cancel(ref)


def make_on_node(plan: Plan, shard: ShardPlan, timeout: float) -> None:
    """One shard, made in a worker of the cluster."""
    node = socket.gethostname()
    for folder in (plan.source, shard.tar.parent):
        if not folder.is_dir():
            raise UserError(f"{folder}: not there on node {node}; all nodes must see it under this path")
    if shard.is_finished():
        return
    prober = _prober_of_worker(plan.options["decoder"], timeout, plan.recipe, plan.filters)
    found = (prober(plan.source / p, items[0].ext, [span_of(i) for i in items]) for p, items in shard.files())
    write_shard(shard, found, plan, mark=f".{node}-{os.getpid()}")


_prober_of_worker = lru_cache(maxsize=1)(FileInspector)  # a worker makes many shards; its child ends with it


def make(plan: Plan, engine: str, workers: int, timeout: float, done: Callable[[int], object]) -> None:
    """Every shard that is not there yet. engine: local or ray."""
    todo = [shard for shard in plan.shards() if not shard.is_finished()]
    for folder in plan.sets:
        make_folder(folder)
    done(sum(len(s.items) for s in plan.shards()) - sum(len(s.items) for s in todo))
    if engine == "ray":
        ray(plan, todo, timeout, done)
    else:
        local(plan, todo, workers, timeout, done)

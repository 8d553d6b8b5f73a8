"""Features of many videos on a Ray cluster: `vidssl embed --engine ray`.

The blocks of rows (see embedding.py) are jobs. A worker gets plan and encoder from the program and writes its
blocks itself; one that would compute other bytes (another device, other libraries) is an error.
"""

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from vidssl.core.cluster import WorkerSize, check_seen_by_node, node_resources, room_for, run_on_cluster
from vidssl.core.errors import UserError
from vidssl.core.progress import Progress
from vidssl.evaluation.embedding import (
    PARTS,
    Embedding,
    EmbeddingPlan,
    check_space_for_rows,
    make_row_computer,
    read_embedding_rows,
)
from vidssl.evaluation.feature_cache import FeatureShape, FeatureStore
from vidssl.evaluation.features import MAX_WORKERS, FeatureStorage
from vidssl.evaluation.frozen_encoder import FrozenEncoder

# A GPU's process lasts for a job, and loads the encoder anew: few jobs, yet enough to even out their times
JOBS_PER_PROCESS = 4


class ClusterSettings(NamedTuple):
    """What is reserved on the cluster; None: what it has."""

    processes: int | None  # at a time
    gpus: float | None  # of a process
    workers: int | None  # decoding processes of a process


class EmbeddingWork(NamedTuple):
    """What every worker gets."""

    plan: EmbeddingPlan
    encoder: FrozenEncoder
    out: Path
    storage: FeatureStorage
    inputs: list[Path]  # that it must see
    on_gpu: bool


class BlockJob(NamedTuple):
    """Blocks of the store of this name; None: of no store yet."""

    store: str | None
    blocks: Sequence[int]


class StoreFacts(NamedTuple):
    """What identifies the rows that a worker computes."""

    provenance: dict[str, Any]
    shape: FeatureShape


def compute_embedding_on_cluster(
    plan: EmbeddingPlan,
    encoder: FrozenEncoder,
    out: Path,
    storage: FeatureStorage,
    inputs: Sequence[str],
    settings: ClusterSettings,
) -> Embedding:
    """Computes the rows that OUT/parts does not have yet. inputs: local files and folders of the plan."""
    nodes = node_resources()
    size = process_size(nodes, settings)
    work = EmbeddingWork(
        plan,
        encoder,
        out.absolute(),
        FeatureStorage(**{**vars(storage), "workers": size.cpus - 1}),
        [Path(item).absolute() for item in inputs],
        size.gpus > 0,
    )
    found: list[StoreFacts] = []

    def run(jobs: list[BlockJob], on_done: Callable[[BlockJob, StoreFacts], object]) -> None:
        run_on_cluster(block_computer, work, jobs, on_done, lambda _: str(out), size, settings.processes)

    run([BlockJob(None, ())], lambda _, facts: found.append(facts))
    store = FeatureStore(work.out / PARTS, found[0].provenance, found[0].shape, plan.dtype)
    check_space_for_rows(out, store)
    with store.lock():
        missing = [block for block in range(store.num_blocks) if not store.is_valid(block)]
        left = sum(len(store.block_rows(block)) for block in missing)
        total = store.shape.samples
        jobs_wanted = JOBS_PER_PROCESS * (settings.processes or room_for(size, nodes))
        with Progress("embed", total, "rows", done=total - left) as progress:
            run(
                block_jobs(store.folder.name, missing, jobs_wanted),
                lambda job, _: progress.update(sum(len(store.block_rows(block)) for block in job.blocks)),
            )
    return read_embedding_rows(plan, encoder, store)


def process_size(nodes: Sequence[dict[str, float]], settings: ClusterSettings) -> WorkerSize:
    """What a process gets: a GPU where the cluster has any, with its share of the CPUs of its node, else one
    CPU. Raises UserError if no node has that much."""
    gpus = settings.gpus
    if gpus is None:
        gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes))
    workers = settings.workers
    if workers is None:
        shares = [node.get("CPU", 0) * gpus / node["GPU"] for node in nodes if node.get("GPU", 0) >= gpus > 0]
        workers = min(MAX_WORKERS, max(0, int(min(shares, default=1)) - 1))
    size = WorkerSize(workers + 1, gpus)
    if not room_for(size, nodes):
        raise UserError(
            f"--engine ray: no node of the cluster has {size.cpus} CPUs and {size.gpus:g} GPUs for a "
            "process; give fewer --workers or --gpus-per-process"
        )
    return size


def block_jobs(store: str, blocks: Sequence[int], count: int) -> list[BlockJob]:
    """At most `count` jobs of as many blocks each."""
    step = max(1, ceil(len(blocks) / count))
    return [BlockJob(store, blocks[i : i + step]) for i in range(0, len(blocks), step)]


def block_computer(work: EmbeddingWork) -> Callable[[BlockJob], StoreFacts]:
    """The function that computes blocks in a worker of the cluster."""
    check_seen_by_node([*work.inputs, work.out / PARTS])
    if work.on_gpu and not torch.cuda.is_available():
        raise UserError("--engine ray: Ray has given a GPU that torch does not find; see vidssl doctor there")
    accelerator = Accelerator(cpu=not work.on_gpu)
    computer = make_row_computer(work.plan, work.encoder, work.out, accelerator, work.storage)
    store = computer.store

    def compute(job: BlockJob) -> StoreFacts:
        if job.store is not None:
            check_same_store(store, work.out / PARTS / job.store)
            # Others are there already if this job is done again
            missing = [block for block in job.blocks if not store.is_valid(block)]
            store.write(computer.rows([n for block in missing for n in store.block_rows(block)]))
        return StoreFacts(store.provenance, store.shape)

    return compute


def check_same_store(store: FeatureStore, expected: Path) -> None:
    """Raises UserError unless this worker's rows belong to the store at `expected`."""
    check_seen_by_node([expected])
    if store.folder != expected:
        raise UserError(
            "--engine ray: nodes compute different bits: another kind of device, precision or version of a "
            f"library than {expected}/provenance.json says; use nodes alike"
        )

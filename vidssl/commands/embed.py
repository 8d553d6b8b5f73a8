"""Features of videos on the disk, by a frozen encoder: sliding windows or whole videos, as a probe sees them.

vidssl embed VIDEOS|SHARDS ... --encoder X --out DIR [--window SECONDS --hop SECONDS] [--tokens pooled]

VIDEOS: files and folders of videos or images; SHARDS: packed folders or their URLs. Writes DIR/features.npy
(or .parquet, .zarr), rows.csv (key, start and end in seconds of each row; SHARD/KEY where shards repeat a
key), rejected.jsonl (what could not be decoded, with reasons) and embedding.json. --processes N shares the
work, --engine ray on the cluster at RAY_ADDRESS (default: this machine); the result is the same. The same
command goes on after SIGTERM (exit status 75), Ctrl-C (130) or a kill. `vidssl search DIR QUERY` finds what
is alike.
"""

import argparse
import json
import os
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidssl.core.cluster import check_seen_by_node, run_on_cluster
from vidssl.core.cpus import available_cpus
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import atomic_write_text, check_writable, make_folder
from vidssl.core.launch import check_gpus, parse_processes, relaunch
from vidssl.core.log import logger, set_log_level
from vidssl.core.progress import Progress, track
from vidssl.core.suggestions import counted
from vidssl.data.addresses import is_url
from vidssl.evaluation.embedding_files import PACKAGES, check_format, write_embedding_files
from vidssl.pretrained.sources import check_source

if TYPE_CHECKING:
    from data_prep.inspect_file import FileInspector
    from vidssl.evaluation.embedding import Embedding, EmbeddingPlan, IdentifiedSource
    from vidssl.evaluation.frozen_encoder import FrozenEncoder
    from vidssl.evaluation.processes import Processes

FILES_PER_PIECE = 64  # that are measured before their facts are written
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def embed_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidssl embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="VIDEOS|SHARDS")
    add("--encoder", required=True, help="a run folder, a checkpoint, timm:NAME or hf:FOLDER_OR_NAME")
    add("--encoder-file", help="weights of a timm model")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder, or that of a cut-off call")
    tokens = "mean token of each row, class token, mean token of each time slice, or all tokens"
    add("--tokens", choices=("pooled", "class", "slices", "dense"), default="pooled", help=tokens)
    add("--window", type=float, metavar="SECONDS", help="rows are windows of videos; default: whole videos")
    add("--hop", type=float, metavar="SECONDS", help="from one window to the next; default: the window")
    add("--segments", type=int, default=1, metavar="N", help="clips evenly spread over a row; 1: the middle")
    add("--crops", type=int, default=1, metavar="N", help="squares of a clip along the longer side")
    add("--frames", type=int, metavar="N", help="of a clip; default: the encoder's")
    add("--size", type=int, metavar="PIXELS", help="of a clip; default: the encoder's")
    add("--stride", type=int, metavar="FRAMES", help="between frames of a clip; default: as trained")
    add("--fps", type=float, metavar="RATE", help="frames per second of a clip, in place of --stride")
    formats = "default: npy; the others need their packages"
    add("--format", choices=("npy", *PACKAGES), default="npy", help=formats)
    add("--dtype", choices=("fp16", "fp32"), default="fp16")
    precision = "of matrix products; auto: bf16 on GPUs that have it"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    workers = "decoding processes of each process; default: on a CPU 2 (with --engine ray 0), else by cores"
    add("--workers", type=int, metavar="N", help=workers)
    engine = "ray: processes of a Ray cluster, whose nodes see inputs and DIR under the same paths"
    add("--engine", choices=("local", "ray"), default="local", help=engine)
    processes = (
        "that share the work: of this machine, one for each of its GPUs; with --engine ray of the cluster "
        "(default: as many as it has room for)"
    )
    add("--processes", type=parse_processes, metavar="N", help=processes)
    gpus = "with --engine ray; default: 1 where the cluster has GPUs, else 0"
    add("--gpus-per-process", type=float, metavar="X", help=gpus)
    timeout = "until a file counts as hanging"
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help=timeout)
    return parser


def check_arguments(a: argparse.Namespace) -> None:
    """Raises UserError for what can be known before torch is imported."""
    positive = ("window", "hop", "segments", "crops", "frames", "size", "stride", "fps", "timeout")
    for name in positive:
        value = getattr(a, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g}: must be positive")
    if a.workers is not None and a.workers < 0:
        raise UserError(f"--workers {a.workers}: must not be negative")
    if a.gpus_per_process is not None and not (a.engine == "ray" and 0 <= a.gpus_per_process <= 1):
        raise UserError(f"--gpus-per-process {a.gpus_per_process:g}: from 0 to 1, and with --engine ray")
    if a.engine == "ray" and "RANK" in os.environ:
        raise UserError("--engine ray: a launcher has started this process already (RANK is set)")
    if a.hop is not None and a.window is None:
        raise UserError("--hop: is between windows; give --window, too")
    if a.stride is not None and a.fps is not None:
        raise UserError("--stride and --fps: give one of them")
    if a.tokens == "dense" and a.crops > 1:
        raise UserError("--tokens dense: the tokens of several crops show different places; give --crops 1")
    check_format(a.format)
    check_source(a.encoder, "--encoder", libraries=True)
    for item in a.inputs:
        if not is_url(item) and not Path(item).exists():
            raise UserError(f"{item}: no such file or folder")
    if len({is_packed_folder(item) for item in a.inputs}) > 1:
        raise UserError("give videos or shards, not both: each has an --out of its own")
    check_writable(a.out)


def is_packed_folder(item: str) -> bool:
    return is_url(item) or (Path(item) / "index.json").is_file()


def main(argv: list[str]) -> None:
    a = embed_parser().parse_args(argv)
    check_arguments(a)
    if a.engine == "local" and (a.processes or 1) > 1:
        check_gpus(a.processes)
        relaunch(a.processes)
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.training.preemption import exit_on_lost_peer, exit_on_sigterm

    with exit_on_lost_peer(), exit_on_sigterm("SIGTERM"):
        embed(a)


def embed(a: argparse.Namespace) -> None:
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from vidssl.evaluation.embedding import open_embedding_folder
    from vidssl.evaluation.frozen_encoder import check_embedding_output, load_frozen_encoder
    from vidssl.evaluation.probe_data import encoder_view
    from vidssl.evaluation.processes import processes_of
    from vidssl.training.malloc import tune_malloc
    from vidssl.training.peers import Peers, claim_for_all

    encoder = load_frozen_encoder(
        a.encoder, file=a.encoder_file, frames=a.frames, size=a.size, precision=a.precision
    )
    check_embedding_output(encoder.loaded, a.tokens, a.crops)
    view = encoder_view(
        encoder.loaded, a.segments, a.crops, frames=a.frames, size=a.size, stride=a.stride, fps=a.fps
    )
    tune_malloc()
    accelerator = Accelerator(
        cpu=a.engine == "ray" or not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    set_log_level(accelerator.is_main_process)
    with claim_for_all(a.out, "embed", processes_of(accelerator)), Peers(accelerator) as peers:
        processes = processes_of(accelerator, peers.wait)
        source, samples = open_inputs(a.inputs, absolute=a.engine == "ray")
        request = make_request(a, source, encoder, view)
        if processes.run_on_main(partial(open_embedding_folder, a.out, request)):
            accelerator.print(f"{a.out}: already complete")
        else:
            run_embedding(a, request, source, samples, encoder, view, accelerator, processes)
        peers.wait()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def run_embedding(
    a: argparse.Namespace,
    request: dict[str, Any],
    source: "IdentifiedSource",
    samples: list[Any],
    encoder: "FrozenEncoder",
    view: Any,
    accelerator: Any,
    processes: "Processes",
) -> None:
    """Measures, computes and writes, in a folder that is claimed."""
    from vidssl.evaluation.embedding import (
        DTYPES,
        RejectedRow,
        make_embedding_plan,
        short_windows,
    )
    from vidssl.evaluation.feature_cache import NOT_FINITE

    rejected: list[Any] = []
    if not is_packed_folder(a.inputs[0]):
        samples, rejected = measure_files(a, source, samples, processes)
    if not samples:
        raise UserError(f"{a.inputs[0]}: none of {len(rejected)} files can be decoded: {rejected[0].reason}")
    plan = make_embedding_plan(source, samples, view, a.tokens, DTYPES[a.dtype], a.window, a.hop)
    logger.info(f"embed: {len(samples)} videos, {len(plan.samples)} rows, {len(rejected)} rejected")
    if line := short_windows(plan):
        logger.warning(line)
    embedding = compute_rows(a, plan, encoder, accelerator, processes)
    rejected += embedding.rejected
    if overflows := sum(row.reason == NOT_FINITE for row in rejected):
        advice = "; give --dtype fp32" if a.dtype == "fp16" else ""
        logger.warning(f"{overflows} rows have features that are not finite in {a.dtype}{advice}")
    if not embedding.kept:
        raise UserError(f"{a.out}: no row could be decoded ({rejected[0].reason}); see {a.inputs[0]}")

    def finish() -> None:
        records = [RejectedRow(*row)._asdict() for row in rejected]
        facts = embedding_facts(a, request, plan, embedding.precision)
        features = embedding.features.numpy()
        write_embedding_files(a.out, a.format, features, embedding.kept, plan.rows, records, facts)
        remove_parts(a.out)

    processes.run_on_main(finish)
    counts = f"{len(embedding.kept)} rows of {list(embedding.features.shape[1:])} {a.dtype}"
    accelerator.print(f"{a.out}: {counts}; {len(rejected)} rejected (rejected.jsonl)")
    accelerator.print(f"next: vidssl search {shlex.quote(str(a.out))} KEY_OR_VIDEO --montage hits.png")


def compute_rows(
    a: argparse.Namespace,
    plan: "EmbeddingPlan",
    encoder: "FrozenEncoder",
    accelerator: Any,
    processes: "Processes",
) -> "Embedding":
    from vidssl.evaluation.embedding import compute_embedding
    from vidssl.evaluation.features import FeatureStorage

    storage = FeatureStorage(workers=a.workers, decode_timeout_s=a.timeout)
    if a.engine == "local":
        return compute_embedding(plan, encoder, a.out, accelerator, storage, processes.wait)
    from vidssl.evaluation.cluster_embedding import ClusterSettings, compute_embedding_on_cluster

    settings = ClusterSettings(a.processes, a.gpus_per_process, a.workers)
    local = [item for item in a.inputs if not is_url(item)]
    return compute_embedding_on_cluster(plan, encoder, a.out, storage, local, settings)


def remove_parts(out: Path) -> None:
    import shutil

    from vidssl.evaluation.embedding import PARTS

    shutil.rmtree(out / PARTS, ignore_errors=True)


def make_request(
    a: argparse.Namespace, source: "IdentifiedSource", encoder: "FrozenEncoder", view: Any
) -> dict[str, Any]:
    """What decides the rows, to tell one call from another."""
    from vidssl.evaluation.report import encoder_facts

    names = ("inputs", "tokens", "window", "hop", "segments", "crops", "frames", "size", "stride", "fps")
    options = {name: getattr(a, name) for name in (*names, "format", "dtype", "precision")}
    options["view"] = view._asdict()  # what an encoder was trained with stands for options that are not given
    return {**options, "data": source.hash, "encoder": encoder_facts(encoder.net, encoder.metadata)}


def embedding_facts(
    a: argparse.Namespace, request: dict[str, Any], plan: "EmbeddingPlan", precision: str
) -> dict[str, Any]:
    """What embedding.json says of the rows."""
    import vidssl

    return {
        "vidssl": vidssl.__version__,
        "inputs": a.inputs,
        "kind": "shards" if is_packed_folder(a.inputs[0]) else "files",
        "root": os.getcwd(),
        "data": request["data"],
        "encoder": {"source": a.encoder, "file": a.encoder_file, **request["encoder"]},
        "tokens": a.tokens,
        "view": plan.view._asdict(),
        "window": a.window,
        "hop": a.hop or a.window,
        "precision": precision,
    }


def open_inputs(inputs: list[str], absolute: bool) -> tuple["IdentifiedSource", list[Any]]:
    """The shards or files, and their samples. absolute: they are found from every folder."""
    root = os.getcwd() if absolute else ""
    if is_packed_folder(inputs[0]):
        from vidssl.data.shards import Shards

        shards = Shards([item if is_url(item) else os.path.join(root, item) for item in inputs])
        return shards, shards.list_named_samples()
    from vidssl.evaluation.media_files import MediaFiles

    paths = list_media(inputs)
    files = MediaFiles(paths, root)
    return files, files.samples


def list_media(inputs: list[str]) -> list[str]:
    """The files that are given, and those in folders that pack would take, each once. Says what else is
    there."""
    from data_prep.sources.folder import media_below
    from data_prep.sources.frames import frame_folders
    from data_prep.summary import Tally, left_out_lines

    found: dict[str, None] = {}
    left_out = Tally()
    for item in inputs:
        below, others = media_below(Path(item)) if os.path.isdir(item) else ([str(Path(item))], Tally())
        found |= dict.fromkeys(below)
        left_out.merge(others)
    if not found:
        packed = [str(p.parent) for item in inputs for p in sorted(Path(item).glob("*/index.json"))]
        hint = f"; packed folders in it: {', '.join(packed)}" if packed else ""
        raise UserError(f"{inputs[0]}: no video or image in it{hint}")
    for line in left_out_lines(left_out.entries()):
        logger.info(line.strip())
    if frames := frame_folders(found):
        logger.warning(
            f"{counted(len(frames), 'folder')} of numbered images, such as {min(frames)}: each image is a "
            "row; vidssl pack --frame-rate RATE makes them videos"
        )
    return list(found)


def measure_files(
    a: argparse.Namespace, source: "IdentifiedSource", samples: list[Any], processes: "Processes"
) -> tuple[list[Any], list[Any]]:
    """The files that decode, as samples with what pack measures, and the others as rejected rows. Each
    process measures its share; the facts are kept in OUT/parts until the features are written."""
    from vidssl.evaluation.embedding import PARTS, RejectedRow

    folder = a.out / PARTS
    make_folder(folder)
    paths = [sample.key for sample in samples]
    pieces = [paths[i : i + FILES_PER_PIECE] for i in range(0, len(paths), FILES_PER_PIECE)]
    files = [folder / f"files-{source.hash[:16]}-{number:06d}.json" for number in range(len(pieces))]
    own = {files[i]: pieces[i] for i in processes.share(len(pieces)) if not files[i].exists()}
    if a.engine == "ray":
        measure_on_cluster(a, own)
    else:
        measure_pieces(a, own, quiet=not processes.is_main)
    processes.gather(None)
    measured = []
    rejected = []
    for sample, fact in zip(
        samples, (f for file in files for f in json.loads(file.read_text())), strict=True
    ):
        if "meta" in fact:
            measured.append(sample._replace(meta=fact["meta"]))
        else:
            rejected.append(RejectedRow(sample.key, None, None, fact["reason"], fact["detail"]))
    return measured, rejected


def measure_pieces(a: argparse.Namespace, pieces: dict[Path, list[str]], quiet: bool) -> None:
    """Measures files as pack does (frames, times, which decoder is right), in child processes, and writes the
    facts of each piece to its file."""
    from data_prep.inspect_file import FileInspector

    cores = available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = max(1, cores if a.workers is None else a.workers)
    inspector = FileInspector("auto", a.timeout)
    # In this order: where the work ends early, the threads wait for children that are gone
    with ThreadPoolExecutor(workers) as pool, closing(inspector):
        for file, paths in track(pieces.items(), "measure", f"x {FILES_PER_PIECE} files", quiet=quiet):
            text = json.dumps(list(pool.map(partial(measure, inspector), paths)))
            atomic_write_text(file, text)


def measure_on_cluster(a: argparse.Namespace, pieces: dict[Path, list[str]]) -> None:
    """As measure_pieces, a piece in a job of the Ray cluster."""
    jobs = [(file.absolute(), [os.path.abspath(path) for path in paths]) for file, paths in pieces.items()]
    seen = [Path(item).absolute() for item in a.inputs]
    with Progress("measure", len(jobs), f"x {FILES_PER_PIECE} files") as progress:
        run_on_cluster(
            piece_measurer, (seen, a.timeout), jobs, lambda *_: progress.update(), lambda _: str(a.out)
        )


def piece_measurer(common: tuple[list[Path], float]) -> Callable[[tuple[Path, list[str]]], None]:
    """The function that measures a piece in a worker of the cluster. common: the inputs, and seconds until a
    file counts as hanging."""
    from data_prep.inspect_file import FileInspector

    inputs, timeout = common
    check_seen_by_node(inputs)
    inspector = FileInspector("auto", timeout)

    def measure_piece(piece: tuple[Path, list[str]]) -> None:
        file, paths = piece
        check_seen_by_node([file.parent])
        atomic_write_text(file, json.dumps([measure(inspector, path) for path in paths]))

    return measure_piece


def measure(inspector: "FileInspector", path: str) -> dict[str, Any]:
    """The facts of a file, or why it is rejected."""
    from data_prep.filters import Rejected
    from vidssl.evaluation.media_files import media_extension

    (found,) = inspector(Path(path), media_extension(path))
    if isinstance(found, Rejected):
        return {"reason": found.reason, "detail": found.detail}
    return {"meta": found.meta}


if __name__ == "__main__":
    run_cli(main)

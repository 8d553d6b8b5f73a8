"""What a program says when it starts and when it has ended: a few lines, of the first process."""

import logging
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from vidssl.core.io import last_json_row
from vidssl.core.log import RESULT, logger
from vidssl.core.suggestions import counted
from vidssl.data.clip_length import Corpus, length_text, look_at, short_line
from vidssl.data.shards import Shards
from vidssl.data.stream import ShardUrls
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probe_data import ProbeSplits
from vidssl.training.distributed import Strategy
from vidssl.training.finetune_loop import Finetuner
from vidssl.training.finetune_schema import FinetuneConfig
from vidssl.training.schema import TrainConfig, default_workers
from vidssl.training.state import TrainState


def machine_line(device: torch.device, processes: int, precision: str, workers: int | None) -> str:
    """workers: loader processes of each process (None: not known yet)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f" ({counted(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else ""
    loaders = "" if workers is None else f", {counted(workers, 'loader worker')} each"
    number = counted(processes, "process", "es")
    return f"machine: {number} on {name}{threads}, {precision}{loaders}"


def model_line(encoder: nn.Module, whole: nn.Module | None = None) -> str:
    """Parameters of the encoder, and of everything beside it that a run holds."""
    line = f"model: encoder of {millions(encoder)} M parameters"
    return line if whole is None else f"{line}, {millions(whole)} M in all"


def millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}"


class RunEnd:
    """Says what a program leaves; made when it starts, so that it knows how long that took."""

    def __init__(self, out: Path):
        self.out = out
        self.start_s = time.monotonic()

    def log(self, done: str, *lines: str) -> None:
        """done: what the folder holds now; lines: what follows."""
        elapsed = tqdm.format_interval(time.monotonic() - self.start_s)
        logger.log(RESULT, f"{self.out}: {done} ({elapsed})")
        log_lines(lines)

    def log_training(self, *lines: str) -> None:
        """Names the last step of log.jsonl and its loss. lines: what follows."""
        if not logger.isEnabledFor(RESULT):  # not the first process
            return
        row = last_json_row(self.out / "log.jsonl")
        loss = row.get("loss")
        steps = f"{row['step']} steps are done" if row else "is complete"
        self.log(steps + ("" if loss is None else f", loss {loss:.4f}"), *lines)


def log_lines(lines: Iterable[str]) -> None:
    for line in lines:
        logger.info(line)


def start_pretraining(
    cfg: TrainConfig,
    strategy: Strategy,
    objective: nn.Module,
    shards: Sequence[Shards] | ShardUrls,
    start: int,
) -> None:
    """Says what is trained on what, and which videos are too short for a clip."""
    run = cfg.run
    precision = strategy.precision
    lines = [machine_line(strategy.device, strategy.world, precision, cfg.num_workers)]
    notes = []
    if isinstance(shards, ShardUrls):
        lines.append(f"data: a stream of {', '.join(cfg.data.train)}")
    else:
        for i, (clip, part) in enumerate(zip(cfg.data.streams(), shards, strict=True)):
            key = f"data.extra_streams[{i - 1}]" if i else "data"
            corpus = look_at(part, clip) if strategy.is_main else Corpus(0, 0, 0, False)
            lines.append(f"{key}: {data_line(part, corpus)}")
            notes.append((short_line(key, clip, corpus), corpus.short == corpus.videos))
    lines.append(model_line(objective.encoder, objective))  # type: ignore[arg-type]
    counts = zip(cfg.data.clips(run.batch), cfg.data.streams(), strict=True)
    clips = " and ".join(f"{n} clips of {length_text(clip)}" for n, clip in counts)
    size = cfg.augment.arguments["size"]
    lines.append(f"run: steps {start + 1} to {run.steps}, each of {clips} at {size} px; output {run.out}")
    log_lines(lines)
    for note, is_all in notes:
        if note:
            logger.log(logging.WARNING if is_all else logging.INFO, note)


def log_dry_run(out: Path, files: str) -> None:
    """Says what a run would write, and that it did not."""
    there = f"; {out} is there already" if out.exists() else ""
    logger.log(RESULT, f"dry run: nothing was written; the run would write {files} into {out}{there}")


def plan_pretraining(cfg: TrainConfig, state: TrainState, shards: Sequence[Shards] | ShardUrls) -> None:
    """What --dry-run does: reads what the run would start from, and says what it would do and write."""
    run = cfg.run
    start = state.restore_or_init()
    start_pretraining(cfg, state.strategy, state.objective, shards, start)
    steps = range(start + 1, run.steps + 1)
    saved = sum(step % run.save_every == 0 or step == run.steps for step in steps)
    kept = f"the last {run.keep_last} stay" + f", and every {run.keep_every} steps one" * bool(run.keep_every)
    also = ", an encoder of each in snapshots" * run.snapshots
    checkpoints = f"{counted(saved, 'checkpoint')} ({kept}{also})"
    log_dry_run(Path(run.out), f"config.yaml, log.jsonl, {checkpoints} and encoder.safetensors")
    state.strategy.close()


def wait_advice(cfg: TrainConfig, has_gpu: bool) -> str:
    """What helps a run that waits for data."""
    data = cfg.data
    most = default_workers()
    is_movable = has_gpu and data.augment_on == "host" and not cfg.augment.arguments.get("randaugment")
    decodes = data.cache == "none"
    ways = (
        (cfg.num_workers < most, f"efficiency.workers={most} uses all cores"),
        (decodes and is_movable, "data.augment_on=device leaves only the decoding to the CPU"),
        (decodes and data.reader == "indexed", "data.cache=host keeps a small corpus decoded"),
        (decodes, "videos packed with --short-side decode faster"),
    )
    return "; ".join(text for is_so, text in ways if is_so)


def start_finetuning(cfg: FinetuneConfig, finetuner: Finetuner) -> None:
    """Says what is fine-tuned on what."""
    strategy, splits, tune = finetuner.strategy, finetuner.splits, cfg.tune
    precision = strategy.precision
    samples = f"{len(splits.train_places):,} samples of train, {len(splits.held_out[0]):,} held out of it"
    classes = f"{len(splits.task.names)} classes of '{splits.task.label}'"
    classifier = finetuner.selection.now
    lines = [
        machine_line(strategy.device, strategy.world, precision, cfg.efficiency.num_workers),
        f"data: {samples}, {len(splits.test[0]):,} of test; {classes}",
        model_line(classifier.encoder, classifier),
        f"run: {tune.epochs} epochs, {finetuner.steps} steps of {tune.batch} videos; output {cfg.out}",
    ]
    log_lines(lines)


def start_probe(
    cfg: ProbeConfig,
    accelerator: Accelerator,
    precision: str,
    splits: ProbeSplits,
    encoder: nn.Module,
    rows: tuple[int, int],
) -> None:
    """Says what is probed on what. rows: those that are not finished, and all."""
    train, test = (f"{len(splits.splits[name].samples):,} samples of {name}" for name in ("train", "test"))
    sets = ", ".join(f"{name} ({s.task.num_outputs})" for name, s in splits.label_sets.items())
    workers = cfg.probe.arguments["workers"]
    lines = [
        machine_line(accelerator.device, accelerator.num_processes, precision, workers),
        f"data: {train}, {test}; label sets (outputs): {sets}",
        model_line(encoder),
        f"run: {rows[0]} of {rows[1]} rows to compute; output {cfg.out}",
    ]
    log_lines(lines)


def data_line(shards: Shards, corpus: Corpus) -> str:
    """Numbers of videos or images, shards and folders."""
    kinds = "samples"
    if corpus.is_whole:
        kinds = "videos" if not corpus.images else "images" if not corpus.videos else "videos and images"
    return f"{shards.n:,} {kinds} in {len(shards.counts):,} shards of {', '.join(shards.folders)}"


def probe_command(out: Path, train: Sequence[str]) -> str:
    """The command that probes the encoder of a run. train: its data."""
    labelled: Path | str = "LABELLED_TRAIN"
    test: Path | str = "LABELLED_TEST"
    first = Path(train[0])
    if first.name == "train" and (first.with_name("test") / "index.json").is_file():
        labelled = first
        test = first.with_name("test")
    words = ["vidssl", "probe", "configs/probe/attentive.yaml", f"encoder={out}"]
    words += [f"data.train={labelled}", f"data.test={test}", f"out={out / 'probe'}"]
    return f"next: {shlex.join(words)}"

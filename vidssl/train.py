"""Pre-training, top to bottom: config -> loader -> Objective -> step loop -> checkpoint.

accelerate launch vidssl/train.py FILES.yaml ... key=value ...
"""

import contextlib
import hashlib
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from vidssl import config, fsdp
from vidssl.checkpoint import load_checkpoint, provenance, set_aside
from vidssl.config import Count, Part, Positive, Size
from vidssl.data.augment import AUGMENTS
from vidssl.data.loader import Batch, Data, make_streams, train_steps
from vidssl.data.order import check_split
from vidssl.data.shards import Shards
from vidssl.draws import Draws
from vidssl.errors import UserError, run_cli
from vidssl.exchange import start_from
from vidssl.files import check_out, make_folder, say, writing
from vidssl.health import Health
from vidssl.log import Lines, Log, Tracker, batch_hash, check_trackers, hash_keys, start_trackers
from vidssl.meter import Meter, keep_memory, most_memory
from vidssl.model.vit import MODELS, Blocks
from vidssl.objective.masks import MASKS
from vidssl.objective.objective import ERRORS, ContextLoss, Objective
from vidssl.objective.predictors import PREDICTORS, QUERIES
from vidssl.objective.targets import TARGETS, Ema, normalise
from vidssl.optim import Optim, clip_gradients, make_optimizer, schedule, set_schedule
from vidssl.resume import Resume
from vidssl.survive import REQUEUE, Guard, Stop, let_go, meet, peers
from vidssl.watch import Watch, Watched


@dataclass(frozen=True)
class Run:
    """The `run` section: what changes the result."""

    out: str  # folder
    steps: Count  # optimiser steps
    batch: Count  # clips a step, over all processes
    init: str | None = None  # a checkpoint to start from: a run folder, or a public one
    seed: Size = 0
    lanes: Count = 8  # a multiple of every number of processes that may be used
    window: Count = 4096  # samples that are shuffled among themselves in a lane
    save_every: Count = 500  # steps between checkpoints
    keep: Count = 2  # newest checkpoints kept
    keep_every: Size = 0  # steps: checkpoints at multiples of it are kept, too; 0: none
    snapshots: bool = False  # keep the encoder of every checkpoint, to probe how it went
    skip_bad: Size = 3  # steps in a row whose loss or gradients are not finite are left out, before going back
    rollbacks: Size = 2  # to the last checkpoint, before the run stops
    spike: Positive | None = None  # deviations of the last 128 steps above their mean at which a step is left out, too
    health_every: Count = 100  # steps between measurements of the features
    stop_on_collapse: bool = False  # else a collapse is only said
    trackers: tuple[Tracker, ...] = ()  # besides log.jsonl


@dataclass(frozen=True)
class Efficiency:
    """The `efficiency` section: what changes only the speed (up to rounding)."""

    workers: Size = 2  # loader processes for each training process
    micro_batches: Count = 1  # parts in which a process runs its share of the batch (gradient accumulation)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass
    compile: bool = False  # the transformer blocks, by torch.compile: needs a C++ compiler, and minutes at the start
    fused: bool = True  # the optimiser's step is one kernel
    recompute: bool = False  # activations of the transformer blocks in the backward pass, instead of keeping them
    isolate: bool = True  # decode in child processes, so that a file that hangs or crashes a decoder costs itself only
    cache_mb: Size = 0  # decoded frames each loader process may hold, in 2**20 bytes; for corpora that fit
    keep_memory: bool = True  # on a CPU, freed memory stays with the process; else each step gets its pages anew
    threads: Count | None = None  # of torch on the CPU, a process; None: torch's own choice
    timeout: Count = 600  # seconds that a process waits for another one before it gives up


SCHEMA: config.Schema = {
    "method": {
        "mask": Part(MASKS),
        "target": Part(TARGETS, ("encoder",)),
        "query": Part(QUERIES, ("width",)),
        "predictor": Part(PREDICTORS, ("encoder", "out")),
        "error": Part(ERRORS),
        "context": Part(ContextLoss),
    },
    "model": Part(MODELS, ("frames", "height", "width")),
    "data": Part(Data),
    "augment": Part(AUGMENTS),
    "optim": Part(Optim),
    "run": Part(Run),
    "watch": Part(Watch),
    "efficiency": Part(Efficiency),
}
# What may change when a run is continued. Of what is read the hash is compared, so that a data set may move.
FREE: tuple[str, ...] = ("efficiency", "watch", "run.out", "run.save_every", "run.keep", "run.keep_every")
FREE += ("run.snapshots", "run.skip_bad", "run.rollbacks", "run.spike", "run.health_every", "run.stop_on_collapse")
FREE += ("run.trackers", "data.train", "data.cache_dir", "data.cache_gb", "data.deadline", "data.memory_mb")


def make_objective(cfg: dict[str, Any]) -> Objective:
    """The method of a resolved configuration, with fresh weights drawn from run.seed."""
    torch.manual_seed(cfg["run"]["seed"])
    size, method = cfg["augment"]["size"], cfg["method"]
    encoder = config.build(cfg["model"], MODELS, frames=cfg["data"]["frames"], height=size, width=size)
    target = config.build(method["target"], TARGETS, encoder=encoder)
    predictor = config.build(method["predictor"], PREDICTORS, encoder=encoder, out=target.width)
    query = config.build(method["query"], QUERIES, width=predictor.width)
    mask, error = config.build(method["mask"], MASKS), config.build(method["error"], ERRORS)
    context = config.build(method["context"], ContextLoss)
    if isinstance(target, Ema) and cfg["optim"]["settle"] and cfg["optim"]["momentum"][1] == 1:
        raise UserError("optim.momentum: the target stands still once it is 1, and with optim.settle the run goes on")
    for stream in (cfg["data"], *cfg["data"]["also"]):  # a mask that cannot be is found here
        one = torch.zeros(1, 3, stream["frames"], size, size)
        mask(one, encoder.grid_of(one), Draws(0, 0, torch.zeros(1, dtype=torch.int64)))
    return Objective(encoder, mask, target, query, predictor, error, context)


def unplaced(cfg: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the places of the further streams' data."""
    data = cfg["data"]
    return {**cfg, "data": {**data, "also": [{**a, "train": None} for a in data.get("also", [])]}}


def open_shards(data: Data) -> tuple[list[Shards], str]:
    """Shards of each stream, and a hash of what they hold."""
    shards = [Shards(d.train, d.cache_dir, d.cache_gb, d.on_missing) for d in data.streams()]
    hashes = [s.hash for s in shards]
    return shards, hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def check_same_run(cfg: dict[str, Any], data: str, state: dict[str, Any], out: Path) -> None:
    """A folder holds one run: what changes its result must not change when it is continued from `state`."""
    if state["provenance"]["data"] != data:
        raise UserError(f"{out}: data.train is not what this run was started on (its index has another hash)")
    before = state["provenance"]["config"]
    free = FREE
    if config.build(cfg["optim"], Optim).endless(cfg["method"]["target"]["kind"] == "ema"):
        free = (*FREE, "run.steps")
    differing = [
        f"{key} is {old!r} there, {new!r} here"
        for key, old, new in config.differences(unplaced(before), unplaced(cfg), free)
    ]
    if state["step"] > cfg["run"]["steps"]:
        raise UserError(f"{out}: {state['step']} steps are done, more than run.steps {cfg['run']['steps']}")
    if differing:
        raise UserError(
            f"{out} holds another run: {'; '.join(differing[:3])}. Give another run.out, or the same values"
        )


def forward_backward(
    accelerator: Accelerator, model: torch.nn.Module, batches: list[Batch], seed: int, step: int, parts: int
) -> dict[str, torch.Tensor]:
    """Gradients of this process's share of the step's clips -> the loss and its parts, averaged over the clips.

    batches: of each stream; each is run in `parts` equal parts, one after another. With several streams the loss of
    each is told too.
    """
    pieces = []
    for number, batch in enumerate(batches):
        video, position = batch.video.to(accelerator.device), batch.position.to(accelerator.device)
        pieces += [(number, *piece) for piece in zip(video.chunk(parts), position.chunk(parts), strict=True)]
    clips = sum(len(position) for _, _, position in pieces)
    total: dict[str, torch.Tensor] = {}
    weights: dict[str, float] = {}
    for i, (number, video, position) in enumerate(pieces):
        share = len(position) / clips
        with contextlib.nullcontext() if i == len(pieces) - 1 else fsdp.apart(accelerator, model):
            with accelerator.autocast():
                got = model(normalise(video), Draws(seed, step, position))
            accelerator.backward(got["loss"] * share)
        if len(batches) > 1:
            got[f"loss_stream_{number}"] = got["loss"]
        for name, value in got.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value.detach() * share
            weights[name] = weights.get(name, 0.0) + share
    if len(batches) > 1:  # what some streams do not tell (as their own losses) is a mean over those that do
        total = {name: value / weights[name] for name, value in total.items()}
    return total


@peers()
def main(argv: list[str]) -> None:
    cfg = config.load(argv, SCHEMA)
    run, eff = config.build(cfg["run"], Run), config.build(cfg["efficiency"], Efficiency)
    data, optim = config.build(cfg["data"], Data), config.build(cfg["optim"], Optim).scaled(run.batch)
    watch = config.build(cfg["watch"], Watch)
    if eff.threads:
        torch.set_num_threads(eff.threads)
    if eff.keep_memory:
        keep_memory()

    # Everything that can be wrong with the user's input is found before anything is written.
    shards, data_hash = open_shards(data)
    out = Path(run.out)
    check_out(out)
    check_trackers(run.trackers)
    state = load_checkpoint(out / "checkpoints")
    if state:
        check_same_run(cfg, data_hash, state, out)
    unused = cfg["model"]["image_tokenizer"]  # gets no gradient from videos
    if unused and fsdp.asked("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("model.image_tokenizer: DeepSpeed decays weights that a batch makes no use of; use fsdp2.yaml")
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused)
    patience = timedelta(seconds=eff.timeout)
    accelerator = fsdp.make_accelerator(
        eff.precision,
        log_with=list(run.trackers) or None,
        project_dir=out,
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=patience)],
    )
    rank, world, main_process = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    sizes = data.clips(run.batch)
    for i, n in enumerate(sizes):
        what = f"data.also[{i - 1}].clips" if i else "run.batch" + (" less data.also's clips:" if data.also else "")
        check_split(n, run.lanes, world, what, data.repeat)
        if (share := n // world) % eff.micro_batches:
            raise UserError(f"efficiency.micro_batches {eff.micro_batches} does not divide {share} clips a process")

    objective = make_objective(cfg)
    if run.init and not state:
        start_from(objective, cfg)
    optimizer = make_optimizer(objective, optim, eff.fused)
    for module in objective.modules():
        if isinstance(module, Blocks):
            module.recompute = eff.recompute
            for block in module if eff.compile else ():
                block.compile(dynamic=True)  # one for all numbers of tokens; names of weights stay as they are
    model, optimizer = fsdp.prepare(accelerator, objective, optimizer, patience)
    watched, measures = None, main_process or fsdp.is_sharded(model)
    saves = measures or fsdp.zero_of(accelerator) is not None
    if measures and watch.train is not None:
        watched = Watched(watch, data.frames, cfg["augment"]["size"], data.stride, data.fps)
    about = provenance(cfg, data_hash)
    guard = Guard(run.skip_bad, run.rollbacks, run.spike, scaled=accelerator.scaler is not None)
    health = Health()
    resume = Resume(accelerator, objective, optimizer, guard, health, out, about)
    start = resume.load(state)
    if run.init and not state:
        resume.branch(Path(run.init))
    if state and start == run.steps:
        if main_process and not (out / "encoder.safetensors").exists():
            resume.export(start, state["model"], snapshot=False)
        accelerator.print(f"{out}: all {run.steps} steps are done")
        return
    log = meter = state = None
    if main_process:
        make_folder(out)
        with writing(out):
            log = Log(out, start, run.steps, start_trackers(accelerator, cfg) if run.trackers else None)
            set_aside(out / "checkpoints", start)
            config.save(cfg, out / "config.yaml")
        meter = Meter(accelerator.device, eff.precision)
    accelerator.wait_for_everyone()

    augment = config.build(cfg["augment"], AUGMENTS)
    streams = make_streams(data, shards, augment, run.seed, run.lanes, run.window, eff.cache_mb << 20)
    loader = train_steps(streams, start, run.steps, sizes, rank, world, eff.workers, eff.isolate)
    bad_lines = Lines(out / "bad_samples.jsonl")
    with log or contextlib.nullcontext(), Stop() as stop, resume.writer, contextlib.closing(loader):  # type: ignore
        clock = time.perf_counter()
        for step, batches in enumerate(loader, start):
            waited = time.perf_counter() - clock
            torch.manual_seed(run.seed + step * world + rank)  # whatever else draws is a function of the step, too
            now = schedule(optim, step, run.steps)
            set_schedule(optimizer, now)
            optimizer.zero_grad()
            shape = tuple(b.video.shape for b in batches)
            with meter.counting(shape) if meter else contextlib.nullcontext(True) as known:
                parts = forward_backward(accelerator, model, batches, run.seed, step, eff.micro_batches)
            norm = clip_gradients(accelerator, model, optim, step)
            done, replaced = step + 1, [(key, reason) for b in batches for key, reason in b.bad]
            collapsed = main_process and run.stop_on_collapse and health.collapsed
            flags = {"bad": len(replaced), "stop": stop.asked, "collapsed": collapsed}
            met = meet(accelerator, {**parts, "grad_norm": norm}, flags)

            if (why := guard.objection(met)) is None:
                optimizer.step()
                if isinstance(objective.target, Ema):
                    objective.target.update(objective.encoder, now["momentum"])
            else:
                let_go(accelerator)
            if log and why:
                log.say(f"step {done}: not taken: {why}")
            if guard.enough:
                back = resume.go_back(f"step {done}: {why}")
                if log:
                    log.say(f"step {done}: back to what was learned up to step {back}; the data go on")

            shown = torch.cat([torch.stack([b.position, hash_keys(b.key)], 1) for b in batches])
            seen = accelerator.gather(shown.to(accelerator.device))
            took = time.perf_counter() - clock
            clock = time.perf_counter()
            bad_lines.add(*({"step": done, "key": key, "reason": reason} for key, reason in replaced))
            measuring, figures = done % run.health_every == 0 or done in (1, run.steps), {}
            if measures:
                health.see(batches[0].video)
                with torch.compiler.set_stance("force_eager") if eff.compile else contextlib.nullcontext():
                    figures = health.measure(objective) if measuring else {}
                    if watched and (done % watch.every == 0 or done == run.steps):
                        figures |= watched.measure(objective)
            if log and meter:
                row: dict[str, Any] = {"step": done, **{k: met[k] for k in parts}, **now, "grad_norm": met["grad_norm"]}
                row |= {"clips_per_s": run.batch / took, "wait": waited / took, "memory": most_memory(meter.device)}
                row |= {"mfu": meter.used(shape, took)} if known else {}
                row |= {"keys": batch_hash(*seen.T), "bad": int(met["bad"]), "skipped": guard.skipped}
                row |= figures
                if measuring and (line := health.collapse(row)):
                    log.say(line)
                log.write(row)
                for line in resume.writer.news():
                    log.say(f"step {done}: {line}; the run goes on")
            due = not guard.row and (done % run.save_every == 0 or met["stop"] or met["collapsed"])
            if saves and (due or done == run.steps):
                resume.save(done, run, log.lines if log else None)
            if met["stop"] or met["collapsed"]:
                break
        bad_lines.close()
    accelerator.wait_for_everyone()  # a launcher may end all processes when the first one ends
    accelerator.end_training()
    for line in resume.writer.news():
        say(f"step {done}: {line}")
    if resume.writer.failed:
        raise UserError(f"{out}: what was learned up to step {done} could not be written: {resume.writer.failed}")
    if done < run.steps and met["collapsed"]:
        raise UserError(f"{out}: stopped at step {done}, since the features have collapsed (run.stop_on_collapse)")
    if done < run.steps:
        if main_process:
            say(f"{out}: asked to end after step {done}; the same command goes on (exit status {REQUEUE})")
        sys.exit(REQUEUE)


if __name__ == "__main__":
    run_cli(main, __doc__)

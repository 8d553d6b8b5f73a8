"""Pre-training, top to bottom: config -> loader -> Objective -> step loop -> checkpoint.

accelerate launch vidssl/train.py FILES.yaml ... key=value ...
"""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

import vidssl
from vidssl import config
from vidssl.checkpoint import load_checkpoint, save_checkpoint
from vidssl.config import Count, Part, Size
from vidssl.data.augment import AUGMENTS
from vidssl.data.loader import Batch, Data, TrainClips, train_batches
from vidssl.data.order import Order, check_split
from vidssl.data.shards import Shards
from vidssl.draws import Draws
from vidssl.errors import UserError, run_cli
from vidssl.exchange import save_run, start_from
from vidssl.files import check_out, make_folder
from vidssl.health import spread
from vidssl.log import Log, batch_hash, hash_keys, note_bad
from vidssl.model.vit import MODELS, Blocks
from vidssl.objective.masks import MASKS
from vidssl.objective.objective import ERRORS, ContextLoss, Objective
from vidssl.objective.predictors import PREDICTORS, QUERIES
from vidssl.objective.targets import TARGETS, Ema, normalise
from vidssl.optim import Optim, clip_gradients, make_optimizer, schedule, set_schedule


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
    snapshots: bool = False  # keep the encoder of every checkpoint, to probe how it went
    health_every: Count = 100  # steps between measurements of the features


@dataclass(frozen=True)
class Efficiency:
    """The `efficiency` section: what changes only the speed (up to rounding)."""

    workers: Size = 2  # loader processes for each training process
    micro_batches: Count = 1  # parts in which a process runs its share of the batch (gradient accumulation)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass
    recompute: bool = False  # activations of the transformer blocks in the backward pass, instead of keeping them
    cache_mb: Size = 0  # decoded frames each loader process may hold, in 2**20 bytes; for corpora that fit
    threads: Count | None = None  # of torch on the CPU, a process; None: torch's own choice


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
    "efficiency": Part(Efficiency),
}
# What may change when a run is continued. Of data.train the hash is compared instead, so that a data set may move.
FREE = ("efficiency", "run.out", "run.save_every", "run.keep", "run.snapshots", "run.health_every", "data.train")


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
    one = torch.zeros(1, 3, cfg["data"]["frames"], size, size)
    mask(one, encoder.grid, Draws(0, 0, torch.zeros(1, dtype=torch.int64)))  # a mask that cannot be is found here
    return Objective(encoder, mask, target, query, predictor, error, context)


def check_same_run(cfg: dict[str, Any], data: str, state: dict[str, Any], out: Path) -> None:
    """A folder holds one run: what changes its result must not change when it is continued from `state`."""
    if state["provenance"]["data"] != data:
        raise UserError(f"{out}: data.train is not what this run was started on (its index has another hash)")
    before = state["provenance"]["config"]
    differing = [
        f"{key} is {old!r} there, {new!r} here"
        for key, old, new in config.differences(before, cfg)
        if not any(key == free or key.startswith(free + ".") for free in FREE)
    ]
    if differing:
        raise UserError(
            f"{out} holds another run: {'; '.join(differing[:3])}. Give another run.out, or the same values"
        )


def forward_backward(
    accelerator: Accelerator, model: torch.nn.Module, batch: Batch, seed: int, step: int, parts: int
) -> dict[str, torch.Tensor]:
    """Gradients of this process's share of the batch, in `parts` equal parts -> the loss and its parts, averaged."""
    video, position = batch.video.to(accelerator.device), batch.position.to(accelerator.device)
    total: dict[str, torch.Tensor] = {}
    for i, (v, p) in enumerate(zip(video.chunk(parts), position.chunk(parts), strict=True)):
        with contextlib.nullcontext() if i == parts - 1 else accelerator.no_sync(model):
            with accelerator.autocast():
                got = model(normalise(v), Draws(seed, step, p))
            accelerator.backward(got["loss"] / parts)
        for name, value in got.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value.detach() / parts
    return total


@torch.no_grad()
def health(objective: Objective, video: torch.Tensor) -> dict[str, float]:
    """The spread of the features that will be evaluated, on the clips u8 [B, 3, T, H, W] of one process."""
    encoder = objective.evaluated
    features = encoder(normalise(video.to(next(encoder.parameters()).device)))
    return {f"health_{k}": v for k, v in spread(features, objective.encoder.grid.t).items()}


def main(argv: list[str]) -> None:
    cfg = config.load(argv, SCHEMA)
    run, eff = config.build(cfg["run"], Run), config.build(cfg["efficiency"], Efficiency)
    data, optim = config.build(cfg["data"], Data), config.build(cfg["optim"], Optim)
    if eff.threads:
        torch.set_num_threads(eff.threads)

    # Everything that can be wrong with the user's input is found before anything is written.
    shards = Shards(data.train)
    out = Path(run.out)
    check_out(out)
    start, state = 0, load_checkpoint(out / "checkpoints")
    if state:
        check_same_run(cfg, shards.hash, state, out)
    unused = cfg["model"]["image_tokenizer"]  # gets no gradient from videos
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=unused)
    mixed = "no" if eff.precision == "fp32" else eff.precision
    accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    rank, world, main_process = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    check_split(run.batch, run.lanes, world)
    if (share := run.batch // world) % eff.micro_batches:
        raise UserError(f"efficiency.micro_batches {eff.micro_batches} does not divide {share} clips a process")

    objective = make_objective(cfg)
    if run.init and not state:
        start_from(objective, cfg)
    optimizer = make_optimizer(objective, optim)
    provenance = {"config": cfg, "data": shards.hash, "vidssl": vidssl.__version__, "torch": str(torch.__version__)}
    if state:
        objective.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if start == run.steps:
        if main_process and not (out / "encoder.safetensors").exists():
            save_run(out, objective, {**provenance, "step": start}, snapshot=False)
        accelerator.print(f"{out}: all {run.steps} steps are done")
        return
    for module in objective.modules():
        if isinstance(module, Blocks):
            module.recompute = eff.recompute
    model, optimizer = accelerator.prepare(objective, optimizer)
    if state and accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    log = None
    if main_process:
        make_folder(out)
        log = Log(out, start, run.steps)
        config.save(cfg, out / "config.yaml")
    accelerator.wait_for_everyone()

    order = Order(shards.counts, run.seed, run.lanes, run.window)
    clips = TrainClips(shards, order, data, config.build(cfg["augment"], AUGMENTS), eff.cache_mb << 20)
    batches = train_batches(clips, start, run.steps, run.batch, rank, world, eff.workers)
    with log or contextlib.nullcontext():
        clock = time.perf_counter()
        for step, batch in enumerate(batches, start):
            waited = time.perf_counter() - clock
            torch.manual_seed(run.seed + step * world + rank)  # whatever else draws is a function of the step, too
            now = schedule(optim, step, run.steps)
            set_schedule(optimizer, now)
            optimizer.zero_grad()
            parts = forward_backward(accelerator, model, batch, run.seed, step, eff.micro_batches)
            norm = clip_gradients(accelerator, model, optim, step)
            means = accelerator.reduce(torch.stack([*parts.values()]), "mean").tolist()
            if not math.isfinite(means[0]) or (not accelerator.scaler and not math.isfinite(norm)):
                raise UserError(
                    f"step {step + 1}: loss {means[0]}, gradient norm {float(norm)}; what was learned up to the last "
                    f"checkpoint is in {out}; a smaller optim.lr, a longer warm-up or optim.clip_grad may help"
                )
            optimizer.step()
            if isinstance(objective.target, Ema):
                objective.target.update(objective.encoder, now["momentum"])

            done = step + 1
            seen = accelerator.gather(torch.stack([batch.position, hash_keys(batch.key)], 1).to(accelerator.device))
            bad = int(accelerator.reduce(torch.tensor(len(batch.bad), device=accelerator.device)))
            took = time.perf_counter() - clock
            clock = time.perf_counter()
            note_bad(out / "bad_samples.jsonl", done, batch.bad)
            if log:
                row: dict[str, Any] = {"step": done, **dict(zip(parts, means, strict=True)), **now}
                row |= {"grad_norm": float(norm), "clips_per_s": run.batch / took, "wait": waited / took}
                row |= {"keys": batch_hash(*seen.T), "bad": bad}
                if done % run.health_every == 0 or done == run.steps:
                    row |= health(objective, batch.video)
                log.write(row)
                if done % run.save_every == 0 or done == run.steps:
                    # First the encoder: a finished run has one.
                    save_run(out, objective, {**provenance, "step": done}, run.snapshots)
                    state = {"model": objective.state_dict(), "optimizer": optimizer.state_dict()}
                    state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
                    save_checkpoint(out / "checkpoints", done, {**state, "provenance": provenance}, run.keep)
    accelerator.end_training()


if __name__ == "__main__":
    run_cli(main, __doc__)

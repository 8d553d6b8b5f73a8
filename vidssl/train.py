"""Pre-training, top to bottom: config -> loader -> Objective -> step loop -> checkpoint.

accelerate launch vidssl/train.py FILES.yaml ... key=value ...
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vidssl import config
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder, os_errors_as_user_errors, print_stderr
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.data.loader import Batch, make_streams, open_shards, train_steps
from vidssl.data.order import check_split
from vidssl.model.vit import TransformerStack
from vidssl.training.checkpoint import provenance, quarantine
from vidssl.training.distributed import Strategy
from vidssl.training.feature_stats import FeatureStats
from vidssl.training.loss_guard import LossGuard
from vidssl.training.malloc import tune_malloc
from vidssl.training.metrics_log import (
    JsonlWriter,
    MetricsLog,
    batch_hash,
    check_trackers,
    hash_keys,
    start_trackers,
)
from vidssl.training.online_probe import OnlineProbe
from vidssl.training.optim import build_optimizer, schedule, set_schedule
from vidssl.training.perf import StepMeter, peak_memory
from vidssl.training.preemption import EXIT_REQUEUE, PreemptionHandler, exit_on_lost_peer
from vidssl.training.schema import TrainConfig
from vidssl.training.state import TrainState

# What may change when a run is continued. Of what is read the hash is compared, so that a data set may move.
RESUME_MUTABLE: tuple[str, ...] = (
    "efficiency",
    "online_probe",
    "run.out",
    "run.save_every",
    "run.keep_last",
    "run.keep_every",
)
RESUME_MUTABLE += (
    "run.snapshots",
    "run.max_consecutive_skips",
    "run.max_rollbacks",
    "run.loss_spike_std",
    "run.feature_stats_every",
    "run.stop_on_collapse",
)
RESUME_MUTABLE += (
    "run.trackers",
    "data.train",
    "data.cache_dir",
    "data.cache_gb",
    "data.decode_timeout_s",
    "data.memory_mb",
)


def forward_backward(
    strategy: Strategy, model: torch.nn.Module, batches: list[Batch], seed: int, step: int, parts: int
) -> dict[str, torch.Tensor]:
    """Gradients of this process's share of the step's clips -> the loss and its parts, averaged over the clips.

    batches: of each stream; each is run in `parts` equal parts, one after another. With several streams the loss of
    each is told too.
    """
    pieces = []
    for number, batch in enumerate(batches):
        video, position = batch.video.to(strategy.device), batch.position.to(strategy.device)
        pieces += [(number, *piece) for piece in zip(video.chunk(parts), position.chunk(parts), strict=True)]
    clips = sum(len(position) for _, _, position in pieces)
    total: dict[str, torch.Tensor] = {}
    weights: dict[str, float] = {}
    for i, (number, video, position) in enumerate(pieces):
        share = len(position) / clips
        with contextlib.nullcontext() if i == len(pieces) - 1 else strategy.no_sync(model):
            with strategy.autocast():
                got = model(normalise(video), KeyedRNG(seed, step, position))
            strategy.backward(got["loss"] * share)
        if len(batches) > 1:
            got[f"loss_stream_{number}"] = got["loss"]
        for name, value in got.items():
            total[name] = total.get(name, torch.zeros_like(value)) + value.detach() * share
            weights[name] = weights.get(name, 0.0) + share
    if len(batches) > 1:  # what some streams do not tell (as their own losses) is a mean over those that do
        total = {name: value / weights[name] for name, value in total.items()}
    return total


@exit_on_lost_peer()
def main(argv: list[str]) -> None:
    cfg = config.load_config(argv, TrainConfig)
    tree = config.to_tree(cfg)
    run, eff, data, online_probe = cfg.run, cfg.efficiency, cfg.data, cfg.online_probe
    optim = cfg.optim.scaled(run.batch)
    if eff.threads:
        torch.set_num_threads(eff.threads)
    if eff.tune_malloc:
        tune_malloc()

    # Everything that can be wrong with the user's input is found before anything is written.
    shards, data_hash = open_shards(data)
    out = Path(run.out)
    check_writable(out)
    check_trackers(run.trackers)
    strategy = Strategy.from_env(
        eff,
        unused_parameters=cfg.model.arguments["image_tokenizer"],  # gets no gradient from videos
        log_with=list(run.trackers) or None,
        project_dir=out,
    )
    rank, world, main_process = strategy.rank, strategy.world, strategy.is_main
    sizes = data.clips(run.batch)
    for i, n in enumerate(sizes):
        what = (
            f"data.extra_streams[{i - 1}].clips"
            if i
            else "run.batch" + (" less data.extra_streams's clips:" if data.extra_streams else "")
        )
        check_split(n, run.lanes, world, what, data.repeat)
        if (share := n // world) % eff.micro_batches:
            raise UserError(
                f"efficiency.micro_batches {eff.micro_batches} does not divide {share} clips a process"
            )

    objective = cfg.build_objective()
    optimizer = build_optimizer(objective, optim, eff.fused)
    for module in objective.modules():
        if isinstance(module, TransformerStack):
            module.activation_checkpointing = eff.activation_checkpointing
            for block in module if eff.compile else ():
                block.compile(
                    dynamic=True
                )  # one for all numbers of tokens; names of weights stay as they are
    model, optimizer = strategy.prepare(objective, optimizer)
    watched = None
    if online_probe.train is not None:
        watched = OnlineProbe(
            online_probe,
            data,
            cfg.augment.arguments["size"],
            workers=eff.workers,
            isolate=eff.decode_in_subprocess,
            decodes=strategy.runs_diagnostics,
            barrier=strategy.barrier,
        )
    about = provenance(tree, data_hash)
    guard = LossGuard(
        run.max_consecutive_skips,
        run.max_rollbacks,
        run.loss_spike_std,
        scaled=strategy.scaler is not None,
    )
    feature_stats = FeatureStats()
    mutable = RESUME_MUTABLE
    if cfg.is_open_ended:
        mutable = (*RESUME_MUTABLE, "run.steps")
    resume = TrainState(
        strategy,
        objective,
        optimizer,
        guard,
        out,
        about,
        TrainConfig,
        run.steps,
        mutable,
        run.keep_last,
        run.keep_every,
        snapshots=run.snapshots,
        feature_stats=feature_stats,
    )
    start = resume.restore()
    if run.init and not start:
        resume.init_from(run.init, cfg)
    if start == run.steps:
        resume.export_missing(start)
        strategy.accelerator.print(f"{out}: all {run.steps} steps are done")
        return
    log = meter = None
    if main_process:
        make_folder(out)
        with os_errors_as_user_errors(out):
            log = MetricsLog(
                out, start, run.steps, start_trackers(strategy.accelerator, tree) if run.trackers else None
            )
            quarantine(out / "checkpoints", start)
            config.save(tree, out / "config.yaml")
        meter = StepMeter(strategy.device, eff.precision)
    strategy.barrier()

    augment = cfg.augment.build()
    streams = make_streams(data, shards, augment, run.seed, run.lanes, run.shuffle_window, eff.cache_mb << 20)
    loader = train_steps(streams, start, run.steps, sizes, rank, world, eff.workers, eff.decode_in_subprocess)
    bad_lines = JsonlWriter(out / "bad_samples.jsonl")
    with (
        log or contextlib.nullcontext(),
        PreemptionHandler() as preemption,
        resume.writer,
        contextlib.closing(loader),  # type: ignore[type-var]
    ):
        clock = time.perf_counter()
        for step, batches in enumerate(loader, start):
            waited = time.perf_counter() - clock
            # Anything else that draws random numbers depends on the step, too.
            torch.manual_seed(run.seed + step * world + rank)
            now = schedule(optim, step, run.steps, cfg.momentum)
            set_schedule(optimizer, now)
            optimizer.zero_grad()
            shape = tuple(b.video.shape for b in batches)
            with meter.counting(shape) if meter else contextlib.nullcontext(True) as known:
                parts = forward_backward(strategy, model, batches, run.seed, step, eff.micro_batches)
            norm = strategy.clip(model, optim, step)
            done, replaced = step + 1, [(key, reason) for b in batches for key, reason in b.failures]
            collapsed = main_process and run.stop_on_collapse and feature_stats.collapsed
            flags: dict[str, float] = {
                "bad": len(replaced),
                "stop": preemption.requested,
                "collapsed": collapsed,
            }
            met = strategy.reduce({**parts, "grad_norm": norm}, flags)

            if (why := guard.reason_to_skip(met)) is None:
                strategy.step(optimizer)
                objective.target.update(objective.encoder, now["ema"])
            else:
                strategy.skip_step(optimizer)
            if log and why:
                log.info(f"step {done}: not taken: {why}")
            if guard.should_rollback:
                back = resume.rollback(f"step {done}: {why}")
                if log:
                    log.info(f"step {done}: back to what was learned up to step {back}; the data go on")

            shown = torch.cat([torch.stack([b.position, hash_keys(b.key)], 1) for b in batches])
            seen = strategy.accelerator.gather(shown.to(strategy.device))
            took = time.perf_counter() - clock
            clock = time.perf_counter()
            bad_lines.add(*({"step": done, "key": key, "reason": reason} for key, reason in replaced))
            measuring, figures = done % run.feature_stats_every == 0 or done in (1, run.steps), {}
            if strategy.runs_diagnostics:
                feature_stats.add_clips(batches[0].video)
                with torch.compiler.set_stance("force_eager") if eff.compile else contextlib.nullcontext():
                    figures = feature_stats.measure(objective) if measuring else {}
                    if watched and (done % online_probe.every == 0 or done == run.steps):
                        figures |= watched.measure(objective)
            if log and meter:
                row: dict[str, Any] = {
                    "step": done,
                    **{k: met[k] for k in parts},
                    **now,
                    "grad_norm": met["grad_norm"],
                }
                row |= {
                    "clips_per_s": run.batch / took,
                    "wait": waited / took,
                    "memory": peak_memory(meter.device),
                }
                row |= {"mfu": meter.used(shape, took)} if known else {}
                row |= {"keys": batch_hash(*seen.T), "bad": int(met["bad"]), "skipped": guard.skipped}
                row |= figures
                if measuring and (line := feature_stats.collapse_warning(row)):
                    log.info(line)
                log.write(row)
                for line in resume.writer.pop_errors():
                    log.info(f"step {done}: {line}; the run goes on")
            due = not guard.consecutive_skips and (
                done % run.save_every == 0 or met["stop"] or met["collapsed"]
            )
            if strategy.participates_in_save and (due or done == run.steps):
                resume.save(done, log.lines.sync if log else lambda: None)
            if met["stop"] or met["collapsed"]:
                break
        bad_lines.close()
    strategy.close()
    for line in resume.writer.pop_errors():
        print_stderr(f"step {done}: {line}")
    if resume.writer.failed:
        raise UserError(
            f"{out}: what was learned up to step {done} could not be written: {resume.writer.failed}"
        )
    if done < run.steps and met["collapsed"]:
        raise UserError(
            f"{out}: stopped at step {done}, since the features have collapsed (run.stop_on_collapse)"
        )
    if done < run.steps:
        if main_process:
            print_stderr(
                f"{out}: asked to end after step {done}; the same command goes on (exit status {EXIT_REQUEUE})"
            )
        sys.exit(EXIT_REQUEUE)


if __name__ == "__main__":
    run_cli(main, __doc__)

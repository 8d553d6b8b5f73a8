r"""Pre-training, top to bottom: configuration, loader, objective, training loop, checkpoints.

    vidssl train configs/method/vjepa.yaml configs/data/vjepa_16x4.yaml model.kind=vit_base \
        data.train=SHARDS run.out=RUN run.steps=10000 run.batch=192

The same command continues the run, after SIGTERM (exit status 75), Ctrl-C (130) or a kill.
"""

from vidssl.config.command_line import check_command_line, without_dry_run
from vidssl.training.schema import TrainConfig

if __name__ == "__main__":
    # Importing torch takes seconds: --help and mistakes in the configuration are answered before.
    check_command_line(TrainConfig, __doc__, ("recipe", "method", "model", "data", "run"))

import contextlib
from pathlib import Path

from vidssl.config import load_config
from vidssl.core.errors import run_cli
from vidssl.core.log import set_log_level
from vidssl.data.loader import open_shards
from vidssl.objective.objective import Objective
from vidssl.training.blocks import configure_blocks
from vidssl.training.config_checks import check_batch, check_output
from vidssl.training.device_batches import DeviceBatches
from vidssl.training.diagnostics import Diagnostics, PictureLog, ending
from vidssl.training.distributed import Strategy
from vidssl.training.malloc import configure_process
from vidssl.training.metrics_log import count_samples
from vidssl.training.micro_batches import make_part_maker
from vidssl.training.optim import build_optimizer, schedule, schedule_progress, set_schedule
from vidssl.training.perf import Throughput
from vidssl.training.preemption import (
    PreemptionHandler,
    exit_on_lost_peer,
    exit_on_sigterm,
    limited_requeues,
)
from vidssl.training.run_folder import RunEnding, RunFolder, claim_run
from vidssl.training.run_summary import (
    RunEnd,
    plan_pretraining,
    probe_command,
    start_pretraining,
    wait_advice,
)
from vidssl.training.state import TrainState
from vidssl.training.step import forward_backward, load_steps
from vidssl.training.step_log import StepLog


def main(argv: list[str]) -> None:
    argv, dry_run = without_dry_run(argv)
    cfg = load_config(argv, TrainConfig).resolved()
    out = Path(cfg.run.out)
    end = RunEnd(out)
    with limited_requeues(out), exit_on_lost_peer(), exit_on_sigterm():
        pretrain(cfg, dry_run)
    if not dry_run:
        end.log_training(f"encoder: {out / 'encoder.safetensors'}", probe_command(out, cfg.data.train))


def pretrain(cfg: TrainConfig, dry_run: bool = False) -> None:
    # Mistakes in the configuration are reported before anything is written.
    run, efficiency = cfg.run, cfg.efficiency
    out = Path(run.out)
    configure_process(efficiency.threads, efficiency.tune_malloc)
    shards, data_hash = open_shards(cfg.data)
    check_output(run)
    strategy = join_processes(cfg)

    # Model, optimizer and their state.
    objective = cfg.build_objective()
    make_parts = make_part_maker(cfg, objective, strategy)
    configure_blocks(objective, efficiency.activation_checkpointing, efficiency.compile)
    optim_config = cfg.optim.scaled(run.batch)
    model, optimizer = strategy.prepare(objective, build_optimizer(objective, optim_config, efficiency.fused))
    diagnostics = Diagnostics(cfg, objective, strategy, picture_log(cfg, objective, strategy))
    state = TrainState(cfg, strategy, objective, optimizer, diagnostics, data_hash)
    state.check_space()
    if dry_run:
        plan_pretraining(cfg, state, shards)
        return
    with claim_run(out, "train", strategy):
        start = state.restore_or_init()
        if start == run.steps or diagnostics.rule.is_over:
            state.export_missing(start)
            return
        start_pretraining(cfg, strategy, objective, shards, start)
        loader = load_steps(cfg, shards, start, strategy)
        advice = wait_advice(cfg, strategy.device.type == "cuda")
        throughput = Throughput(strategy, strategy.precision, run.batch, objective, advice)
        diagnostics.measure_before(start)
        done = start
        end: RunEnding | None = None
        with (
            RunFolder(
                out, state.provenance["config"], start, run.steps, strategy, bool(run.trackers)
            ) as folder,
            PreemptionHandler() as preemption,
            state.writer,
            contextlib.closing(loader),
            state.save_last_step(folder.sync_log),
        ):
            in_time = preemption.until_requested(loader, alone=strategy.world == 1)
            log = StepLog(run.log_every, strategy, state, throughput, folder)
            inputs = DeviceBatches(in_time, start, strategy.device, make_parts)
            for step, (batches, parts) in enumerate(throughput.timed(inputs), start):
                done = step + 1
                hparams = schedule(optim_config, step, run.steps, objective.momentum)
                set_schedule(optimizer, hparams)
                optimizer.zero_grad()
                with throughput.counting():
                    losses = forward_backward(strategy, model, parts)
                norm = strategy.clip(model, optim_config, step)
                throughput.overlap(inputs.prefetch)  # the host waits for the device below
                signals = {"stop": preemption.requested, **diagnostics.signals}
                accepted = log.add(done, losses, norm, count_samples(batches) | signals, hparams)
                state.whole_step = None
                taken = strategy.step_if(optimizer, accepted)
                objective.update(schedule_progress(optim_config, step, run.steps), taken)

                ends_row = log.ends_row(done) or diagnostics.needs_row(done) or state.may_be_due(done)
                row = log.row() if ends_row else {}
                if row and state.guard.should_rollback:
                    with folder.log_on_error(done, row, batches):
                        state.rollback(done, row["skip_reason"])
                folder.log(done, row | diagnostics.measure_if_due(done, batches), batches)
                state.log_write_errors(done)
                state.whole_step = done
                end = ending(log.metrics)
                if strategy.participates_in_save and (end or state.is_due(done)):
                    throughput.beside("save", state.save, done, folder.sync_log)
                if end:
                    break
    strategy.close()
    folder.finish(done, end, state.writer, preemption.signal)


def picture_log(cfg: TrainConfig, objective: Objective, strategy: Strategy) -> PictureLog | None:
    """Returns what sends pictures to the trackers of the run, in the first process; None without trackers,
    and where a forward pass takes weights or clips of all processes."""
    needs_all = not strategy.saves_alone or (objective.couples_clips and strategy.world > 1)
    if not cfg.run.trackers or not strategy.is_main or needs_all:
        return None
    # Imported late, since it draws
    from vidssl.pictures.tracked import TrackedPictures

    return TrackedPictures(strategy.accelerator, cfg.run.seed, cfg.encoder_arguments()["frames"])


def join_processes(cfg: TrainConfig) -> Strategy:
    """Returns the strategy of this run's processes, after the checks that need their number."""
    strategy = Strategy.from_env(
        cfg.efficiency,
        # the image tokenizer gets no gradient from video batches
        unused_parameters=cfg.model.arguments["image_tokenizer"],
        log_with=list(cfg.run.trackers) or None,
        project_dir=cfg.run.out,
    )
    set_log_level(strategy.is_main)
    check_batch(cfg, strategy.world)
    return strategy


if __name__ == "__main__":
    run_cli(main)

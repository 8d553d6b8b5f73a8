"""The loop of fine-tuning: steps, evaluation of held-out train after each epoch, selection of the epoch."""

import contextlib
import time
from collections import Counter
from collections.abc import Generator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.core.log import logger
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.data.cache_fill import cache_videos
from vidssl.data.dataset import MultiStreamDataset
from vidssl.data.loader import Batch, train_steps
from vidssl.data.planes import place_augmentation
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.evaluate import LabelledFeatures, check_readable
from vidssl.evaluation.feature_cache import FeatureShape
from vidssl.evaluation.features import FeatureLoader, FeatureStorage, ShardedFeatures, compute_features
from vidssl.evaluation.views import View
from vidssl.pretrained.load import LoadedEncoder
from vidssl.training.blocks import configure_blocks
from vidssl.training.distributed import Strategy
from vidssl.training.finetune_report import mean_over_clips
from vidssl.training.finetune_schema import FinetuneConfig
from vidssl.training.finetuning import (
    Classifier,
    FinetuneSplits,
    LabelledClips,
    Mixer,
    SubsetOrder,
    make_classifier,
)
from vidssl.training.metrics_log import count_samples, step_row
from vidssl.training.online_probe import warn_of_missing_clips
from vidssl.training.optim import build_optimizer, schedule, set_schedule
from vidssl.training.perf import Throughput
from vidssl.training.preemption import PreemptionHandler
from vidssl.training.run_folder import RunFolder
from vidssl.training.schema import OptimConfig
from vidssl.training.state import RunState


class EpochSelection(nn.Module):
    """The classifier in training, a copy of it after the best epoch, and a record of each epoch.

    One module, so that checkpoints hold both. The best epoch has the highest accuracy on held-out train, the
    last one of equal ones; without held-out samples it is the last epoch, and no copy is kept.
    """

    def __init__(self, classifier: Classifier, best: Classifier | None):
        """best: another classifier of the same shape, to copy weights into; None without held-out samples."""
        super().__init__()
        self.now = classifier
        self.best = best
        self.epochs: list[dict[str, Any]] = []
        self.losses: list[float] = []  # of the accepted steps of the current epoch

    def end_epoch(self, epoch: int, step: int, accuracy: float | None, unreadable: int = 0) -> dict[str, Any]:
        """Records epoch 1.. that ended after `step` steps, and returns the record. accuracy: on held-out
        train, without so many samples that cannot be decoded."""
        mean_loss = float(np.mean(self.losses)) if self.losses else None
        record: dict[str, Any] = {"epoch": epoch, "step": step, "loss": mean_loss}
        if accuracy is not None and self.best is not None:
            if all(accuracy >= earlier["held_out_accuracy"] for earlier in self.epochs):
                self.best.load_state_dict(self.now.state_dict())
            record["held_out_accuracy"] = accuracy
            record |= {"held_out_unreadable": unreadable} if unreadable else {}
        self.epochs.append(record)
        self.losses = []
        return record

    def roll_back(self, step: int) -> None:
        """Drops the records after `step`, to which the weights have been rolled back."""
        self.epochs = [record for record in self.epochs if record["step"] <= step]
        self.losses = []

    def select(self, n_held_out: int) -> dict[str, Any]:
        """Loads the weights of the best epoch into the classifier. Returns the report of the choice.
        n_held_out: held-out samples, whether they can be decoded or not."""
        if self.best is None:
            return {**self.epochs[-1], "epochs": len(self.epochs), "n_held_out": 0}
        self.now.load_state_dict(self.best.state_dict())
        best = max(reversed(self.epochs), key=lambda record: record["held_out_accuracy"])
        n_held_out -= best.get("held_out_unreadable", 0)
        return {**best, "epochs": len(self.epochs), "n_held_out": n_held_out, "tried": self.epochs}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint besides weights, as plain data."""
        return {"epochs": self.epochs, "losses": self.losses}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.epochs = list(state["epochs"])
        self.losses = list(state["losses"])


@dataclass
class Finetuner:
    """The parts of a fine-tuning run.

    model: the classifier as prepared by the strategy; optim_config: with the scaled rates and the warm-up in
    steps; view: of a test video; pixels: mean and standard deviation that the encoder's input is normalised
    with.
    """

    config: FinetuneConfig
    strategy: Strategy
    model: nn.Module
    selection: EpochSelection
    optimizer: Any
    optim_config: OptimConfig
    splits: FinetuneSplits
    view: View
    pixels: tuple[list[float], list[float]]

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.splits, self.config.tune.batch)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.tune.epochs

    def train(self, state: RunState) -> None:
        """Trains from the newest checkpoint to the end of the last epoch. Raises Preempted after SIGTERM,
        once the step is saved."""
        tune = self.config.tune
        state.check_space()
        start = state.restore()
        loader = self.train_loader(start)
        mixer = Mixer(tune, len(self.splits.task.names))
        clips = tune.batch * tune.repeat
        throughput = Throughput(self.strategy, self.strategy.precision, clips, self.selection.now)
        tree = state.provenance["config"]
        done = start
        self.model.train()
        with (
            RunFolder(state.out, tree, start, self.steps, self.strategy, bool(tune.trackers)) as folder,
            PreemptionHandler() as preemption,
            state.writer,
            contextlib.closing(loader),
            state.save_last_step(folder.sync_log),
        ):
            alone = self.strategy.world == 1
            waited_for = throughput.timed(preemption.until_requested(loader, alone))
            for done, batches in enumerate(waited_for, start + 1):
                row, must_stop = self.step(state, folder, batches, mixer, done, throughput, preemption)
                ends_epoch = done % self.steps_per_epoch == 0
                if ends_epoch:
                    # Its loader forks
                    state.writer.wait()
                    row |= self.end_epoch(done)
                folder.log(done, row, batches)
                for line in state.writer.pop_errors():
                    logger.warning(f"step {done}: {line}; the run goes on")
                state.whole_step = done
                is_due = ends_epoch and not state.guard.consecutive_skips
                is_due |= must_stop or done == self.steps
                if self.strategy.participates_in_save and is_due:
                    throughput.beside("save", state.save, done, folder.sync_log)
                if must_stop:
                    break
        self.strategy.barrier()
        folder.finish(done, None, state.writer, preemption.signal, work_follows=True)

    def train_loader(self, start: int) -> Generator[list[Batch], None, None]:
        """Yields a list of one Batch for each step from `start` to the last one."""
        cfg, view = self.config, self.view
        clip = DataConfig(
            train=cfg.data.train,
            frames=view.frames,
            stride=view.stride,
            fps=view.fps,
            repeat=cfg.tune.repeat,
            max_decode_error_rate=cfg.data.max_decode_error_rate,
            cache=cfg.data.cache,
        )
        order = SubsetOrder(self.splits.train_places, cfg.tune.seed, cfg.tune.lanes)
        augment = cfg.augment.build(size=view.size)
        clip = place_augmentation(clip, augment, self.strategy.device.type == "cuda")
        shards = self.splits.shards["train"]
        clips = LabelledClips(self.splits.task.label, shards, order, clip, augment)
        workers, isolate = cfg.efficiency.num_workers, cfg.efficiency.decode_in_subprocess
        cache_videos([clips], workers, isolate, quiet=not self.strategy.is_main)
        return train_steps(
            MultiStreamDataset([clips]),
            start,
            self.steps,
            [cfg.tune.batch * cfg.tune.repeat],
            self.strategy.rank,
            self.strategy.world,
            workers,
            isolate,
            self.strategy.data_patience_s,
            pin_memory=self.strategy.device.type == "cuda",
        )

    def step(
        self,
        state: RunState,
        folder: RunFolder,
        batches: list[Batch],
        mixer: Mixer,
        done: int,
        throughput: Throughput,
        preemption: PreemptionHandler,
    ) -> tuple[dict[str, Any], bool]:
        """Step `done` (from 1): updates the weights or skips the update. Returns the row of the log, and
        whether any process got SIGTERM."""
        (batch,) = batches
        step = done - 1
        hparams = schedule(self.optim_config, step, self.steps, momentum=None)
        set_schedule(self.optimizer, hparams)
        self.optimizer.zero_grad()
        video = normalise(batch.video.to(self.strategy.device, non_blocking=True), self.pixels)
        with throughput.counting():
            loss = self.forward_backward(*mixer(video, batch, step), step)
        grad_norm = self.strategy.clip(self.model, self.optim_config, step)
        sums = count_samples(batches) | {"stop": float(preemption.requested)}
        metrics = self.strategy.all_reduce_metrics({"loss": loss, "grad_norm": grad_norm}, sums)
        state.whole_step = None
        if skip_reason := state.guard.check_step(metrics):
            self.strategy.skip_step(self.optimizer)
            logger.info(f"step {done}: skipped: {skip_reason}")
        else:
            self.strategy.step(self.optimizer)
            self.selection.losses.append(metrics["loss"])
        row = step_row(["loss"], metrics, hparams, throughput.row(), state.guard.skipped, skip_reason)
        if state.guard.should_rollback:
            with folder.log_on_error(done, row, batches):
                saved = state.rollback(done, skip_reason)
            self.selection.roll_back(saved)
        return row, bool(metrics["stop"])

    def forward_backward(self, video: Tensor, target: Tensor, position: Tensor, step: int) -> Tensor:
        """Accumulates the gradients of this process's clips f32 [B, 3, T, H, W] with soft targets f32 [B, C]
        and stream positions i64 [B]. Returns their mean loss."""
        parts = self.config.efficiency.micro_batches
        total = torch.zeros((), device=video.device)
        micro_batches = zip(video.chunk(parts), target.chunk(parts), position.chunk(parts), strict=True)
        for i, (clips, targets, positions) in enumerate(micro_batches, 1):
            rng = KeyedRNG(self.config.tune.seed, step, positions)
            with contextlib.nullcontext() if i == parts else self.strategy.no_sync(self.model):
                with self.strategy.autocast():
                    loss = F.cross_entropy(self.model(clips, rng).float(), targets) / parts
                self.strategy.backward(loss)
            total += loss.detach()
        return total

    def end_epoch(self, step: int) -> dict[str, Any]:
        """Evaluates held-out train on the middle clip of each video, and records the epoch. Returns its part
        of the row of the log."""
        start_s = time.perf_counter()
        samples, labels = self.splits.held_out
        accuracy = None
        missing: Counter[str] = Counter()
        if samples:
            view = self.view._replace(segments=1, crops=1)
            predictions = self.predict(self.splits.shards["train"], samples, labels, view, "held-out train")
            missing = Counter(predictions.unreadable.values())
            if self.strategy.is_main:
                warn_of_missing_clips("held-out train", missing, len(samples))

            def score() -> float:
                decoded = predictions.usable()
                outputs = mean_over_clips(predictions)[decoded]
                return self.splits.task.score(outputs, [labels[n] for n in decoded])

            accuracy = self.strategy.run_on_main(score)
        epoch = step // self.steps_per_epoch
        record = self.selection.end_epoch(epoch, step, accuracy, missing.total())
        logger.info(", ".join(f"{name} {value}" for name, value in record.items()))
        row = {("epoch_loss" if k == "loss" else k): v for k, v in record.items() if k != "step"}
        return row | {"evaluation_s": time.perf_counter() - start_s}

    def predict(
        self, shards: Shards, samples: list[Sample], labels: list[Any], view: View, name: str
    ) -> LabelledFeatures:
        """Class probabilities [n, clips, 1, C] of the samples, computed by all processes. Undecodable samples
        are left out of held-out train; in test they are an error unless tune.allow_unreadable is set."""
        cfg = self.config
        classifier = self.selection.now
        classes = len(self.splits.task.names)

        def encode(video: Tensor) -> Tensor:
            with self.strategy.autocast():
                logits = classifier(normalise(video, self.pixels))
            return logits.float().softmax(-1)[:, None]

        clips_per_step = cfg.tune.batch * cfg.tune.repeat // self.strategy.world
        clips_per_pass = clips_per_step // cfg.efficiency.micro_batches
        storage = FeatureStorage(
            encode_batch=max(1, clips_per_pass // view.clips), workers=cfg.efficiency.num_workers
        )
        accelerator = self.strategy.accelerator
        loader = FeatureLoader(encode, shards, samples, view, accelerator, storage, name, checks_finite=False)
        classifier.eval()
        shape = FeatureShape(len(samples), view.clips, 1, classes)
        found = compute_features(loader, shape, "memory")
        classifier.train()
        if name == "test":
            check_readable(found.unreadable, samples, cfg.tune.allow_unreadable, name, "tune")
        source = found.source.gathered() if isinstance(found.source, ShardedFeatures) else found.source
        return LabelledFeatures(source, samples, labels, found.unreadable)


def build_finetuner(
    cfg: FinetuneConfig, strategy: Strategy, loaded: LoadedEncoder, splits: FinetuneSplits, view: View
) -> Finetuner:
    """Builds classifier and optimizer. view: of a test video."""
    efficiency = cfg.efficiency
    classifier = make_classifier(loaded, cfg.head, len(splits.task.names), cfg.tune)
    best = deepcopy(classifier).requires_grad_(False).to(strategy.device) if splits.held_out[0] else None
    configure_blocks(classifier, efficiency.activation_checkpointing, efficiency.compile)
    warmup = round(cfg.tune.warmup * steps_per_epoch(splits, cfg.tune.batch))
    optim_config = cfg.optim.build(warmup=warmup).scaled(cfg.tune.batch)
    model, optimizer = strategy.prepare(
        classifier, build_optimizer(classifier, optim_config, efficiency.fused)
    )
    selection = EpochSelection(classifier, best)
    pixels = loaded.metadata["pixels"]["mean"], loaded.metadata["pixels"]["std"]
    return Finetuner(cfg, strategy, model, selection, optimizer, optim_config, splits, view, pixels)


def steps_per_epoch(splits: FinetuneSplits, batch: int) -> int:
    return max(1, len(splits.train_places) // batch)

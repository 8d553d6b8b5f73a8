"""Trains a decoder of a run's predictions, resumably, and measures and draws what it renders."""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vidssl.core.errors import Interrupted, Preempted, UserError
from vidssl.core.log import logger
from vidssl.core.progress import Progress
from vidssl.core.rng import KeyedRNG
from vidssl.evaluation.report import weights_hash
from vidssl.model.grid import gather_tokens
from vidssl.objective.averages import average_of, update_averages
from vidssl.pictures.flow_decoder import FlowDecoder, flow_loss
from vidssl.pictures.reconstruction import flat_patches, to_unit_range
from vidssl.pictures.run_clips import RunClips
from vidssl.pictures.runs import MaskPrediction, TrainedRun, draw_mask, predict_mask
from vidssl.pretrained.files import load_weights, save_weights
from vidssl.training.preemption import PreemptionHandler

DECODER_FILE = "decoder.safetensors"
MEASURED_STEPS = 12  # after which the number of steps that fit into the minutes is known
UNMEASURED_STEPS = 3  # the first, which are slower
WARMUP_STEPS = 50
MIN_STEPS = 100
SAVE_EVERY_S = 30.0
LEAST_GIVEN = 0.15  # fraction of training clips whose predictions are withheld
STATISTICS_BATCHES = 4
MAX_MOMENTUM = 0.995  # of the average whose samples are shown
REUSED = 4  # steps for each batch that is decoded and predicted anew; the others draw one that is kept
KEPT_BATCHES = 16  # at most
KEPT_BYTES = 500_000_000  # of their tensors, at most
WIDTHS = (128, 384)  # least and largest width of a decoder, which is as wide as the encoder between them
HEAD_WIDTH = 32
EARLY = -0.4  # mean of the logit of t in training: noisy patches are more often seen than clean ones


@dataclass(frozen=True)
class DecodeSettings:
    """What a decoder is trained with."""

    minutes: float = 5.0
    steps: int | None = None  # None: as many as fit into the minutes
    batch: int = 32  # clips
    lr: float = 1e-3
    width: int | None = None  # None: see WIDTHS
    depth: int = 4
    context: bool = False  # also give the features of the visible tokens
    seed: int = 0

    def fixed(self) -> dict[str, Any]:
        """What may not change when a training goes on."""
        names = ("batch", "lr", "width", "depth", "context", "seed")
        return {name: getattr(self, name) for name in names}


class DecoderBatch(NamedTuple):
    """What a decoder learns from: of B clips the n hidden tokens."""

    clean: Tensor  # f32 [B, n, P], true pixels in 0..1
    values: Tensor  # f32 [B, n, K], predictions
    ids: Tensor  # i64 [B, n]
    weight: Tensor  # f32 [B, n]
    context: tuple[Tensor, Tensor] | None  # see FlowDecoder.forward

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.nbytes for t in (self.clean, self.values, self.ids, self.weight, *(self.context or ())))


class TrainedDecoder(NamedTuple):
    """The average of a trained decoder, and what is told about its training."""

    decoder: FlowDecoder
    facts: dict[str, Any]


def clean_patches(prediction: MaskPrediction) -> Tensor:
    """The true pixels f32 [B, n, P] in 0..1 behind the mask."""
    pixels = to_unit_range(prediction.video)
    return gather_tokens(flat_patches(pixels, prediction.grid), prediction.ids)


def context_of(prediction: MaskPrediction, given: bool) -> tuple[Tensor, Tensor] | None:
    """What FlowDecoder takes as context."""
    return (prediction.features, prediction.seen) if given else None


class DecoderTraining:
    """The training of a decoder and its state on the disk, OUT/decoder.safetensors."""

    def __init__(self, run: TrainedRun, clips: RunClips, settings: DecodeSettings, out: Path):
        self.part = run.prediction
        self.clips = clips
        self.settings = settings
        self.file = out / DECODER_FILE
        self.device = next(self.part.parameters()).device
        self.steps = settings.steps
        self.step = 0
        self.loss = float("nan")
        self.identity = {
            **settings.fixed(),
            "run": weights_hash(run.objective),
            "data": clips.shards.hash,
            "trained_on": len(clips.train),
        }
        torch.manual_seed(settings.seed)
        self.grid = self.part.encoder.grid_of(self.clips.batch(0, 1))
        self._kept: dict[int, DecoderBatch] = {}
        first = self.batch(0)
        context = None if first.context is None else first.context[0].shape[-1]
        width = settings.width or max(WIDTHS[0], min(WIDTHS[1], self.part.encoder.dim // 64 * 64))
        shape = (self.grid, first.clean.shape[-1], first.values.shape[-1], context)
        self.decoder = FlowDecoder(*shape, width, settings.depth, width // HEAD_WIDTH).to(self.device)
        self.average = average_of(self.decoder)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=settings.lr, weight_decay=0.01)
        if self.file.exists():
            self._restore()
        else:
            some = [self.batch(number) for number in range(STATISTICS_BATCHES)]
            values = torch.cat([one.values.flatten(0, 1) for one in some])
            self.decoder.set_statistics(values)
            self.average.set_statistics(values)

    def batch(self, number: int) -> DecoderBatch:
        """Batch `number` of clips with what the frozen run predicts for them."""
        if number not in self._kept:
            clips = self.clips.batch(number, self.settings.batch).to(self.device)
            rng = KeyedRNG(self.settings.seed, number, number * len(clips) + torch.arange(len(clips)))
            mask = draw_mask(self.part, clips, rng, number)
            prediction = predict_mask(self.part, clips, mask, rng, number)
            self._kept[number] = DecoderBatch(
                clean_patches(prediction),
                prediction.values,
                prediction.ids,
                prediction.weight,
                context_of(prediction, self.settings.context),
            )
        return self._kept[number]

    def batch_of_step(self, step: int) -> DecoderBatch:
        """A new batch every REUSED steps, and in between one of the last ones: decoding and predicting take
        longer than a step of the decoder."""
        newest = step // REUSED
        kept = max(1, min(KEPT_BATCHES, KEPT_BYTES // self.batch(newest).size))
        for number in [n for n in self._kept if n <= newest - kept]:
            del self._kept[number]
        if step % REUSED == 0:
            return self.batch(newest)
        rng = np.random.default_rng((self.settings.seed, 13, step))
        return self.batch(int(rng.integers(max(0, newest - kept + 1), newest + 1)))

    def train(self) -> TrainedDecoder:
        """Trains until the number of steps is reached. Raises Preempted or Interrupted, saved, after a
        signal."""
        saved_s = time.monotonic()
        with (
            PreemptionHandler() as preemption,
            Progress("decoder", self.steps or 0, "steps", self.step) as bar,
        ):
            for step_s in self._timed_steps():
                if self.steps is None and step_s is not None:
                    self.steps = max(MIN_STEPS, int(60 * self.settings.minutes / step_s))
                    logger.info(f"decoder: {self.steps} steps of {step_s:.2f} s")
                bar.total = self.steps or 0
                bar.update(1, {"loss": f"{self.loss:.4f}"})
                is_last = self.step == self.steps
                if is_last or preemption.requested or time.monotonic() - saved_s > SAVE_EVERY_S:
                    self._save()
                    saved_s = time.monotonic()
                if preemption.requested and not is_last:
                    reason = f"the decoder is saved after step {self.step}; the same command goes on"
                    raise (Interrupted if preemption.signal == signal.SIGINT else Preempted)(reason)
        facts = {"steps": self.step, "loss": round(self.loss, 5), **self.identity}
        facts["parameters"] = sum(p.numel() for p in self.decoder.parameters())
        return TrainedDecoder(self.average.eval(), facts)

    def _timed_steps(self) -> Iterator[float | None]:
        """Takes the steps that are left. Yields after each the seconds of one, once they are known."""
        start = time.monotonic()
        first = self.step
        while self.steps is None or self.step < self.steps:
            self._take_step()
            done = self.step - first
            if done == UNMEASURED_STEPS:
                start = time.monotonic()
            known = done >= MEASURED_STEPS
            yield (time.monotonic() - start) / (done - UNMEASURED_STEPS) if known else None

    def _take_step(self) -> None:
        batch = self.batch_of_step(self.step)
        generator = torch.Generator().manual_seed(self.settings.seed * (1 << 32) + self.step)
        clean = 2 * batch.clean - 1
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        t = (torch.randn(len(clean), generator=generator) + EARLY).sigmoid().to(self.device)
        given = (torch.rand(len(clean), generator=generator) >= LEAST_GIVEN).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._rate()
        self.optimizer.zero_grad()
        loss = flow_loss(
            self.decoder,
            clean,
            batch.values,
            batch.ids,
            given,
            batch.weight,
            noise,
            t,
            batch.context,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        momentum = min(MAX_MOMENTUM, (1 + self.step) / (10 + self.step))
        update_averages([self.average], [self.decoder], momentum)
        self.loss = float(loss.detach()) if self.step == 0 else 0.98 * self.loss + 0.02 * float(loss.detach())
        self.step += 1

    def _rate(self) -> float:
        """The factor on the learning rate: a warm-up, then a cosine to zero."""
        warmup = min(1.0, (self.step + 1) / WARMUP_STEPS)
        done = self.step / self.steps if self.steps else 0.0
        return warmup * 0.5 * (1 + float(np.cos(np.pi * done)))

    def _save(self) -> None:
        weights = {f"online.{name}": value for name, value in self.decoder.state_dict().items()}
        weights |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            weights |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        header = {"decoder": self.identity, "step": self.step, "steps": self.steps, "loss": self.loss}
        save_weights(self.file, weights, header)

    def _restore(self) -> None:
        weights, header = load_weights(self.file)
        if header.get("decoder") != self.identity:
            stored = header.get("decoder", {})
            names = [name for name, value in self.identity.items() if stored.get(name) != value]
            raise UserError(
                f"{self.file}: is a decoder with other {', '.join(names)}; give another --out, or remove it"
            )
        self.decoder.load_state_dict(_part(weights, "online."))
        self.average.load_state_dict(_part(weights, "average."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(weights, "optimizer.").items():
            number, kind = name.split(".")
            moments.setdefault(int(number), {})[kind] = value
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**state, "state": moments})
        self.step = header["step"]
        self.loss = header["loss"]
        self.steps = self.settings.steps or header["steps"]
        logger.info(f"{self.file}: goes on after {self.step} steps")


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

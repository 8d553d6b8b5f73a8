r"""Fine-tuning: encoder and head trained end to end on labelled shards, one look at test -> probe.json.

    accelerate launch vidssl/finetune.py configs/finetune/videomae_k400.yaml encoder=RUN \
        data.train=SHARDS data.test=SHARDS out=DIR

The epoch is chosen on a part of train that is held out by groups. After a kill the same command goes on from the end of
its last epoch.
"""

import contextlib
import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vidssl import config
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder, os_errors_as_user_errors
from vidssl.core.pixels import normalise
from vidssl.data.dataset import DataConfig, Streams
from vidssl.data.loader import Batch, train_steps
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.evaluate import LabelledFeatures, check_readable, score_predictions
from vidssl.evaluation.feature_cache import FeatureShape
from vidssl.evaluation.features import FeatureLoader, compute_features
from vidssl.evaluation.probe_data import ProbeData, make_view
from vidssl.evaluation.protocol import ProbeProtocol
from vidssl.evaluation.report import PredictionRow, weights_hash, write_report, write_tables
from vidssl.evaluation.views import View
from vidssl.model.heads import HEAD_EPS, AttentiveHead
from vidssl.model.vit import LAYER_NORM_EPS
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.load import LoadedEncoder, load_encoder
from vidssl.training.checkpoint import load_checkpoint, provenance, save_checkpoint
from vidssl.training.distributed import Strategy, gather_to_cpu
from vidssl.training.finetuning import (
    Classifier,
    FinetuneConfig,
    FinetuneEfficiency,
    FinetuneSplits,
    LabelledClips,
    Mixer,
    SubsetOrder,
    TuneConfig,
    check_divisible,
    make_classifier,
    open_splits,
)
from vidssl.training.malloc import tune_malloc
from vidssl.training.optim import OptimConfig, build_optimizer, schedule, set_schedule
from vidssl.training.preemption import exit_on_lost_peer

RESUME_MUTABLE = (
    "out",
    "data.train",
    "data.test",
    "data.max_decode_error_rate",
    "tune.allow_unreadable",
    "efficiency",
)  # of data: the hashes


class FinetuneLoop(NamedTuple):
    """What a run of these parts needs at every turn."""

    strategy: Strategy
    model: nn.Module  # as prepared
    classifier: Classifier
    optimizer: Any
    optim: OptimConfig
    tune: TuneConfig
    speed: FinetuneEfficiency
    colours: tuple[list[float], list[float]]  # mean and deviation of the input

    def step(self, batch: Batch, mixer: Mixer, step: int, steps: int) -> dict[str, float]:
        """One update -> loss and norm of the gradients, over all processes."""
        a, parts = self.strategy, self.speed.micro_batches
        torch.manual_seed(self.tune.seed + step * a.world + a.rank)  # of drop path
        set_schedule(self.optimizer, schedule(self.optim, step, steps))
        self.optimizer.zero_grad()
        video, target = mixer(normalise(batch.video.to(a.device), self.colours), batch, step)
        total = torch.zeros((), device=a.device)
        for i, (some, want) in enumerate(zip(video.chunk(parts), target.chunk(parts), strict=True)):
            with contextlib.nullcontext() if i == parts - 1 else a.no_sync(self.model):
                with a.autocast():
                    loss = F.cross_entropy(self.model(some).float(), want) / parts
                a.backward(loss)
            total += loss.detach()
        norm = a.clip(self.model, self.optim, step)
        met = a.reduce({"loss": total, "grad_norm": norm}, {})
        bad = [name for name in met if not math.isfinite(met[name]) and (name == "loss" or a.scaler is None)]
        if bad:  # fp16's scaler leaves out steps by itself
            raise UserError(
                f"step {step + 1}: the {bad[0]} is {met[bad[0]]}; a smaller optim.lr or optim.clip_grad may help"
            )
        self.optimizer.step()
        return met

    def look(
        self, shards: Shards, samples: list[Sample], truths: list[Any], view: View, name: str
    ) -> LabelledFeatures:
        """Probabilities [n, clips, 1, C], by all processes; all get the whole. What cannot be read of the held-out part
        has no say; of test it is an error, or allowed."""
        classes = self.classifier.head.linear.out_features

        def encode(video: Tensor) -> Tensor:
            with self.strategy.autocast():
                logits = self.classifier(normalise(video, self.colours))
            return logits.float().softmax(-1)[:, None]

        videos = max(1, self.speed.eval_batch // view.clips)
        reading = ProbeProtocol(encode_batch=videos, workers=self.speed.workers)
        self.classifier.eval()
        feed = FeatureLoader(encode, shards, samples, view, self.strategy.accelerator, reading, name)
        found = compute_features(feed, FeatureShape(len(samples), view.clips, 1, classes), "memory", {})
        self.classifier.train()
        if name == "test":
            check_readable(found, samples, self.tune.allow_unreadable, name, "tune")
        return LabelledFeatures(found.source, samples, truths, found.unreadable)


def outputs_of(asked: LabelledFeatures) -> np.ndarray:
    """f64 [n, C]: probabilities averaged over a sample's clips; NaN where it was not read."""
    n, clips = asked.source.shape[:2]
    (tokens,) = asked.source.batches(clips, [list(range(n))])
    outputs = tokens.mean(1).double().cpu().numpy()
    outputs[list(asked.unreadable)] = np.nan
    return outputs


def check_same(state: dict[str, Any], about: dict[str, Any], out: Path) -> None:
    """A folder holds one run."""
    before = state["provenance"]
    changed = config.differences(before["config"], about["config"], RESUME_MUTABLE)
    if changed or before["data"] != about["data"]:
        key, old, new = changed[0] if changed else ("the data or the encoder", "another", "this one")
        raise UserError(f"{out} holds another run: {key} is {old!r} there, {new!r} here; give another out=")


class FinetuneState:
    """Where training stands: a row for each epoch, and the weights of the best one so far."""

    def __init__(
        self,
        run: FinetuneLoop,
        parts: FinetuneSplits,
        out: Path,
        about: dict[str, Any],
        state: dict[str, Any] | None,
    ):
        """state: a checkpoint to go on from."""
        self.run, self.parts, self.out, self.about = run, parts, out, about
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.start = 0  # step
        if state:
            now, self.best = (
                {k.removeprefix(part): v for k, v in state["model"].items() if k.startswith(part)}
                for part in ("now.", "best.")
            )
            run.classifier.load_state_dict(now)
            run.optimizer.load_state_dict(state["optimizer"])
            if run.strategy.scaler is not None and state["scaler"]:
                run.strategy.scaler.load_state_dict(state["scaler"])
            self.rows, self.start = state["epochs"], state["step"]

    def end_epoch(self, step: int, losses: list[float], view: View) -> None:
        """After `step` steps: look at what is held out, and write a checkpoint. view: of a test video."""
        row: dict[str, Any] = {"epoch": len(self.rows) + 1, "step": step, "loss": float(np.mean(losses))}
        samples, truths = self.parts.held_out
        if samples:
            view = view._replace(segments=1, crops=1)
            seen = self.run.look(self.parts.shards["train"], samples, truths, view, "held-out train")
            read = seen.read()
            row["held_out_accuracy"] = self.parts.task.score(
                outputs_of(seen)[read], [truths[n] for n in read]
            )
            if all(row["held_out_accuracy"] >= before["held_out_accuracy"] for before in self.rows):
                self.best = gather_to_cpu(self.run.classifier.state_dict())
        self.rows.append(row)
        self.run.strategy.accelerator.print(", ".join(f"{k} {v:.6g}" for k, v in row.items()))
        if self.run.strategy.is_main:
            scaler = self.run.strategy.scaler
            parts = {"now.": self.run.classifier.state_dict(), "best.": self.best}
            state: dict[str, Any] = {
                "provenance": self.about,
                "epochs": self.rows,
                "guard": None,
                "feature_stats": None,
            }
            state["model"] = {part + k: v for part, weights in parts.items() for k, v in weights.items()}
            state["optimizer"] = self.run.optimizer.state_dict()
            state["scaler"] = scaler.state_dict() if scaler else None
            with os_errors_as_user_errors(self.out):
                save_checkpoint(self.out / "checkpoints", step, gather_to_cpu(state), keep=1)

    def chosen(self) -> dict[str, Any]:
        """The classifier is then that of the best epoch (the last of equal ones), or of the last if nothing was held
        out -> which, and why."""
        if not self.best:
            return {**self.rows[-1], "epochs": len(self.rows), "n_held_out": 0}
        self.run.classifier.load_state_dict(self.best)
        best = max(reversed(self.rows), key=lambda row: row["held_out_accuracy"])
        return {
            **best,
            "epochs": len(self.rows),
            "n_held_out": len(self.parts.held_out[0]),
            "tried": self.rows,
        }


def fit(course: FinetuneState, view: View, augment: Any, per_epoch: int, data: DataConfig) -> None:
    """From where it stands to the end of the last epoch."""
    run, parts = course.run, course.parts
    a, tune, speed, steps = run.strategy, run.tune, run.speed, per_epoch * run.tune.epochs
    stream = SubsetOrder(parts.train_places, tune.seed, tune.lanes)
    clips = LabelledClips(parts.task.label, parts.shards["train"], stream, data, augment)
    shares = a.rank, a.world
    clips_a_step = [tune.batch * tune.repeat]
    loader: Any = train_steps(
        Streams([clips]),
        course.start,
        steps,
        clips_a_step,
        *shares,
        speed.workers,
        speed.decode_in_subprocess,
    )
    mixer, losses = Mixer(tune, len(parts.task.names)), []
    run.classifier.train()
    with contextlib.closing(loader):
        bar = tqdm(
            loader,
            course.out.name,
            steps,
            initial=course.start,
            disable=not a.is_main,
            mininterval=20,
        )
        for done, (batch,) in enumerate(bar, course.start + 1):
            losses.append(run.step(batch, mixer, done - 1, steps)["loss"])
            if done % per_epoch == 0:
                course.end_epoch(done, losses, view)
                losses = []


def write(
    out: Path,
    cfg: FinetuneConfig,
    loaded: LoadedEncoder,
    parts: FinetuneSplits,
    row: dict[str, Any],
    told: list[tuple],
    about: Any,
) -> None:
    """probe.json and the tables beside it, as of a probe."""
    label = parts.task.label
    write_tables(out, [PredictionRow(label, "none", "", "", *line) for line in told], {label})
    report = {
        "results": [{"control": "none", "protocol": "finetune", **row}],
        "low_shot": [],
        "data": {name: part.hash for name, part in parts.shards.items()},
        "test_samples_of_train_groups": parts.shared_groups,
        "seed": cfg.tune.seed,
        "libraries": about["libraries"],
    }
    write_report(out / "probe.json", config.to_tree(cfg), loaded, report)


def save(
    out: Path, classifier: Classifier, model: dict, loaded: LoadedEncoder, about: dict[str, Any]
) -> None:
    """encoder.safetensors and head.safetensors: for a probe, for another fine-tuning, for conversion."""
    found = Checkpoint("vidssl", model, classifier.encoder.state_dict(), loaded.metadata["pixels"])
    found.head, found.head_eps = classifier.head.state_dict(), LAYER_NORM_EPS
    if isinstance(classifier.head, AttentiveHead):
        found.head_heads, found.head_eps = classifier.head.xattn.heads, HEAD_EPS
    save_native(out, found, about)


@exit_on_lost_peer()
def main(argv: list[str]) -> None:
    cfg = config.load_config(argv, FinetuneConfig)
    data, tune, speed = cfg.data, cfg.tune, cfg.efficiency
    out = Path(cfg.out)
    if (out / "probe.json").exists():
        raise UserError(f"{out / 'probe.json'} exists: the test set was read for it; give another out=")
    check_writable(out)
    loaded = load_encoder(cfg.encoder, tune.seed if cfg.random_init else None)
    parts = open_splits(data, tune)
    clips = ProbeData(data.train, data.test, stride=data.stride, fps=data.fps)
    view = make_view(clips, ProbeProtocol(segments=tune.segments, crops=tune.crops), loaded, "none")
    cfg = replace(cfg, data=replace(data, stride=view.stride, fps=view.fps))
    tree = config.to_tree(cfg)
    hashes = [*(part.hash for part in parts.shards.values()), weights_hash(loaded.encoder)]
    about = provenance(tree, hashlib.sha256(" ".join(hashes).encode()).hexdigest())
    if state := load_checkpoint(out / "checkpoints"):
        check_same(state, about, out)
    unused = loaded.encoder.patch_embed_img is not None or len(loaded.encoder.level_norms) > 0
    tune_malloc()
    strategy = Strategy.from_env(speed, unused_parameters=unused, allow_sharding=False)
    check_divisible(tune, speed, strategy.world)

    per_epoch = max(1, len(parts.train_places) // tune.batch)
    optim = cfg.optim.build(warmup=round(tune.warmup * per_epoch)).scaled(tune.batch)
    classifier, model = make_classifier(loaded, cfg.head, len(parts.task.names), tune)
    classifier.encoder.blocks.activation_checkpointing = speed.activation_checkpointing
    prepared, optimizer = strategy.prepare(classifier, build_optimizer(classifier, optim, fused=True))
    colours = loaded.metadata["pixels"]["mean"], loaded.metadata["pixels"]["std"]
    run = FinetuneLoop(strategy, prepared, classifier, optimizer, optim, tune, speed, colours)
    if strategy.is_main:
        make_folder(out)
        with os_errors_as_user_errors(out):
            config.save(tree, out / "config.yaml")
    strategy.barrier()
    course = FinetuneState(run, parts, out, about, state)
    augment = cfg.augment.build(size=view.size)
    clip: dict[str, Any] = {"frames": view.frames, "stride": view.stride, "fps": view.fps}
    read = DataConfig(
        train=data.train, **clip, repeat=tune.repeat, max_decode_error_rate=data.max_decode_error_rate
    )
    fit(course, view, augment, per_epoch, read)

    chosen = course.chosen()
    seen = run.look(parts.shards["test"], *parts.test, view, "test")
    if strategy.is_main:
        row, told = score_predictions(
            parts.task, seen, list(range(len(seen.samples))), outputs_of(seen), tune.seed
        )
        row |= {"n_train": len(parts.train_places), "chosen": chosen}
        with os_errors_as_user_errors(out):
            save(out, classifier, model, loaded, {**about, "step": chosen["step"]})
            write(out, cfg, loaded, parts, row, told, about)
        strategy.accelerator.print(f"{row['label']} {row['metric']} {row['value']:.2f}  {row['ci95']}")
    strategy.close()


if __name__ == "__main__":
    run_cli(main, __doc__)

"""What is fine-tuned, and on what: the classifier, the samples of train and test, clips mixed in pairs."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn

from vidssl import config
from vidssl.config import Amount, Count, Names, Positive, Share, Size
from vidssl.core.errors import UserError
from vidssl.data.dataset import TrainClips
from vidssl.data.loader import Batch
from vidssl.data.order import Order
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.evaluate import check_apart, groups_of
from vidssl.evaluation.splits import hold_out, label_sets
from vidssl.evaluation.tasks import Task, class_of, make_task
from vidssl.model.heads import AttentiveHead, MeanHead
from vidssl.model.vit import Encoder
from vidssl.pretrained.files import LoadedEncoder, make_encoder

HEADS = {"mean": MeanHead, "attentive": AttentiveHead}
HEAD_SCALE = 0.001  # of the head's start (VideoMAE, run_class_finetuning.py, init_scale)


@dataclass(frozen=True)
class FinetuneDataConfig:
    """The `data` section: what is read; the clip is the one the encoder was trained on."""

    train: Names  # packed folders with labels
    test: Names
    label: str | None = None  # the label set; None: the only one
    stride: Count | None = None  # frames; None (and fps None): as the encoder was trained
    fps: Positive | None = None  # frames a second
    max_decode_error_rate: Share = (
        0.05  # fraction of training samples that may fail to decode before the run stops
    )


@dataclass(frozen=True)
class TuneConfig:
    """The `tune` section: what changes the result."""

    epochs: Count
    batch: Count  # videos a step, over all processes
    repeat: Count = 1  # clips of each (repeated augmentation)
    warmup: Amount = 5.0  # epochs
    drop_path: Share = 0.0
    label_smoothing: Share = 0.1  # of the labels
    mixup: Amount = 0.0  # alpha of the Beta distribution (arXiv 1710.09412); 0: none
    cutmix: Amount = 0.0  # the same (arXiv 1905.04899); with both, either is taken half of the time
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = (
        0.1  # fraction of train that chooses the epoch; 0: the last one
    )
    segments: Count = 5  # clips of a test video, evenly spread
    crops: Count = 3  # squares of each
    allow_unreadable: bool = False  # a test video that cannot be read: an error, or counted wrong and listed
    lanes: Count = 8  # a multiple of every number of processes that may be used
    seed: Size = 0


@dataclass(frozen=True)
class FinetuneEfficiency:
    """The `efficiency` section: what changes only the speed (up to rounding)."""

    workers: Size = 2  # loader processes for each training process
    micro_batches: Count = 1  # parts in which a process runs its share of the batch
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False  # activations in the backward pass, instead of keeping them
    decode_in_subprocess: bool = True  # decode in child processes
    eval_batch: Count = 16  # clips, when nothing is trained


def check(tune: TuneConfig, speed: FinetuneEfficiency, world: int) -> None:
    """Numbers that must divide one another."""
    for what, n, of, by in (
        ("tune.batch", tune.batch, "tune.lanes", tune.lanes),
        ("tune.lanes", tune.lanes, "the number of processes", world),
        (
            "the clips of a process",
            tune.batch * tune.repeat // world,
            "efficiency.micro_batches",
            speed.micro_batches,
        ),
    ):
        if n % by:
            raise UserError(f"{what} {n}: give a multiple of {of}, {by}")
    if (tune.mixup or tune.cutmix) and tune.batch % (2 * tune.lanes):
        raise UserError(
            f"tune.batch {tune.batch}: to mix clips give a multiple of 2 x tune.lanes, {2 * tune.lanes}"
        )


class Classifier(nn.Module):
    """video f32 [B, 3, T, H, W] -> logits [B, C]."""

    def __init__(self, encoder: Encoder, head: MeanHead | AttentiveHead):
        super().__init__()
        self.encoder: Encoder = encoder
        self.head: MeanHead | AttentiveHead = head

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.encoder(video))


def make_classifier(
    loaded: LoadedEncoder, head: dict[str, Any], classes: int, tune: TuneConfig
) -> tuple[Classifier, dict]:
    """-> (the encoder's weights under a fresh head, arguments of its Encoder).

    A mean head brings a norm of its own, so that the encoder's last one goes (VideoMAE, modeling_finetune.py).
    """
    model = dict(loaded.about["model"])
    weights = loaded.encoder.state_dict()
    if head["kind"] == "mean":
        model["final_norm"] = False
        weights = {k: v for k, v in weights.items() if not k.startswith("norm.")}
    torch.manual_seed(tune.seed)
    encoder = make_encoder({**model, "drop_path": tune.drop_path})
    encoder.load_state_dict(weights)
    top = config.build(head, HEADS, dim=encoder.dim, classes=classes)
    nn.init.trunc_normal_(top.linear.weight, std=0.02).data.mul_(HEAD_SCALE)
    nn.init.zeros_(top.linear.bias)
    return Classifier(encoder, top), model


class SubsetOrder:
    """The order of some of the samples, every epoch all of them (`order.Stream`). places: shard, number in it."""

    def __init__(self, places: list[tuple[int, int]], seed: int, lanes: int):
        self.places, self.seed, self.lanes = places, seed, lanes
        self.order = Order(
            np.ones(len(places), np.int64), seed, lanes
        )  # a shard each, so that all are shuffled

    def at(self, g: int) -> tuple[int, int]:
        return self.places[self.order.at(g)[0]]

    def replacement(self, g: int, attempt: int) -> tuple[int, int]:
        return self.places[self.order.replacement(g, attempt)[0]]


class LabelledClips(TrainClips):
    """Clips whose label is that of one label set."""

    def __init__(self, label: str, *given: Any):
        super().__init__(*given)
        self.label = label

    def _sample(self, g: int, attempt: int) -> Sample:
        sample = super()._sample(g, attempt)
        return sample._replace(meta={**sample.meta, "label": class_of(sample, self.label)})


def pair_mixup_partners(position: Tensor, lanes: int) -> Tensor:
    """position i64 [B] -> an order i64 [B] in which a clip and its mirror image in the batch are of one lane, so that
    what is mixed with what does not depend on the number of processes (a lane has an even number of clips)."""
    at = position.tolist()
    mine = len({p % lanes for p in at})
    rows = torch.tensor(sorted(range(len(at)), key=lambda i: (at[i] % lanes, at[i]))).view(mine, -1)
    half = rows.shape[1] // 2
    return torch.cat([rows[:, :half].T.flatten(), rows[:, half:].flip(1).T.flatten().flip(0)])


class Mixer:
    """Clips and labels -> clips and soft labels: two clips of a batch are mixed, or a box of one is put into the other
    in all its frames; one drawing for the whole batch (of all processes), a function of the step."""

    def __init__(self, tune: TuneConfig, classes: int):
        self.tune, self.classes = tune, classes
        self.mix = Mixup(tune.mixup, tune.cutmix, label_smoothing=tune.label_smoothing, num_classes=classes)

    def __call__(self, video: Tensor, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """video f32 [B, 3, T, H, W] -> the same, and targets f32 [B, C]."""
        label = batch.label.to(video.device)
        if not (self.tune.mixup or self.tune.cutmix):
            return video, mixup_target(label, self.classes, 1.0, self.tune.label_smoothing)
        order = pair_mixup_partners(batch.position, self.tune.lanes).to(video.device)
        np.random.seed((self.tune.seed, 7, step))  # what Mixup draws from
        folded, target = self.mix(video[order].flatten(1, 2), label[order])
        return folded.view_as(video), target


class FinetuneSplits(NamedTuple):
    """Train, without and of what is held out, and test."""

    shards: dict[str, Shards]
    task: Task
    places: list[tuple[int, int]]  # of the samples that are trained on
    held: tuple[list[Sample], list[Any]]
    test: tuple[list[Sample], list[Any]]
    shared_groups: int


def open_splits(data: FinetuneDataConfig, tune: TuneConfig) -> FinetuneSplits:
    """The samples that have the label; those of train cut in two by their groups."""
    shards = {"train": Shards(data.train), "test": Shards(data.test)}
    labels = label_sets(shards["train"], shards["test"], [data.label] if data.label else None)
    if len(labels) > 1:
        raise UserError(f"data.label: give one of {labels}")
    numbers = [(shard, i) for shard, n in enumerate(shards["train"].counts.tolist()) for i in range(n)]
    placed = [(p, s) for p in numbers if class_of(s := shards["train"].sample(*p), labels[0]) is not None]
    train, test = (
        [s for _, s in placed],
        [s for s in shards["test"].all() if class_of(s, labels[0]) is not None],
    )
    task, truths, asked = make_task(labels[0], shards["train"].classes[labels[0]], train, test, "class")
    if task.kind != "class":
        raise UserError(f"label '{labels[0]}': fine-tuning is for one class a sample")
    if not train or not test:
        raise UserError(f"no sample of {'test' if train else 'train'} has a label of '{labels[0]}'")
    out = np.zeros(len(train), bool)
    if tune.val_fraction:
        out = hold_out(truths, groups_of(train, list(range(len(train)))), tune.val_fraction, tune.seed)
        if not out.any():
            raise UserError(
                "no group of train can be held out to choose the epoch: tune.val_fraction=0 takes the last one"
            )
    held = [i for i in range(len(train)) if out[i]]
    places = [p for (p, _), away in zip(placed, out, strict=True) if not away]
    chosen = [train[i] for i in held], [truths[i] for i in held]
    return FinetuneSplits(shards, task, places, chosen, (test, asked), check_apart(train, test))

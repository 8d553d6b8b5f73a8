"""Parts of fine-tuning: classifier, train/held-out/test splits, labelled clips, mixup."""

from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn

from vidssl.config import Spec
from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.core.rng import KeyedRNG
from vidssl.core.splits import split_by_group
from vidssl.data.dataset import TrainClips
from vidssl.data.loader import Batch
from vidssl.data.order import Order
from vidssl.data.parts import groups_of
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.evaluate import check_disjoint
from vidssl.evaluation.splits import label_sets, labelled, strata_of
from vidssl.evaluation.tasks import Task, class_of, make_task
from vidssl.model.heads import AttentiveHead, MeanHead
from vidssl.model.vit import Encoder
from vidssl.pretrained.load import LoadedEncoder, build_encoder
from vidssl.training.finetune_schema import FinetuneDataConfig, TuneConfig

FINETUNE_HEADS = {"mean": MeanHead, "attentive": AttentiveHead}
HEAD_INIT_SCALE = 0.001  # factor on the initial weights of the last layer (VideoMAE, run_class_finetuning.py)


class Classifier(nn.Module):
    """Maps video f32 [B, 3, T, H, W] to logits [B, C]. arguments: constructor arguments of the encoder."""

    def __init__(self, encoder: Encoder, head: MeanHead | AttentiveHead, arguments: dict[str, Any]):
        super().__init__()
        self.encoder: Encoder = encoder
        self.head: MeanHead | AttentiveHead = head
        self.arguments = arguments

    def forward(self, video: Tensor, rng: KeyedRNG | None = None) -> Tensor:
        """rng: of stochastic depth; without one no sample skips a layer."""
        return self.head(self.encoder(video, rng=rng))


def make_classifier(loaded: LoadedEncoder, head: Spec, classes: int, tune: TuneConfig) -> Classifier:
    """Returns the pretrained encoder under a new head.

    A mean head has its own LayerNorm, which replaces the encoder's final one (VideoMAE,
    modeling_finetune.py).
    """
    arguments = dict(loaded.metadata["model"])
    weights = loaded.encoder.state_dict()
    if head.kind == "mean":
        arguments["final_norm"] = False
        weights = {k: v for k, v in weights.items() if not k.startswith("norm.")}
    torch.manual_seed(tune.seed)
    encoder = build_encoder({**arguments, "drop_path": tune.drop_path})
    encoder.load_state_dict(weights)
    new_head = head.build(dim=encoder.dim, classes=classes)
    nn.init.trunc_normal_(new_head.linear.weight, std=0.02).data.mul_(HEAD_INIT_SCALE)
    nn.init.zeros_(new_head.linear.bias)
    return Classifier(encoder, new_head, arguments)


def has_unread_parameters(encoder: Encoder) -> bool:
    """Whether some parameters get no gradient from the encoder's output at the tokens of a clip: an image
    tokenizer, norms of lower levels, the head before a predictor, a class token that no token sees."""
    parts = (encoder.patch_embed_img, encoder.level_norms, encoder.output_head)
    has_parts = any(part is not None and any(True for _ in part.parameters()) for part in parts)
    return has_parts or (encoder.class_token is not None and encoder.attention != "full")


class SubsetOrder:
    """An order (`order.Stream`) over a subset of the samples; each epoch visits every one of them once.

    places: (shard, number within it) of each sample.
    """

    def __init__(self, places: list[tuple[int, int]], seed: int, lanes: int):
        self.places, self.seed, self.lanes = places, seed, lanes
        # one "shard" per sample, so that the whole subset is shuffled
        self.order = Order(np.ones(len(places), np.int64), seed, lanes)

    def locate(self, position: int) -> tuple[int, int]:
        return self.places[self.order.locate(position)[0]]

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        return self.places[self.order.replacement(position, attempt)[0]]


class LabelledClips(TrainClips):
    """Training clips labelled with the class from one label set."""

    def __init__(self, label_set: str, *args: Any):
        super().__init__(*args)
        self.label_set = label_set

    def sample_at(self, position: int, attempt: int) -> Sample:
        sample = super().sample_at(position, attempt)
        return sample._replace(meta={**sample.meta, "label": class_of(sample, self.label_set)})


def pair_mixup_partners(position: Tensor, lanes: int) -> Tensor:
    """Returns an order i64 [B] of the batch in which rows i and B - 1 - i, which Mixup pairs, come from the
    same lane.

    position i64 [B]: stream positions; every lane has an even number of clips in the batch. The pairs
    therefore do not depend on the number of processes.
    """
    positions = position.tolist()
    local_lanes = len({p % lanes for p in positions})
    by_lane = sorted(range(len(positions)), key=lambda i: (positions[i] % lanes, positions[i]))
    first, second = torch.tensor(by_lane).view(local_lanes, -1).chunk(2, 1)
    return torch.cat([first.T.flatten(), second.flip(1).T.flatten().flip(0)])


class Mixer:
    """Mixup, cutmix and label smoothing with timm's Mixup. One coefficient (one box, the same in all frames)
    per step for the global batch, a function of (seed, step)."""

    def __init__(self, tune: TuneConfig, classes: int):
        self.tune, self.classes = tune, classes
        self.mixup = Mixup(tune.mixup, tune.cutmix, label_smoothing=tune.label_smoothing, num_classes=classes)

    def __call__(self, video: Tensor, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mixed clips, soft targets f32 [B, C] and stream positions i64 [B]; video f32 [B, 3, T, H,
        W]. The order of rows changes."""
        label = batch.label.to(video.device)
        position = batch.position.to(video.device)
        if not (self.tune.mixup or self.tune.cutmix):
            return video, mixup_target(label, self.classes, 1.0, self.tune.label_smoothing), position
        order = pair_mixup_partners(batch.position, self.tune.lanes).to(video.device)
        np.random.seed((self.tune.seed, 7, step))  # Mixup draws from numpy's global generator
        mixed, target = self.mixup(rearrange(video[order], "b c t h w -> b (c t) h w"), label[order])
        return mixed.view_as(video), target, position[order]


class FinetuneSplits(NamedTuple):
    """Samples with labels, and their labels, of the held-out part of train and of test; places of the other
    part."""

    shards: dict[str, Shards]  # "train", "test"
    task: Task
    train_places: list[tuple[int, int]]  # (shard, number within it) of the samples that are trained on
    held_out: tuple[list[Sample], list[Any]]
    test: tuple[list[Sample], list[Any]]
    shared_groups: int  # test samples whose group also occurs in train


def open_splits(data: FinetuneDataConfig, tune: TuneConfig) -> FinetuneSplits:
    """Opens the shards, keeps samples that carry the label, and holds out whole groups of train."""
    shards = {"train": Shards(data.train), "test": Shards(data.test)}
    found = label_sets(shards["train"], shards["test"], [data.label] if data.label else None)
    if len(found) > 1:
        raise UserError(f"data.label: give one of {found}")
    (label_set,) = found
    counts = shards["train"].counts.tolist()
    places = [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    places = [p for p in places if class_of(shards["train"].sample(*p), label_set) is not None]
    train = [shards["train"].sample(*p) for p in places]
    test = labelled(shards["test"], [label_set])
    classes = shards["train"].classes[label_set]
    test_classes = shards["test"].classes[label_set]
    task, train_labels, test_labels = make_task(label_set, classes, train, test, "class", test_classes)
    if task.kind != "class":
        raise UserError(f"label '{label_set}': fine-tuning needs one class per sample")
    if not train or not test:
        raise UserError(f"no sample of {'test' if train else 'train'} has a label of '{label_set}'")
    held_out = np.zeros(len(train), bool)
    if tune.val_fraction:
        groups = groups_of(train)
        strata = strata_of(task, train_labels)
        split = split_by_group(groups, strata, tune.val_fraction, tune.seed)
        held_out = split.held_out
        if split.note:
            logger.warning(f"tune.val_fraction: held out of train: {split.note}")
        if not held_out.any():
            raise UserError(
                "no group of train can be held out to select the epoch: set tune.val_fraction=0 (last epoch)"
            )
    rows = np.flatnonzero(held_out).tolist()
    return FinetuneSplits(
        shards,
        task.fitted(train_labels),
        [places[i] for i in np.flatnonzero(~held_out)],
        ([train[i] for i in rows], [train_labels[i] for i in rows]),
        (test, test_labels),
        check_disjoint(train, test),
    )

"""Micro-batches: the clips of a step that one forward pass takes, with their masks."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.utils._pytree import tree_map_only

from vidssl.core.constants import upload
from vidssl.core.errors import UserError
from vidssl.core.rng import GlobalBatch, KeyedRNG
from vidssl.data.loader import Batch
from vidssl.objective.masks import count_cut_groups
from vidssl.objective.objective import Masker, Masks, Objective
from vidssl.training.schema import TrainConfig


def make_cut_groups(cfg: TrainConfig, mask: Masker | None, world: int) -> Callable[[int], int]:
    """Returns what maps the clips of a global batch to the number of groups that `mask` cuts together.

    Raises UserError if they do not divide the batch, or the processes cannot share them evenly.
    """
    lanes = cfg.run.lanes
    for clips in cfg.data.clips(cfg.run.batch):
        groups = count_cut_groups(mask, clips)
        if groups % world and world % groups:
            shares = [n for n in range(1, lanes + 1) if groups % n == 0 or n % groups == 0]
            works = ", ".join(str(n) for n in shares if lanes % n == 0)
            raise UserError(
                f"method.mask.truncate_over {clips // groups} makes {groups} groups of {clips} clips, which "
                f"{world} processes cannot share: give {works} processes"
            )
    return partial(count_cut_groups, mask)


class MicroBatch(NamedTuple):
    """Clips that one forward pass takes."""

    stream: int
    video: Tensor  # u8 [B, 3, T, S, S]
    rng: KeyedRNG  # of the clips, on the device of the video; it has drawn the masks
    masks: Masks  # None: drawn in the forward pass, since they depend on the pixels


class BatchPiece(NamedTuple):
    """Clips of a batch that one forward pass takes."""

    video: Tensor  # u8 [B, 3, T, S, S]
    position: Tensor  # i64 [B], on the host
    batch: GlobalBatch  # that they are a part of
    motion: Tensor | None = None  # f16 [B, 2, T, h, w], on the host


def split_batch(batch: Batch, micro_batches: int, groups: int, rank: int, world: int) -> list[BatchPiece]:
    """Splits process `rank`'s clips of a stream in `micro_batches` equal parts, and these where they hold
    clips of several of the `groups` of the global batch (KeyedRNG.over_group). Reads positions on the
    host."""
    whole = GlobalBatch(int(batch.position.min()) - rank, len(batch.position) * world)
    group = (batch.position - whole.first) % groups
    order = group.argsort(stable=True)
    video = batch.video if groups == 1 else batch.video[upload(order, batch.video.device)]
    tensors = [video, batch.position[order]]
    if batch.motion is not None:
        tensors.append(batch.motion[order])
    chunks = zip(*(tensor.chunk(micro_batches) for tensor in (*tensors, group[order])), strict=True)
    parts = []
    for *of_chunk, of_group in chunks:
        sizes = of_group.unique_consecutive(return_counts=True)[1].tolist()
        pieces = zip(*(tensor.split(sizes) for tensor in of_chunk), strict=True)
        parts += [BatchPiece(clips, position, whole, *motion) for clips, position, *motion in pieces]
    return parts


class ProcessPlace(Protocol):
    """A process among all: a Strategy, or less."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...


class PartMaker:
    """Divides the batches of a step into micro-batches and draws their masks, on the host."""

    def __init__(
        self,
        objective: Objective,
        strategy: ProcessPlace,
        seed: int,
        micro_batches: int = 1,
        cut_groups: Callable[[int], int] = lambda clips: 1,
    ):
        """micro_batches: parts of a process's clips of a stream, at least; cut_groups: maps the clips of a
        global batch to the number of its groups (see split_batch)."""
        self.objective = objective
        self.rank = strategy.rank
        self.world = strategy.world
        self.seed = seed
        self.micro_batches = micro_batches
        self.cut_groups = cut_groups

    def __call__(self, step: int, batches: list[Batch]) -> list[MicroBatch]:
        """batches: one of each stream, positions on the host."""
        made = []
        for stream, batch in enumerate(batches):
            groups = self.cut_groups(len(batch.position) * self.world)
            for part in split_batch(batch, self.micro_batches, groups, self.rank, self.world):
                rng = KeyedRNG(self.seed, step, part.position, part.batch)
                masks = self.objective.draw_masks(part.video.shape, rng, part.motion)
                device = part.video.device
                masks = tree_map_only(Tensor, partial(upload, device=device), masks)
                made.append(MicroBatch(stream, part.video, rng.to(device), masks))
        return made


def make_part_maker(cfg: TrainConfig, objective: Objective, strategy: ProcessPlace) -> PartMaker:
    """The PartMaker of a run. Raises UserError if the processes cannot share the clips that are masked
    together."""
    if objective.couples_clips and cfg.efficiency.micro_batches > 1:
        raise UserError(
            f"efficiency.micro_batches {cfg.efficiency.micro_batches}: the method compares the clips of a "
            "step with one another, so they cannot be computed in parts: give 1"
        )
    cut_groups = make_cut_groups(cfg, objective.mask, strategy.world)
    if objective.couples_clips and any(cut_groups(clips) > 1 for clips in cfg.data.clips(cfg.run.batch)):
        raise UserError(
            "method.mask.truncate_over: divides the clips of a step, which the method compares with one "
            "another: give null (all clips of a step), or method.mask.truncate=random"
        )
    return PartMaker(objective, strategy, cfg.run.seed, cfg.efficiency.micro_batches, cut_groups)
